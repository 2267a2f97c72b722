"""train: a run from its config to a saved model, on one process or on as many as torchrun starts.

    step s:  samples [s * batch, (s + 1) * batch) of the endless order   (data.py)
             -> a part for every rank -> micro-batches -> loss / supervised tokens of the whole step -> gradients
             -> Muon or AdamW -> selection bias of routers from the loads of all ranks

The result depends on the config, not on the ranks: another number of them changes the order in which sums are rounded, and
nothing else. All randomness of a step is drawn from the seed, the step and the rank, so no random state has to be saved.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlkit.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpointError,
    NonFiniteError,
    RankError,
    SampleError,
)
from vlkit.layers.moe import Router
from vlkit.models import VisionLanguageModel
from vlkit.objectives.cross_entropy import IGNORE
from vlkit.optim import warmup_decay
from vlkit.packing import Batch, Layout, Packed
from vlkit.processing import Processor
from vlkit.training import run_checkpoint
from vlkit.training.build import build_model, describe_model, fingerprint, make_optimizer
from vlkit.training.config import TrainConfig
from vlkit.training.data import Conversations, StepReader, StepShare
from vlkit.training.experts import balance_experts
from vlkit.training.faults import Heartbeat, StopRequest, stop_on_signals
from vlkit.training.finite import finite_guard
from vlkit.training.ranks import Ranks, as_change, first_difference, launched, lost_rank

CHECKPOINTS, METRICS, MODEL = "checkpoints", "metrics.jsonl", "model"
# What a run may not be resumed with when it has changed; everything else may change, and is said.
FIXED = ("model", "parameters", "processor", "data", "seed", "shuffle")
# Options that decide which parameters are in one group of the optimizer, whose saved state is by groups.
GROUPING = ("kind", "muon", "adamw", "part_lr", "layer_decay", "decay_vectors")
Say = Callable[[str], object]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        steps: Steps done, those of earlier parts of the run included.
        tokens: Tokens that went through the decoder.
        loss: Of the last step, in nats per supervised token; None if no step was done now.
        skipped_steps: Steps that changed nothing: gradients that were not finite, or no supervised token.
        corrupt_samples: Samples left out because they cannot be used.
        checkpoint: The newest checkpoint.
        model: Folder of the saved model; None if the run was stopped before its end.
        stopped_by: The signal that stopped it; None at the end of the run.
    """

    steps: int
    tokens: int
    loss: float | None
    skipped_steps: int
    corrupt_samples: int
    checkpoint: Path | None
    model: Path | None
    stopped_by: str | None


@dataclass
class _Progress:
    """What has to be known to go on."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    untaught_in_a_row: int = 0  # of these, the steps without a supervised token
    corrupt_in_a_row: int = 0  # samples left out in these
    corrupt_samples: int = 0


class _Done(NamedTuple):
    """One step, as all ranks know it."""

    loss: float
    grad_norm: float
    skipped: bool
    tokens: int
    corrupt: int


def train(
    config: TrainConfig, *, resume: bool = True, say: Say = lambda line: None, stop: StopRequest | None = None
) -> Result:
    """Train, from the newest complete checkpoint of the run's folder if there is one.

    On several ranks all call it with the same config; see `vlkit.training.ranks`. SIGTERM, SIGUSR1 and Ctrl-C end it after
    the step, with a checkpoint.

    Args:
        config: The run. Relative paths are seen from the current folder; `read_train_config` makes them absolute.
        resume: False refuses to begin in a folder that has checkpoints.
        say: Takes lines of progress, on the first rank, and of what takes too long, on any.
        stop: Where signals are noted already, see `vlkit.training.faults`; None notes them from here on.

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
        with Heartbeat(say, config.ranks.heartbeat_seconds, name) as heartbeat, _random_states_kept():
            run = _Run(config, ranks, stop, heartbeat, say)
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
    """The parts of a run, made once, and the loop over its steps."""

    def __init__(self, config: TrainConfig, ranks: Ranks, stop: StopRequest, heartbeat: Heartbeat, say: Say) -> None:
        self.config, self.ranks, self.stop, self.heartbeat, self._say = config, ranks, stop, heartbeat, say
        self.folder = Path(config.run)
        self.progress = _Progress()
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
        self.heartbeat.now("reading the data files")
        with ranks.together():
            data = Conversations(config.data.files)
        self.total = config.steps or math.ceil((config.epochs or 0) * len(data) / config.batch)
        self.heartbeat.now("building the model")
        with ranks.together():
            shapes, processor = describe_model(config)
            self.fingerprint = fingerprint(config, shapes, processor, data)
        ranks.check_equal({"config": config.to_dict(), **self.fingerprint}, "the ranks do not run the same")
        with self.alone():
            return self.work(data, shapes, processor, resume)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the run's folder: the first rank does, for all."""
        with ExitStack() as held:
            with self.ranks.together():
                if self.ranks.first:
                    held.enter_context(run_checkpoint.run_lock(self.folder))
            yield

    def work(self, data: Conversations, shapes: VisionLanguageModel, processor: Processor, resume: bool) -> Result:
        config, ranks = self.config, self.ranks
        self.model = build_model(config, shapes, ranks)
        self.optimizer = make_optimizer(self.model, config, ranks)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.biases = [m.bias for m in self.model.modules() if isinstance(m, Router) and m.bias is not None]
        self.heartbeat.now("looking for checkpoints")
        self.restore(resume)
        loss = None
        with self.reader(data, processor) as reader:
            self.model.train()
            begun, counted = time.perf_counter(), 0
            while self.progress.step < self.total:
                self.heartbeat.now(f"preparing step {self.progress.step + 1}")
                share, stopped = self.share(reader)
                if stopped:
                    return self.stopped(loss)
                done = self.step(share)
                loss, counted = done.loss, counted + done.tokens
                if self.progress.step % config.log_every == 0 or self.progress.step == self.total:
                    seconds = time.perf_counter() - begun
                    self.log(done, counted / max(seconds, 1e-9))
                    begun, counted = time.perf_counter(), 0
                self.check_learning()
                every = config.checkpoints.every
                if every is not None and self.progress.step % every == 0 and self.progress.step < self.total:
                    self.save()
        self.save()
        self.heartbeat.now("saving the model")
        model = save_model(self.model, processor, self.folder / MODEL, ranks)
        self.say(f"saved {model}")
        if self.progress.corrupt_samples:
            self.say(
                f"{self.progress.corrupt_samples} of {self.progress.samples} samples were corrupt and left out; "
                "data.corrupt = 'refuse' stops at the first and names its file and line"
            )
        return self.result(loss, model=model)

    # The parts

    def reader(self, data: Conversations, processor: Processor) -> StepReader:
        config = self.config
        return StepReader(
            data,
            processor,
            batch=config.batch,
            rank=self.ranks.rank,
            num_ranks=self.ranks.size,
            seed=config.seed,
            shuffle=config.data.shuffle,
            skip_corrupt=config.data.corrupt == "skip",
            max_tokens=config.data.max_tokens,
            positions=self.model.llm.config.max_positions,
            max_samples=config.micro_batch,
            max_batch_tokens=config.micro_batch_tokens,
            workers=config.data.workers,
        )

    # A step

    def share(self, reader: StepReader) -> tuple[StepShare, bool]:
        """This rank's samples of the next step, and whether the run is to stop before it."""
        share, failure = None, None
        try:
            share = reader.read(self.progress.samples)
        except Exception as error:
            failure = error
        self.heartbeat.now(f"waiting for the other ranks before step {self.progress.step + 1}")
        asked = int(self.stop.asked)
        counts = [0, 0, 0, 0] if share is None else [len(share.micro_batches), *share[1:]]
        told = self.ranks.gather(asked, int(failure is not None), *counts)
        if any(failed for _, failed, *_ in told):
            with self.ranks.together():
                if failure is not None:
                    raise failure
        assert share is not None
        self.micro, self.targets, self.tokens, self.corrupt = (list(each) for each in list(zip(*told, strict=True))[2:])
        return share, any(asked for asked, *_ in told)

    def step(self, share: StepShare) -> _Done:
        """Learn from the next step's samples."""
        config, ranks, progress = self.config, self.ranks, self.progress
        self.heartbeat.now(f"in step {progress.step + 1}")
        seed_all(config.seed, progress.step, ranks.rank)
        factor = learning_rate_factor(config, self.total, progress.step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        total, norm, skipped = float("nan"), None, True
        if taught := sum(self.targets) > 0:  # else gradients of zeros would let decay and momentum move the weights
            loss, load = self.gradients(share, sum(self.targets))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            total = float(ranks.sum(loss))
            skipped, norm = self.optimizer.last_step_skipped, self.optimizer.last_grad_norm
            if load is not None and config.balance_rate and not skipped:
                balance_experts(self.model, load, config.balance_rate, group=ranks.group)
        progress.step += 1
        progress.samples += config.batch
        progress.tokens += sum(self.tokens)
        progress.corrupt_samples += sum(self.corrupt)
        progress.skipped_steps += skipped
        if skipped:
            progress.skipped_in_a_row += 1
            progress.untaught_in_a_row += not taught
            progress.corrupt_in_a_row += sum(self.corrupt)
        else:
            progress.skipped_in_a_row = progress.untaught_in_a_row = progress.corrupt_in_a_row = 0
        return _Done(total, float("nan") if norm is None else float(norm), skipped, sum(self.tokens), sum(self.corrupt))

    def check_learning(self) -> None:
        """Stop a run that has not learnt anything for too many steps, or in all of them.

        Raises:
            SampleError: Some of these steps had no supervised token.
            NonFiniteError: The gradients were not finite.
        """
        progress = self.progress
        row = progress.skipped_in_a_row
        if row <= self.config.max_skipped_steps and row < self.total:
            return
        if progress.untaught_in_a_row:
            raise SampleError(
                f"{progress.untaught_in_a_row} of the last {row} steps, up to step {progress.step}, had no supervised token, and "
                f"none learnt anything; {progress.corrupt_in_a_row} of their "
                f"{row * self.config.batch} samples were corrupt. Look at the paths of the "
                "images and at data.max_tokens; data.corrupt = 'refuse' names file, line and reason of the first sample"
            )
        raise NonFiniteError(
            f"{row} steps in a row had gradients that are not finite, the last is step {progress.step}; weights and state "
            "are those of the last good step. Lower the learning rate, compute in bfloat16 or float32, or look at the data"
        )

    def gradients(self, share: StepShare, num_targets: int) -> tuple[Tensor, Tensor | None]:
        """Run all micro-batches. Ranks with fewer of them, or none, run a blank one, so that all exchange alike.

        The ranks' gradients are averaged later, so each is scaled by the number of ranks.

        Returns:
            This rank's part of the loss, and the tokens of every expert, if routers have a selection bias.
        """
        device = self.ranks.device
        loss = torch.zeros((), dtype=torch.float64, device=device)
        load: Tensor | None = None
        if self.biases:
            load = torch.zeros(len(self.biases), len(self.biases[0]), dtype=torch.int64, device=device)
        for place in range(max(1, *self.micro)):
            real = place < len(share.micro_batches)
            batch = share.micro_batches[place] if real else blank_batch(self.model)
            with autocast(self.config, device, self.model.parts_are_sharded), self.guard():
                out = self.model(batch.to(device))
            weighted = out.loss * (out.num_targets / max(num_targets, 1))
            (weighted * self.ranks.size).backward()
            loss = loss + weighted.detach().double()
            if real and load is not None:
                load += out.expert_load
        return loss, load

    def guard(self) -> AbstractContextManager[None]:
        """Looks for numbers that are not finite, in the steps that are to be looked at."""
        every = self.config.check_finite_every
        return finite_guard(self.model) if every and self.progress.step % every == 0 else nullcontext()

    # What is told and kept

    def log(self, done: _Done, tokens_per_second: float) -> None:
        progress, group = self.progress, self.optimizer.param_groups[0]
        if not self.ranks.first:
            return
        line = (
            f"step {progress.step}/{self.total}  loss {done.loss:.4f}  lr {group['lr']:.2e}  "
            f"{tokens_per_second:.0f} tokens/s  grad norm {done.grad_norm:.3g}"
        )
        line += f"  skipped {progress.skipped_steps}" if progress.skipped_steps else ""
        line += f"  corrupt {progress.corrupt_samples}" if progress.corrupt_samples else ""
        self.say(line)
        values = {
            "step": progress.step,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "loss": done.loss,
            "lr": group["lr"],
            "grad_norm": done.grad_norm,
            "tokens_per_second": tokens_per_second,
            "skipped_steps": progress.skipped_steps,
            "corrupt_samples": progress.corrupt_samples,
        }
        finite = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def save(self) -> None:
        """A checkpoint of this moment, unless there is one."""
        progress = self.progress
        target = self.folder / CHECKPOINTS / run_checkpoint.checkpoint_name(progress.step)
        if self.checkpoint == target:
            return
        self.heartbeat.now(f"saving step {progress.step}")
        state = {
            "progress": vars(progress),
            "random": "drawn from seed, step and rank",
            "schedule": {"total": self.total, **self.config.schedule.to_dict()},
            "ranks": self.ranks.size,
            "config": self.config.to_dict(),
            "fingerprint": self.fingerprint,
            "groups": self.groups(),
        }
        self.checkpoint = run_checkpoint.save_checkpoint(
            target.parent,
            progress.step,
            self.model,
            self.optimizer,
            state,
            keep=self.config.checkpoints.keep,
            group=self.ranks.group,
        )
        self.say(f"saved {self.checkpoint}")

    def restore(self, resume: bool) -> None:
        """Go on from the newest complete checkpoint that can be read."""
        folder = self.folder / CHECKPOINTS
        with self.ranks.together():
            found: list[Path] = []
            skipped: list[str] = []
            if self.ranks.first:
                found, skipped = run_checkpoint.complete_checkpoints(folder)
                if run_checkpoint.published(folder) and not resume:
                    raise ConfigError(f"{folder} has checkpoints; resume the run, or give it another folder with `run`")
                for path in found[:1]:
                    self.check_resumable(path)
        names, skipped = self.ranks.from_first([[path.name for path in found], skipped])
        for line in skipped:
            self.say(line)
        for name in names:
            path = folder / name
            try:
                state = run_checkpoint.load_checkpoint(path, self.model, self.optimizer, group=self.ranks.group)
            except CorruptCheckpointError as error:
                self.say(f"{name} is skipped: {error}")
                skipped.append(name)
                continue
            self.progress = _Progress(**state["progress"])
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

    def set_aside(self, folder: Path) -> None:
        """Give damaged checkpoints newer than the one resumed from another name: the run will come to their steps again."""
        for path in run_checkpoint.published(folder):
            if self.checkpoint is None or path.name > self.checkpoint.name:
                os.rename(path, path.with_name(f"{path.name}.damaged-{time.time_ns()}"))

    def check_resumable(self, path: Path) -> None:
        """Refuse to go on with another model or other data, or beyond the end; say what else has changed."""
        state = run_checkpoint.read_state(path)
        saved = state["fingerprint"]
        for key in FIXED:
            if difference := first_difference(saved.get(key), self.fingerprint[key], key):
                raise ConfigError(
                    f"{path}: the run cannot go on with this config: {difference}. Give the new run another folder with `run`"
                )
        ours = json.loads(json.dumps(self.config.to_dict()))
        if state.get("groups", self.groups()) != self.groups():
            before, now = state["config"].get("optimizer", {}), ours["optimizer"]
            changes = [first_difference(before.get(key), now[key], f"optimizer.{key}", as_change) for key in GROUPING]
            said = ", ".join(filter(None, changes)) or "other rates are equal than were"
            raise ConfigError(
                f"{path}: the run cannot go on with this config: its optimizer groups the parameters in another way, and the "
                f"saved state is by groups ({said}). Set that back, or give the new run another folder with `run`"
            )
        if (done := state["progress"]["step"]) > self.total:
            raise ConfigError(
                f"{path}: {done} steps are done, and the config asks for {self.total}: there is nothing to do, and nothing was "
                "changed. Ask for more steps, or give the shorter run another folder with `run`"
            )
        for key, value in ours.items():
            if key not in ("run", "model", "data") and (
                difference := first_difference(state["config"].get(key), value, key, as_change)
            ):
                self.say(f"changed since {path.name}: {difference}")
        if state["ranks"] != self.ranks.size:
            self.say(f"changed since {path.name}: ranks: {as_change(str(state['ranks']), str(self.ranks.size))}")

    def groups(self) -> list[list[Any]]:
        """Algorithm and names of every group of the optimizer."""
        return [[group["algorithm"], sorted(group["param_names"])] for group in self.optimizer.param_groups]

    def stopped(self, loss: float | None) -> Result:
        self.save()
        name = self.stop.signal or "another rank was asked"
        self.say(f"stopped by {name} after step {self.progress.step}; the same command goes on from here")
        return self.result(loss, stopped_by=name)

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


def learning_rate_factor(config: TrainConfig, total: int, step: int) -> float:
    """The factor on all learning rates in a step, counted from 0."""
    schedule = config.schedule
    return warmup_decay(
        step, total=total, warmup=schedule.warmup, decay=schedule.decay, shape=schedule.shape, final=schedule.final
    )


def blank_batch(model: VisionLanguageModel) -> Batch:
    """Two tokens without a label: every parameter gets a gradient of zero."""
    visual = {model.config.image_token_id, model.config.video_token_id}
    plain = next(token for token in range(4) if token not in visual)
    return Batch(Packed(torch.full((2,), plain), Layout((2,))), labels=torch.full((2,), IGNORE))


def autocast(config: TrainConfig, device: torch.device, sharded: bool) -> AbstractContextManager[Any]:
    """Products in the compute dtype, where that is not the parameters'; a sharded model sees to it itself."""
    if config.compute_dtype in (None, config.dtype) or sharded:
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, config.compute_dtype))


def seed_all(seed: int, step: int, rank: int) -> None:
    """Set the random states of Python, numpy and torch from the seed, the step and the rank alone."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(4)
    random.seed(int(state[0]))
    np.random.seed(state[1])
    torch.manual_seed(int(state[2]) << 32 | int(state[3]))


@contextmanager
def _random_states_kept() -> Iterator[None]:
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
            if not model.parts_are_sharded:
                model.save_pretrained(folder)
            processor.save_pretrained(folder)
    return folder


def trim_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line that a killed process half wrote
    hidden = path.with_name(f".{path.name}.partial")
    hidden.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(hidden, path)
