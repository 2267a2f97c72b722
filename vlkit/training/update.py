"""The gradients of one update: packs one after another, with totals of all packs and ranks known before the first.

    totals of this rank --sum over ranks--> totals
    packs, as many forwards on every rank --task.loss--> parts of the loss, which add up --backward--> gradients

The ranks' gradients are averaged later, so each part is scaled by the number of ranks.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlkit.errors import RankError
from vlkit.layers.moe import Router
from vlkit.models import VisionLanguageModel
from vlkit.models.vlm import Output
from vlkit.objectives.cross_entropy import IGNORE
from vlkit.optim.agree import gather_json
from vlkit.packing import Batch, Layout, Packed
from vlkit.training.config import TrainConfig
from vlkit.training.ranks import Ranks
from vlkit.training.tasks.task import Item, Task

Packs = Sequence[Sequence[Item]]


@dataclass
class Sums:
    """What the packs of this rank came to.

    Attributes:
        loss: This rank's part of the loss.
        totals: Of all packs and ranks.
        figures: Of this rank, not divided yet.
        load: Tokens that every expert of every layer got here; None for dense decoders.
    """

    loss: Tensor
    totals: dict[str, float]
    figures: dict[str, Tensor | float] = field(default_factory=dict)
    load: Tensor | None = None

    def all_figures(self, ranks: Ranks) -> dict[str, float]:
        """Collective. The figures of all ranks; those that are named as a total are divided by it."""
        found: dict[str, float] = {}
        for own in gather_json({name: float(value) for name, value in self.figures.items()}, ranks.group):
            for name, value in own.items():
                found[name] = found.get(name, 0.0) + value
        return {name: value / (self.totals.get(name, 1.0) or 1.0) for name, value in found.items()}


def all_totals(task: Task, packs: Packs, ranks: Ranks) -> tuple[dict[str, float], int]:
    """Collective. What the losses of an update are divided by, and the forwards that every rank runs.

    Raises:
        RankError: The task names other totals on another rank.
    """
    own = task.totals([item for items in packs for item in items])
    names = sorted(own)
    told = ranks.gather(len(packs), zlib.crc32(json.dumps(names).encode()))
    if len({number for _, number in told}) > 1:
        raise RankError(f"the objective counts {', '.join(names)} here, and other totals on another rank")
    sums = ranks.sum(torch.tensor([own[name] for name in names], dtype=torch.float64))
    return dict(zip(names, sums.tolist(), strict=True)), max(1, *(count for count, _ in told))


def backward(
    model: VisionLanguageModel,
    task: Task,
    packs: Packs,
    totals: dict[str, float],
    ranks: Ranks,
    *,
    num_forwards: int,
    around: Callable[[], AbstractContextManager[Any]],
) -> Sums:
    """Add up the gradients of all packs of this rank.

    Args:
        packs: Of this rank.
        num_forwards: On every rank: one with fewer packs runs blank ones, so that all exchange alike.
        around: A context for every forward.
    """
    sums = Sums(torch.zeros((), dtype=torch.float64, device=ranks.device), totals)
    with _counting(model, sums) as count:
        for place in range(num_forwards):
            items = list(packs[place]) if place < len(packs) else []
            batch = Batch.concat([item.batch for item in items]) if items else blank_batch(model)
            count[0] = bool(items)
            with around():
                loss, figures = task.loss(model, items, batch.to(ranks.device), totals)
            (loss * ranks.size).backward()
            sums.loss = sums.loss + loss.detach().double()
            for name, value in figures.items():
                sums.figures[name] = sums.figures.get(name, 0.0) + _number(value)
    return sums


def _number(value: Tensor | float) -> Tensor | float:
    return value.detach().double() if isinstance(value, Tensor) else value


@contextmanager
def _counting(model: VisionLanguageModel, sums: Sums) -> Iterator[list[bool]]:
    """Add the experts' tokens of every forward to the sums, while the one entry of the list is true."""
    count = [False]

    def add(_module: Any, _inputs: Any, output: Output) -> None:
        load = output.expert_load if count[0] else None
        if load is not None:
            sums.load = load if sums.load is None else sums.load + load

    routers = [module for module in model.modules() if isinstance(module, Router)]
    if routers:  # a rank without a pack has counts of zero
        shape = len(routers), routers[0].weight.shape[0]
        sums.load = torch.zeros(shape, dtype=torch.int64, device=sums.loss.device)
    handle = model.register_forward_hook(add)
    try:
        yield count
    finally:
        handle.remove()


def autocast(config: TrainConfig, device: torch.device, sharded: bool) -> AbstractContextManager[Any]:
    """Products in the compute dtype, where that is not the parameters'; a sharded model sees to it itself."""
    if config.compute_dtype in (None, config.dtype) or sharded:
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, config.compute_dtype))


def blank_batch(model: VisionLanguageModel) -> Batch:
    """Two tokens without a label: every parameter gets a gradient of zero."""
    visual = {model.config.image_token_id, model.config.video_token_id}
    plain = next(token for token in range(4) if token not in visual)
    return Batch(Packed(torch.full((2,), plain), Layout((2,))), labels=torch.full((2,), IGNORE))
