"""train: a run from its config to a saved model, on one process or on as many as torchrun starts.

    config -> stages -> each: model as the stage before left it -> steps (stage_run.py) -> checkpoint -> stages/<n>-<name>
           -> the model of the last one

A run is found where its newest checkpoint says: in which stage, after which step, with the samples that come next.
"""

from __future__ import annotations

import copy
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlkit.errors import CheckpointError, ConfigError, CorruptCheckpointError, MissingDependencyError, RankError
from vlkit.models import VisionLanguageModel
from vlkit.processing import Processor
from vlkit.training import run_checkpoint
from vlkit.training.build import build_model, describe_model, enter_stage, fingerprint, freeze_parts, open_sources
from vlkit.training.config import TrainConfig
from vlkit.training.faults import Heartbeat, StopRequest, stop_on_signals
from vlkit.training.lora import has_lora, merge_lora
from vlkit.training.lora_files import save_adapter
from vlkit.training.metrics import METRICS, Metrics, trim_metrics
from vlkit.training.picture import draw_picture
from vlkit.training.progress import Progress, Result
from vlkit.training.ranks import Ranks, launched, lost_rank
from vlkit.training.resume import check_groups, check_resumable, keep_state, run_state
from vlkit.training.rope_theta import set_rope_theta
from vlkit.training.stage_run import Stage, StageRun, Surroundings

CHECKPOINTS, STAGES, MODEL = "checkpoints", "stages", "model"
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

    def say(self, line: str) -> None:
        if self.ranks.first:
            self._say(line)

    def where(self) -> str:
        """For messages: how far the run is, and what it can be resumed from."""
        saved = f"the newest checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint yet"
        return f"in step {self.progress.step + 1}; {saved}"

    def go(self, resume: bool) -> Result:
        config, ranks = self.config, self.ranks
        self.heartbeat.now("describing the model")
        with ranks.together():
            self.shapes, self.processor = describe_model(config)
            self.heartbeat.now("reading the data files")
            self.stages = _opened(config, self.processor)
            self.total = self.stages[-1].before + self.stages[-1].steps
            self.fingerprints = []
            for stage in self.stages:
                shapes = copy.deepcopy(self.shapes)
                self._prepare_shapes(shapes, stage)
                self.fingerprints.append(fingerprint(stage.config, shapes, self.processor, stage.sources))
        ranks.check_equal({"config": config.to_dict(), "stages": self.fingerprints}, "the ranks do not run the same")
        with self.alone(), ExitStack() as open_files:
            metrics = None
            if ranks.first:
                metrics = Metrics(self.folder, tensorboard=config.tensorboard)
                open_files.callback(metrics.close)
            self.around = Surroundings(
                ranks, self.stop, self.heartbeat, self.say, metrics, self.processor, self.verifiers, self.total
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
        while True:
            if run.steps(self.save):
                return self.stopped(run)
            self.save(run)
            last = run.stage.number + 1 == len(self.stages)
            if run.stage.name:
                self.save_stage(run)
            if last:
                break
            run = self.next_stage(run)
        self.heartbeat.now("saving the model")
        model = save_model(self.model, self.processor, self.folder / MODEL, self.ranks)
        self.save_modules(run, model)
        self.say(f"saved {model}")
        if self.ranks.first and self.config.picture:
            try:
                self.say(f"drew {draw_picture(self.folder)}")
            except MissingDependencyError as missing:
                self.say(str(missing))
        progress = self.progress
        if progress.corrupt_samples:
            self.say(
                f"{progress.corrupt_samples} of {progress.samples} samples were corrupt and left out; "
                "data.corrupt = 'refuse' stops at the first and names its file and line"
            )
        return self.result(run.loss, model=model)

    # Stages

    def begun(self, number: int) -> StageRun:
        """A stage with the model as it is built: new weights, or those that a checkpoint fills in next."""
        stage = self.stages[number]
        self.heartbeat.now("building the model")
        self.model = build_model(
            self.config, self.shapes, self.ranks, prepare=lambda model: self._prepare_shapes(model, stage)
        )
        enter_stage(self.model, stage.config)
        return self.entered(stage)

    def next_stage(self, before: StageRun) -> StageRun:
        """The stage behind one that is done, with the model that it left."""
        stage = self.stages[before.stage.number + 1]
        self.progress.stage, self.progress.stage_step = stage.number, 0
        self.heartbeat.now(f"beginning stage {stage.name}")
        if self.model.parts_are_sharded:  # what records gradients is settled before parts are sharded
            folder = self.stage_folder(before.stage)
            self.model = build_model(
                self.config,
                self.shapes,
                self.ranks,
                folder=folder,
                prepare=lambda model: freeze_parts(model, stage.config),
            )
        enter_stage(self.model, stage.config)
        run = self.entered(stage)
        run.take_modules(before)
        if stage.config.keep_state:
            kept = keep_state(before.optimizer, run.optimizer)
            self.say(f"stage {stage.name}: the optimizer's state of {kept} parameters is kept")
        return run

    def entered(self, stage: Stage) -> StageRun:
        if stage.name:
            self.say(f"stage {stage.name} ({stage.number + 1}/{len(self.stages)}): {_trained(self.model)}")
        return StageRun(stage, self.model, self.around, self.progress, _Once(lambda: self.reference(stage)))

    def reference(self, stage: Stage) -> VisionLanguageModel:
        """Collective. The frozen model that a stage began with."""
        folder = None
        if stage.number:
            folder = self.stage_folder(self.stages[stage.number - 1])
            if not folder.is_dir():
                raise CheckpointError(
                    f"{folder}: missing, and stage {stage.name!r} compares with the model that was saved there"
                )

        def frozen(model: VisionLanguageModel) -> None:
            self._set_theta(model, stage)
            model.requires_grad_(False)

        with random_states_kept():
            return build_model(
                self.config, self.shapes, self.ranks, folder=folder, adapted=False, prepare=frozen
            ).eval()

    def _prepare_shapes(self, model: VisionLanguageModel, stage: Stage) -> None:
        self._set_theta(model, stage)
        freeze_parts(model, stage.config)

    def _set_theta(self, model: VisionLanguageModel, stage: Stage) -> None:
        """The wavelengths that the stages up to this one have set."""
        for each in self.stages[: stage.number + 1]:
            if each.config.rope_theta is not None:
                set_rope_theta(model, each.config.rope_theta, max_positions=each.config.max_positions)

    def stage_folder(self, stage: Stage) -> Path:
        return self.folder / STAGES / f"{stage.number + 1}-{stage.name}"

    def save_stage(self, run: StageRun) -> None:
        """The model that a stage ends with, whole or not at all."""
        stage = run.stage
        self.heartbeat.now(f"saving the model of stage {stage.name}")
        folder = self.stage_folder(stage)
        partial = folder.with_name(f".{folder.name}.partial")
        with self.ranks.together():
            if self.ranks.first:
                folder.parent.mkdir(exist_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
        save_model(self.model, self.processor, partial, self.ranks)
        self.save_modules(run, partial)
        with self.ranks.together():
            if self.ranks.first:
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(partial, folder)
        self.say(f"saved {folder}")

    def save_modules(self, run: StageRun, folder: Path) -> None:
        """What the objective has trained beside the model, in a folder of its kind among the model's files."""
        save = getattr(run.task.modules, "save_pretrained", None)
        with self.ranks.together():
            if save is not None and self.ranks.first:
                save(folder / str((run.config.objective or {}).get("kind")))

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
            run.load_state(state)
            self.checkpoint = path
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


class _Once:
    """What a function gives, made at the first call."""

    def __init__(self, make: Callable[[], VisionLanguageModel]) -> None:
        self._make = make
        self._made: VisionLanguageModel | None = None

    def __call__(self) -> VisionLanguageModel:
        if self._made is None:
            self._made = self._make()
        return self._made


def _opened(config: TrainConfig, processor: Processor) -> list[Stage]:
    """The stages with their data; files that several of them read are opened once."""
    stages: list[Stage] = []
    known: dict[Any, Any] = {}
    for number, (name, own) in enumerate(config.resolved_stages()):
        data = own.data
        key: tuple[Any, ...] = data.files, tuple(stream.files for stream in data.streams)
        if data.join_groundings:
            key += own.seed, data.max_tokens, data.labels
        if key not in known:
            known[key] = open_sources(own, processor)
        sources = known[key]
        steps = own.steps or math.ceil((own.epochs or 0) * len(sources[0]) / own.batch)
        before = stages[-1].before + stages[-1].steps if stages else 0
        stages.append(Stage(number, name, own, sources, steps, before))
    return stages


def _trained(model: VisionLanguageModel) -> str:
    """How much of every part learns."""
    told = []
    for name, part in model.named_children():
        parameters = list(part.parameters())
        trained, total = sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
        told.append(
            f"{name} {'frozen' if not trained else 'trains' if trained == total else f'trains {trained:,}'} of {total:,}"
        )
    return ", ".join(told)


def _shortened(error: BaseException) -> str:
    """The first sentence of what torch says, without the place in its sources."""
    return re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0]).split(". This is typically")[0]


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave the random states of the process as they were."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def save_model(model: VisionLanguageModel, processor: Processor, folder: Path, ranks: Ranks) -> Path:
    """Collective. Write the trained model in its Hub layout, with its processor: `vlkit generate` takes the folder."""
    if model.parts_are_sharded:
        from vlkit.training.gathering import save_sharded

        save_sharded(model, folder)
    with ranks.together():
        if ranks.first:
            if has_lora(model):
                save_adapter(model, folder / "adapter")
                model = copy.deepcopy(model)
                merge_lora(model)
            if not model.parts_are_sharded:
                model.save_pretrained(folder)
            processor.save_pretrained(folder)
    return folder
