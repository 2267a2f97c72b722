"""Task: what a step of a run minimises, from samples to a loss; the loop knows nothing else of an objective.

    sample --prepare (threads)--> Item --begin (all ranks: rollouts, reference log-probs)--> updates of Items
           --totals--> summed over packs and ranks --> packs --loss--> backward

Everything is a sum: the losses that `loss` gives for all packs of all ranks add up to the loss of the step, because each is
divided by totals of the whole step and never by what one pack happens to hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from vlkit.models import VisionLanguageModel
from vlkit.packing import Batch
from vlkit.processing import Processor

if TYPE_CHECKING:
    from vlkit.training.config import TrainConfig
    from vlkit.training.ranks import Ranks


class Draw(Protocol):
    """How a sample was drawn, as far as preparing it goes.

    Attributes:
        rng: Of the seed, the stream, the sample and the epoch alone: neither of ranks nor of threads.
        progress: Of the stage, from 0 to 1.
    """

    @property
    def rng(self) -> np.random.Generator: ...
    @property
    def progress(self) -> float: ...


class Item(NamedTuple):
    """What one sample became.

    Attributes:
        batch: Its sequence, or its sequences: a pair has two.
        extra: What else the task has to know of it; values of the host.
    """

    batch: Batch
    extra: Mapping[str, Any] = {}

    @property
    def num_tokens(self) -> int:
        return self.batch.ids.layout.num_tokens

    @property
    def num_patches(self) -> int:
        return 0 if self.batch.patches is None else self.batch.patches.layout.num_tokens


Figures = dict[str, "Tensor | float"]
"""Sums by name, of one pack."""


class Task(Protocol):
    """What a step minimises. A task is made as Task(options, setup).

    Attributes:
        modules: What trains besides the model; None for most.
        one_pack: All items of a rank go into one forward; else they are packed by the budget.
        resets_optimizer: Every step begins with a fresh state of the optimizer.
        lack: What a step has that teaches nothing, for messages: "no supervised token".
        remedy: What to look at then, if the step's samples could be used.
    """

    modules: nn.Module | None
    one_pack: bool
    resets_optimizer: bool
    lack: str
    remedy: str

    def prepare(self, sample: dict[str, Any], draw: Draw) -> Item:
        """The sample as tensors. Runs in threads, and depends on its arguments alone.

        Raises:
            VlkitError: The sample cannot be used; the caller adds its file and line.
        """
        ...

    def measure(self, sample: dict[str, Any], draw: Draw) -> tuple[int, int]:
        """Tokens and patches of what `prepare` gives for equal arguments, without decoding an image."""
        ...

    def begin(self, items: list[Item], seed: int) -> tuple[list[list[Item]], dict[str, float]]:
        """Collective. What the step learns from, once all its samples of this rank are there.

        Args:
            items: Of this rank; none where it has nothing.
            seed: Of the run's seed and the step: the same on every rank.

        Returns:
            The items of every update of the step, as many updates on every rank; most tasks give [items]. And figures, which
            are already those of all ranks.
        """
        ...

    def totals(self, items: list[Item]) -> dict[str, float]:
        """This rank's part of what the losses of an update are divided by: the same keys on every rank, also without items.

        An update in which all totals are 0 teaches nothing and is skipped.
        """
        ...

    def loss(
        self, model: VisionLanguageModel, items: list[Item], batch: Batch, totals: Mapping[str, float]
    ) -> tuple[Tensor, Figures]:
        """The pack's part of the update's loss; calls `model` once, on all of the batch.

        Args:
            model: In training mode.
            items: Of one pack. None: another rank has a pack more than this one, the batch is a blank one, and the loss is 0
                with gradients of 0 for every parameter.
            batch: Of all the items, on the device.
            totals: Of all packs and ranks.

        Returns:
            Its sum over packs and ranks is the loss. Figures are sums too; one named as a total is divided by that.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs, as JSON; equal on all ranks."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Setup:
    """What a task is made with.

    Attributes:
        model: That trains.
        processor: Of the model.
        config: Of the stage.
        ranks: That run it.
        reference: Gives the frozen model that the stage began with; the first call builds it, on all ranks together.
        verifiers: Functions that judge answers, by name.
    """

    model: VisionLanguageModel
    processor: Processor
    config: TrainConfig
    ranks: Ranks
    reference: Callable[[], VisionLanguageModel]
    verifiers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
