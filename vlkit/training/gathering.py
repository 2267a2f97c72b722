"""A sharded model as a whole again, one tensor at a time.

    gather_model(model)               -> names and whole tensors on rank 0, on the host; nothing on the others
    save_sharded(model, folder)       -> the folder that save_pretrained writes on one process, bit for bit

Rank 0 asks for a tensor, or for one row of a stack; the ranks that hold a part of it send theirs. So it has one tensor
whole at a time, whatever order it writes them in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vlkit.errors import NonFiniteWeightsError
from vlkit.hub.pretrained import refuse_non_finite
from vlkit.models.pretrained import save_pretrained
from vlkit.models.vlm import VisionLanguageModel
from vlkit.optim.agree import gather_json, raise_together, world
from vlkit.optim.parts import Box, is_dtensor, local_box

DONE = -1


def gather_model(model: nn.Module) -> dict[str, Tensor]:
    """Collective. All parameters and buffers of a model by name, on the host of rank 0; empty on the others."""
    with _asking(model) as ask:
        if ask is None:
            return {}
        named = dict(model.named_parameters()) | dict(model.named_buffers())
        return {name: ask(tensor, None).clone() for name, tensor in named.items()}


def save_sharded(
    model: VisionLanguageModel,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    manifest: bool = False,
    check_finite: bool | None = None,
) -> None:
    """Collective. Write a sharded model in its family's Hub layout, as `save_pretrained` does on one process.

    Rank 0 writes. Whatever fails there is raised on all ranks.

    Args:
        model: Sharded by `shard_model`.
        folder: Of rank 0's disk.
        max_shard_size: As in `save_pretrained`.
        manifest: As in `save_pretrained`.
        check_finite: As in `save_pretrained`; every rank looks at its shares.

    Raises:
        CheckpointError: As `save_pretrained`.
    """
    reshard(model)
    failure: Exception | None = None
    try:
        shares = {name: p.to_local() if is_dtensor(p) else p for name, p in model.named_parameters()}
        refuse_non_finite(shares, check_finite)
    except NonFiniteWeightsError as error:
        failure = error
    raise_together(failure, world())
    with _asking(model) as ask:
        if ask is not None:
            save_pretrained(
                model, Path(folder), max_shard_size=max_shard_size, manifest=manifest, check_finite=False, gather=ask
            )


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights, which a forward without a backward leaves with the root: parameters are DTensors again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def _asking(model: nn.Module) -> Iterator[Any]:
    """On rank 0 a function (tensor, row or None) -> all of it, on the host; on the others None, after rank 0 is done."""
    reshard(model)
    tensors = _Tensors(model)
    failure: Exception | None = None
    try:
        if tensors.rank == 0:
            yield tensors.ask
        else:
            tensors.answer()
            yield None
    except Exception as error:
        failure = error
    finally:
        if tensors.rank == 0:
            tensors.request(DONE, DONE)
    raise_together(failure, tensors.group)


class _Tensors:
    """The sharded tensors of a model, and which rank holds what of them."""

    def __init__(self, model: nn.Module) -> None:
        self.group = world()
        self.rank = dist.get_rank() if self.group is not None else 0
        self.sharded: list[Any] = [p for p in model.parameters() if is_dtensor(p)]
        self.index = {id(p): index for index, p in enumerate(self.sharded)}
        boxes = [local_box(p) for p in self.sharded]
        self.holders: list[dict[Box, int]] = [{} for _ in boxes]  # of each tensor: its boxes, each with its first rank
        for rank, theirs in enumerate(gather_json([(box.offsets, box.sizes) for box in boxes], self.group)):
            for found, (offsets, sizes) in zip(self.holders, theirs, strict=True):
                found.setdefault(Box(tuple(offsets), tuple(sizes)), rank)

    def ask(self, tensor: Tensor, row: int | None) -> Tensor:
        """On rank 0: all of a tensor, or one row of it."""
        index = self.index.get(id(tensor))
        if index is None:
            return (tensor if row is None else tensor[row]).detach().cpu()
        self.request(index, DONE if row is None else row)
        return self._meet(index, row)

    def answer(self) -> None:
        """On the others: send what rank 0 asks for, until it is done."""
        while True:
            index, row = self.request(DONE, DONE)
            if index == DONE:
                return
            self._meet(index, None if row == DONE else row)

    def request(self, index: int, row: int) -> list[int]:
        wanted = torch.tensor([index, row], device=self.sharded[0].device if self.sharded else "cpu")
        if self.group is not None:
            dist.broadcast(wanted, src=0, group=self.group)
        found: list[int] = wanted.tolist()
        return found

    def _meet(self, index: int, row: int | None) -> Tensor:
        tensor = self.sharded[index]
        asked = Box((0,) * tensor.ndim, tuple(tensor.shape))
        if row is not None:
            asked = Box((row, *asked.offsets[1:]), (1, *asked.sizes[1:]))
        whole = torch.empty(asked.sizes, dtype=tensor.dtype) if self.rank == 0 else torch.empty(0)
        mine, local = local_box(tensor), tensor.detach().to_local()
        for box, rank in self.holders[index].items():
            block = asked.overlap(box)
            if block is None:
                continue
            if rank == self.rank:
                part = block.of(local, mine)
                if rank == 0:
                    block.of(whole, asked).copy_(part)
                else:
                    dist.send(part.contiguous(), dst=0, group=self.group)
            elif self.rank == 0:
                part = torch.empty(block.sizes, dtype=tensor.dtype, device=local.device)
                dist.recv(part, src=rank, group=self.group)
                block.of(whole, asked).copy_(part)
        return whole if row is None or self.rank else whole[0]
