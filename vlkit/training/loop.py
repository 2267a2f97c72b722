"""train: a run from its config to a saved model, on one process or on as many as torchrun starts.

    config -> stages -> each: model as the stage before left it -> steps (stage_run.py) -> checkpoint -> stages/<n>-<name>
           -> the model of the last one

A run is found where its newest checkpoint says: in which stage, after which step, with the samples that come next.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from vlkit.errors import CheckpointError, ConfigError, CorruptCheckpointError, MissingDependencyError, RankError
from vlkit.training import run_checkpoint
from vlkit.training.build import describe_model
from vlkit.training.config import TrainConfig
from vlkit.training.faults import Heartbeat, StopRequest, stop_on_signals
from vlkit.training.metrics import METRICS, Metrics, trim_metrics
from vlkit.training.picture import draw_picture
from vlkit.training.progress import Progress, Result
from vlkit.training.ranks import Ranks, launched, lost_rank
from vlkit.training.rehearsal import rehearse
from vlkit.training.resume import check_groups, check_resumable, keep_state, run_state
from vlkit.training.run_stages import Stage, open_stages
from vlkit.training.stage_models import MODEL, STAGES, StageModels, random_states_kept, what_trains
from vlkit.training.stage_run import StageRun, Surroundings

CHECKPOINTS = "checkpoints"
Say = Callable[[str], object]
Verifiers = Mapping[str, Callable[..., Any]]

__all__ = ["CHECKPOINTS", "METRICS", "MODEL", "STAGES", "Result", "train"]


def train(
    config: TrainConfig,
    *,
    resume: bool = True,
    say: Say = lambda line: None,
    stop: StopRequest | None = None,
    verifiers: Verifiers | None = None,
) -> Result:
    """Train, from the newest complete checkpoint of the run's folder if there is one.

    On several ranks all call it with the same config; see `vlkit.training.ranks`. SIGTERM, SIGUSR1 and Ctrl-C end it after
    the step, with a checkpoint.

    Args:
        config: The run. Relative paths are seen from the current folder; `read_train_config` makes them absolute.
        resume: False refuses to begin in a folder that has checkpoints.
        say: Takes lines of progress, on the first rank, and of what takes too long, on any.
        stop: Where signals are noted already, see `vlkit.training.faults`; None notes them from here on.
        verifiers: Functions that judge answers, by the names that objectives call them by.

    Raises:
        ConfigError: A config that cannot be run, or that is not that of the checkpoints.
        SampleError: A sample that cannot be used.
        NonFiniteError: Too many steps in a row whose gradients are not finite.
        RankError: Another rank died, failed, hangs, or was started differently.
        CheckpointError: Saving or loading failed.
    """
    noted = stop_on_signals() if stop is None else nullcontext(stop)
    with noted as stop, launched(config.device, config.ranks.timeout_minutes) as ranks:
        name = f"rank {ranks.rank}" if ranks.size > 1 else "train"
        with Heartbeat(say, config.ranks.heartbeat_seconds, name) as heartbeat, random_states_kept():
            run = _Run(config, ranks, stop, heartbeat, say, verifiers or {})
            try:
                return run.go(resume)
            except Exception as error:
                if lost_rank(error) and ranks.size > 1:
                    raise RankError(
                        f"rank {ranks.rank}: another rank died or does not answer, {run.where()} (torch says: "
                        f"{_shortened(error)})"
                    ) from error
                error.add_note(run.where())
                raise


class _Run:
    """A run: its stages one after another, and what is saved between them."""

    def __init__(
        self, config: TrainConfig, ranks: Ranks, stop: StopRequest, heartbeat: Heartbeat, say: Say, verifiers: Verifiers
    ) -> None:
        self.config, self.ranks, self.stop, self.heartbeat, self._say = config, ranks, stop, heartbeat, say
        self.verifiers = verifiers
        self.folder = Path(config.run)
        self.progress = Progress()
        self.checkpoint: Path | None = None
        self.ready = False  # for its first step, from a checkpoint or from the beginning

    def say(self, line: str) -> None:
        if self.ranks.first:
            self._say(line)

    def where(self) -> str:
        """For messages: how far the run is, and what it can be resumed from."""
        if not self.ready:
            return "before any step"
        saved = f"the newest checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint yet"
        return f"in step {self.progress.step + 1}; {saved}"

    def go(self, resume: bool) -> Result:
        config, ranks = self.config, self.ranks
        self.heartbeat.now("describing the model")
        with ranks.together():
            shapes, processor = describe_model(config)
            self.heartbeat.now("reading the data files")
            self.stages = open_stages(config, processor)
            self.total = self.stages[-1].before + self.stages[-1].steps
            self.models = StageModels(config, self.stages, shapes, processor, ranks)
            self.fingerprints = [self.models.fingerprint(stage) for stage in self.stages]
            for stage in self.stages[1:]:  # what is wrong with the first shows at once
                rehearse(stage, self.models.described(stage), processor, ranks, self.verifiers)
        ranks.check_equal({"config": config.to_dict(), "stages": self.fingerprints}, "the ranks do not run the same")
        with self.alone(), ExitStack() as open_files:
            metrics = None
            with ranks.together():
                if ranks.first:
                    metrics = Metrics(self.folder, tensorboard=config.tensorboard)
                    open_files.callback(metrics.close)
            self.around = Surroundings(
                ranks, self.stop, self.heartbeat, self.say, metrics, processor, self.verifiers, self.total
            )
            return self.work(resume)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the run's folder: the first rank does, for all."""
        with ExitStack() as held:
            with self.ranks.together():
                if self.ranks.first:
                    held.enter_context(run_checkpoint.run_lock(self.folder))
            yield

    def work(self, resume: bool) -> Result:
        self.heartbeat.now("looking for checkpoints")
        run = self.restored(resume) or self.begun(0)
        self.ready = True
        while True:
            if run.steps(self.save):
                return self.stopped(run)
            self.save(run)
            last = run.stage.number + 1 == len(self.stages)
            if run.stage.name:
                self.heartbeat.now(f"saving the model of stage {run.stage.name}")
                self.say(f"saved {self.models.save_stage(self.model, run.task.modules, run.stage)}")
            if last:
                break
            run = self.next_stage(run)
        self.heartbeat.now("saving the model")
        model = self.models.save(self.model, run.task.modules, run.stage, self.folder / MODEL)
        self.say(f"saved {model}")
        if self.ranks.first and self.config.picture:
            try:
                self.say(f"drew {draw_picture(self.folder)}")
            except MissingDependencyError as missing:
                self.say(str(missing))
        progress = self.progress
        if progress.corrupt_samples:
            self.say(
                f"{progress.corrupt_samples} of {progress.samples} samples were corrupt or too long and left out; "
                "data.corrupt and data.too_long = 'refuse' stop at the first and name its file and line"
            )
        return self.result(run.loss, model=model)

    # Stages

    def begun(self, number: int) -> StageRun:
        """A stage with the model as it is built: new weights, or those that a checkpoint fills in next."""
        self.heartbeat.now("building the model")
        self.model = self.models.build(self.stages[number])
        return self.entered(self.stages[number])

    def next_stage(self, before: StageRun) -> StageRun:
        """The stage behind one that is done, with the model that it left."""
        stage = self.stages[before.stage.number + 1]
        self.progress.stage, self.progress.stage_step = stage.number, 0
        self.heartbeat.now(f"beginning stage {stage.name}")
        self.model = self.models.next(self.model, stage)
        run = self.entered(stage)
        if run.task.modules is not None:
            line = self.models.take_modules(run.task.modules, stage)
            if line is not None:
                self.say(f"stage {stage.name}: {line}")
        if stage.config.keep_state:
            kept = keep_state(before.optimizer, run.optimizer)
            self.say(f"stage {stage.name}: the optimizer's state of {kept} parameters is kept")
        return run

    def entered(self, stage: Stage) -> StageRun:
        run = StageRun(stage, self.model, self.around, self.progress, self.models.reference(stage))
        name = f"stage {stage.name} ({stage.number + 1}/{len(self.stages)}): " if stage.name else ""
        if name or not all(parameter.requires_grad for parameter in run.trained.parameters()):
            self.say(name + what_trains(run.trained))
        return run

    # What is kept

    def save(self, run: StageRun) -> None:
        """A checkpoint of this moment, unless there is one."""
        progress = self.progress
        target = self.folder / CHECKPOINTS / run_checkpoint.checkpoint_name(progress.step)
        if self.checkpoint == target:
            return
        self.heartbeat.now(f"saving step {progress.step}")
        state = run_state(run, self.config, self.fingerprints[run.stage.number])
        self.checkpoint = run_checkpoint.save_checkpoint(
            target.parent,
            progress.step,
            run.trained,
            run.optimizer,
            state,
            keep=run.config.checkpoints.keep,
            group=self.ranks.group,
        )
        self.say(f"saved {self.checkpoint}")

    def restored(self, resume: bool) -> StageRun | None:
        """Go on from the newest complete checkpoint that can be read."""
        folder = self.folder / CHECKPOINTS
        with self.ranks.together():
            found: list[list[Any]] = []
            skipped: list[str] = []
            if self.ranks.first:
                paths, skipped = run_checkpoint.complete_checkpoints(folder)
                if run_checkpoint.published(folder) and not resume:
                    raise ConfigError(f"{folder} has checkpoints; resume the run, or give it another folder with `run`")
                for path in paths:
                    state = run_checkpoint.read_state(path)
                    if not found:
                        check_resumable(path, state, self.config, self.stages, self.fingerprints, self.ranks, self.say)
                    found.append([path.name, Progress.from_dict(state["progress"]).stage])
        found, skipped = self.ranks.from_first([found, skipped])
        for line in skipped:
            self.say(line)
        run = None
        for name, number in found:
            path = folder / name
            run = self.begun(number)
            with self.ranks.together():
                if self.ranks.first:
                    check_groups(path, run_checkpoint.read_state(path), run.optimizer, run.config)
            try:
                state = run_checkpoint.load_checkpoint(path, run.trained, run.optimizer, group=self.ranks.group)
            except CorruptCheckpointError as error:
                self.say(f"{name} is skipped: {error}")
                skipped.append(name)
                continue
            vars(self.progress).update(vars(Progress.from_dict(state["progress"])))
            self.checkpoint = path
            try:
                run.load_state(state)
            except ConfigError as error:
                raise ConfigError(
                    f"{path}: the run cannot go on with this config: {error}. Give the new run another folder with `run`"
                ) from error
            break
        if skipped and self.checkpoint is None:
            raise CheckpointError(
                f"{folder}: no checkpoint is complete ({len(skipped)} damaged); move them away to begin anew"
            )
        if self.ranks.first:
            self.set_aside(folder)
            trim_metrics(self.folder / METRICS, self.progress.step)
        if self.checkpoint is not None:
            self.say(f"resumed from {self.checkpoint}, {self.total - self.progress.step} steps are left")
        return run

    def set_aside(self, folder: Path) -> None:
        """Give damaged checkpoints newer than the one resumed from another name: the run will come to their steps again."""
        for path in run_checkpoint.published(folder):
            if self.checkpoint is None or path.name > self.checkpoint.name:
                os.rename(path, path.with_name(f"{path.name}.damaged-{time.time_ns()}"))

    def stopped(self, run: StageRun) -> Result:
        self.save(run)
        name = self.stop.signal or "another rank was asked"
        self.say(f"stopped by {name} after step {self.progress.step}; the same command goes on from here")
        return self.result(run.loss, stopped_by=name)

    def result(self, loss: float | None, *, model: Path | None = None, stopped_by: str | None = None) -> Result:
        progress = self.progress
        return Result(
            progress.step,
            progress.tokens,
            loss,
            progress.skipped_steps,
            progress.corrupt_samples,
            self.checkpoint,
            model,
            stopped_by,
        )


# Parts that stand alone


def _shortened(error: BaseException) -> str:
    """The first sentence of what torch says, without the place in its sources."""
    return re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0]).split(". This is typically")[0]
