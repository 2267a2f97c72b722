"""One stage of a run: the task, the optimizer and the reader that its config asks for, and the loop over its steps.

    step s:  Reader -> items of this rank -> task.begin -> updates
             each update:  totals of all ranks -> packs -> gradients -> Muon or AdamW -> selection bias of routers

The result depends on the config, not on the ranks: another number of them changes the order in which sums are rounded, and
nothing else. All randomness of a step is drawn from the seed, the step and the rank, so no random state has to be saved.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlkit.errors import NonFiniteError, RankError, SampleError
from vlkit.layers.moe import Router
from vlkit.models import VisionLanguageModel
from vlkit.objectives.balance import load_figures
from vlkit.optim import warmup_decay
from vlkit.optim.state import slots_of
from vlkit.processing import Processor
from vlkit.training.build import make_optimizer, make_reader, trained_parts
from vlkit.training.config import TrainConfig
from vlkit.training.experts import balance_experts
from vlkit.training.faults import Heartbeat, StopRequest
from vlkit.training.finite import finite_guard
from vlkit.training.metrics import Metrics
from vlkit.training.order import stage_seed
from vlkit.training.progress import Done, Progress
from vlkit.training.ranks import Ranks
from vlkit.training.reader import Reader, StepShare, pack_items
from vlkit.training.run_stages import Stage
from vlkit.training.tasks.task import Item, Setup
from vlkit.training.update import Sums, all_totals, autocast, backward

WATCHED = ("reward", "accuracy", "margin")
"""Figures of tasks that say more than their loss, and so stand in the line of a step."""


@dataclass(frozen=True)
class Surroundings:
    """What all stages of a run share.

    Attributes:
        total: Steps of all stages.
    """

    ranks: Ranks
    stop: StopRequest
    heartbeat: Heartbeat
    say: Callable[[str], object]
    metrics: Metrics | None
    processor: Processor
    verifiers: Mapping[str, Callable[..., Any]]
    total: int


class StageRun:
    """A stage, ready for its steps. The model is in its training mode and records the gradients that the stage asks for.

    Args:
        stage: Which.
        model: With the weights that it begins with.
        around: Of the run.
        progress: Of the run; counted up here.
        reference: Gives the frozen model that the stage began with.
    """

    def __init__(
        self,
        stage: Stage,
        model: VisionLanguageModel,
        around: Surroundings,
        progress: Progress,
        reference: Callable[[], VisionLanguageModel],
    ) -> None:
        self.stage, self.config, self.model, self.around, self.progress = stage, stage.config, model, around, progress
        self.ranks, self.heartbeat = around.ranks, around.heartbeat
        options, task = stage.config.task
        self.task = task(
            options, Setup(model, around.processor, self.config, around.ranks, reference, around.verifiers)
        )
        self.trained = trained_parts(model, self.task.modules, self.config, around.ranks)
        self.optimizer = make_optimizer(self.trained, self.config, around.ranks)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        routers = [module for module in model.modules() if isinstance(module, Router)]
        balanced = [m.bias is not None and m.weight.requires_grad for m in routers]
        self.balanced = torch.tensor(balanced, device=self.ranks.device)[:, None] if any(balanced) else None
        self.reader: Reader[Item] = make_reader(
            self.config, stage.sources, self.task, model, around.ranks, seed=stage_seed(self.config.seed, stage.number)
        )
        self.place = self.reader.state_dict()  # behind the last step that was done, not the last that was read
        self.loss: float | None = None

    def state(self) -> dict[str, Any]:
        """Beside weights and the optimizer's state, what the next step needs; equal on all ranks."""
        return {"reader": self.place, "task": self.task.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        old = {"draws": {"drawn": [self.progress.samples], "tokens": [0], "credit": [0.0]}}  # before there were readers
        self.reader.load_state_dict(state.get("reader", old))
        self.place = self.reader.state_dict()
        self.task.load_state_dict(state.get("task", {}))

    def steps(self, save: Callable[[StageRun], object]) -> bool:
        """Do the steps that are left.

        Args:
            save: Publishes a checkpoint of this.

        Returns:
            Whether somebody asked the run to stop.
        """
        progress, config = self.progress, self.config
        begun, counted = time.perf_counter(), 0
        with self.reader:
            while progress.stage_step < self.stage.steps:
                self.heartbeat.now(f"preparing step {progress.step + 1}")
                share, stopped = self.share()
                if stopped:
                    return True
                logged = (progress.step + 1) % config.log_every == 0 or progress.stage_step + 1 == self.stage.steps
                done, told = self.step(share, logged)
                self.place = self.reader.state_dict()
                self.loss, counted = done.loss, counted + done.tokens
                if logged:
                    seconds = time.perf_counter() - begun
                    self.log(done, counted / max(seconds, 1e-9), told)
                    begun, counted = time.perf_counter(), 0
                self.check_learning()
                every = config.checkpoints.every
                if every is not None and progress.step % every == 0 and progress.stage_step < self.stage.steps:
                    save(self)
        return False

    # A step

    def share(self) -> tuple[StepShare[Item], bool]:
        """Collective. This rank's samples of the next step, and whether the run is to stop before it."""
        share, failure = None, None
        step, steps = self.progress.stage_step, self.stage.steps
        try:
            share = self.reader.read(step / steps, (step + 1) / steps if step + 1 < steps else None)
        except Exception as error:
            failure = error
        self.heartbeat.now(f"waiting for the other ranks before step {self.progress.step + 1}")
        asked = int(self.around.stop.asked)
        counts = [0] * 4 if share is None else [share.plan, share.samples, share.corrupt, share.fill.tokens]
        told = self.ranks.gather(asked, int(failure is not None), *counts)
        if any(failed for _, failed, *_ in told):
            with self.ranks.together():
                if failure is not None:
                    raise failure
        assert share is not None
        stopped = any(asked for asked, *_ in told)
        plans, self.samples, self.corrupt, self.tokens = (list(each) for each in list(zip(*told, strict=True))[2:])
        if len(set(plans)) > 1:
            raise RankError(
                f"the ranks do not draw the same samples in step {self.progress.step + 1}; their files differ"
            )
        return share, stopped

    def step(self, share: StepShare[Item], logged: bool) -> tuple[Done, dict[str, Any]]:
        """Collective. Learn from the next step's samples; what is told of it, if it is."""
        config, ranks, progress = self.config, self.ranks, self.progress
        self.heartbeat.now(f"in step {progress.step + 1}")
        seed_all(config.seed, progress.step, ranks.rank)
        factor = learning_rate_factor(config, self.stage.steps, progress.stage_step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        if self.task.resets_optimizer:
            for slot in slots_of(self.optimizer):
                slot.tensor.zero_()
        items = share.items
        updates, begun = self.task.begin(items, step_seed(config.seed, progress.step))
        told: dict[str, Any] = {**begun, **self.fill(share)} if logged else {}
        losses, norm, skipped, taught, load = [], None, True, False, None
        for packs in [self.packs(update, share) for update in updates]:
            sums = self.update(packs)
            if sums is None:
                continue
            taught = True
            losses.append(float(ranks.sum(sums.loss)))
            norm = self.optimizer.last_grad_norm
            skipped = skipped and self.optimizer.last_step_skipped
            if logged:
                told |= sums.all_figures(ranks)
                if sums.load is not None:
                    load = sums.load if load is None else load + sums.load
        if logged:
            told |= {} if load is None else {"experts": self.expert_figures(load)}
        loss = sum(losses) / len(losses) if losses else float("nan")
        gradient = float("nan") if norm is None else float(norm)
        done = Done(loss, gradient, skipped, taught, sum(self.tokens), sum(self.samples), sum(self.corrupt))
        progress.count(done)
        return done, told

    def update(self, packs: list[list[Item]]) -> Sums | None:
        """Collective. One update of the weights; None where there is nothing to learn.

        Without gradients but zeros, decay and momentum would still move the weights.
        """
        totals, forwards = all_totals(self.task, packs, self.ranks)
        if not any(totals.values()):
            return None
        sums = self.gradients(packs, totals, forwards)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        rate, load = self.config.balance_rate, sums.load
        if self.balanced is not None and load is not None and rate and not self.optimizer.last_step_skipped:
            rule = self.config.balance_rule
            balance_experts(self.model, load * self.balanced, rate, rule=rule, group=self.ranks.group)
        return sums

    def gradients(self, packs: list[list[Item]], totals: dict[str, float], forwards: int) -> Sums:
        def around() -> AbstractContextManager[Any]:
            stack = ExitStack()
            stack.enter_context(autocast(self.config, self.ranks.device, self.model.parts_are_sharded))
            every = self.config.check_finite_every
            if every and self.progress.step % every == 0:
                stack.enter_context(finite_guard(self.model))
            return stack

        return backward(self.model, self.task, packs, totals, self.ranks, num_forwards=forwards, around=around)

    def packs(self, items: list[Item], share: StepShare[Item]) -> list[list[Item]]:
        """The forwards of an update: those of the reader where the items are as it gave them."""
        if self.task.one_pack:
            return [items] if items else []
        given = share.items
        if len(items) == len(given) and all(a is b for a, b in zip(items, given, strict=True)):
            return [list(pack) for pack in share.packs]
        config, data = self.config, self.config.data
        return pack_items(
            items,
            tokens=config.micro_batch_tokens or data.pack_tokens,
            patches=data.pack_patches,
            most=config.micro_batch,
        )

    def check_learning(self) -> None:
        """Stop a run that has not learnt anything for too many steps, or in all of them.

        Raises:
            SampleError: Some of these steps had nothing to learn.
            NonFiniteError: The gradients were not finite.
        """
        progress = self.progress
        row = progress.skipped_in_a_row
        if row <= self.config.max_skipped_steps and row < self.around.total:
            return
        if progress.untaught_in_a_row:
            reasons = []
            if progress.corrupt_in_a_row:
                reasons.append(self.reader.left_out or "data.corrupt and data.too_long = 'refuse' name the first")
            if progress.corrupt_in_a_row < progress.samples_in_a_row:
                reasons.append(self.task.remedy)
            raise SampleError(
                f"{progress.untaught_in_a_row} of the last {row} steps, up to step {progress.step}, had {self.task.lack}, and "
                f"none learnt anything; {progress.corrupt_in_a_row} of their {progress.samples_in_a_row} samples were left out: "
                f"{'; '.join(reasons)}"
            )
        raise NonFiniteError(
            f"{row} steps in a row had gradients that are not finite, the last is step {progress.step}; weights and state "
            "are those of the last good step. Lower the learning rate, compute in bfloat16 or float32, or look at the data"
        )

    # What is told

    def fill(self, share: StepShare[Item]) -> dict[str, float]:
        """Collective. How full the packs of all ranks are."""
        sums = [sum(each) for each in zip(*self.ranks.gather(*share.fill), strict=True)]
        fill = type(share.fill)(*sums)
        found = {"packs": fill.packs, "token_fill": fill.token_fill, "patch_fill": fill.patch_fill}
        return {name: value for name, value in found.items() if value is not None}

    def expert_figures(self, load: Tensor) -> dict[str, Any]:
        """Collective. How evenly the experts were used, and the largest violation of every layer."""
        load = self.ranks.sum(load)
        biases = [m.bias for m in self.model.modules() if isinstance(m, Router) and m.bias is not None]
        layers = [load_figures(layer).get("max_violation") for layer in load]
        return {**load_figures(load, biases), "max_violation_of_layers": layers}

    def rates(self) -> dict[str, float]:
        """The highest learning rate in every part of the model."""
        found: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            for name in group["param_names"]:
                part = name.split(".")[0]
                found[part] = max(found.get(part, 0.0), group["lr"])
        return found

    def streams(self) -> dict[str, dict[str, int]]:
        """Tokens that were drawn of every stream since the stage began, where there are several in given shares."""
        names = [stream.name for stream in self.config.data.streams]
        tokens = self.place["draws"].get("tokens")
        return {"stream_tokens": dict(zip(names, tokens, strict=True))} if len(names) > 1 and tokens else {}

    def log(self, done: Done, tokens_per_second: float, told: Mapping[str, Any]) -> None:
        progress, stage, rate = self.progress, self.stage, self.optimizer.param_groups[0]["lr"]
        if self.around.metrics is None:
            return
        line = f"step {progress.step}/{self.around.total}  "
        line += f"stage {stage.name} {progress.stage_step}/{stage.steps}  " if stage.name else ""
        line += f"loss {done.loss:.4f}  lr {rate:.2e}  {tokens_per_second:.0f} tokens/s  grad norm {done.grad_norm:.3g}"
        line += "".join(f"  {name} {told[name]:.3f}" for name in WATCHED if isinstance(told.get(name), float))
        line += f"  skipped {progress.skipped_steps}" if progress.skipped_steps else ""
        line += f"  corrupt {progress.corrupt_samples}" if progress.corrupt_samples else ""
        self.around.say(line)
        self.around.metrics.write(
            {
                **({"stage": stage.name} if stage.name else {}),
                "step": progress.step,
                "samples": progress.samples,
                "tokens": progress.tokens,
                "loss": done.loss,
                "lr": rate,
                "rates": self.rates(),
                "grad_norm": done.grad_norm,
                "tokens_per_second": tokens_per_second,
                "skipped_steps": progress.skipped_steps,
                "corrupt_samples": progress.corrupt_samples,
                **self.streams(),
                **told,
            }
        )


def learning_rate_factor(config: TrainConfig, total: int, step: int) -> float:
    """The factor on all learning rates in a step of a stage, counted from 0."""
    schedule = config.schedule
    warmup, decay = schedule.steps(total)
    return warmup_decay(step, total=total, warmup=warmup, decay=decay, shape=schedule.shape, final=schedule.final)


def seed_all(seed: int, step: int, rank: int) -> None:
    """Set the random states of Python, numpy and torch from the seed, the step and the rank alone."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(4)
    random.seed(int(state[0]))
    np.random.seed(state[1])
    torch.manual_seed(int(state[2]) << 32 | int(state[3]))


def step_seed(seed: int, step: int) -> int:
    """A seed for what a task draws in a step, the same on all ranks."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
