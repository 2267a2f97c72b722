"""What one rank holds of a tensor, said as boxes: where each begins in the whole tensor, and how long it is on every axis.

    whole tensor                          one box
    DTensor                               one box, or none
    Part: runs of the flattened tensor    a few boxes for each run: rest of a row, whole rows, beginning of a row

Boxes are what torch.distributed.checkpoint and vlkit.training.sharded_files store, so every kind can be read as any other.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Range: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """A block of a tensor.

    Attributes:
        offsets: Its first index on every axis.
        sizes: Its length on every axis.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def overlap(self, other: Box) -> Box | None:
        """The block that both have, or None."""
        starts = tuple(map(max, self.offsets, other.offsets))
        stops = (
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None

    def of(self, tensor: Tensor, origin: Box) -> Tensor:
        """This block of a tensor that holds `origin`, as a view."""
        return tensor[
            tuple(
                slice(start - first, start - first + size)
                for start, first, size in zip(self.offsets, origin.offsets, self.sizes, strict=True)
            )
        ]


def run_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes of elements `start` to `stop` of the flattened tensor, in order; at most two per axis."""
    if start >= stop:
        return []
    if len(shape) < 2:
        return [Box((start,), (stop - start,)) if shape else Box((), ())]
    inner = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, inner), divmod(stop, inner)

    def in_row(row: int, begin: int, end: int) -> list[Box]:
        return [Box((row, *box.offsets), (1, *box.sizes)) for box in run_boxes(shape[1:], begin, end)]

    if first == last:
        return in_row(first, head, tail)
    boxes = in_row(first, head, inner) if head else []
    begin = first + bool(head)
    if begin < last:
        boxes.append(Box((begin, *(0 for _ in shape[1:])), (last - begin, *shape[1:])))
    return boxes + in_row(last, 0, tail)


class Part(Tensor):
    """Runs of a flattened tensor, one after another in one vector; shares memory with what it is made from.

    For torch.distributed.checkpoint it is a shard of the flattened tensor: it is a tensor because shards are looked for in
    tensors only, and its size() is that of the whole because that is compared (torch 2.14). Computing with it gives plain
    tensors.

    Attributes:
        whole: Shape of the whole tensor.
        runs: (start, stop) of every run, in elements of the flattened whole.
    """

    whole: tuple[int, ...]
    runs: tuple[Range, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, local: Tensor, whole: Sequence[int], runs: Sequence[Range]) -> Part:
        length = sum(stop - start for start, stop in runs)
        assert local.shape == (length,), f"runs {runs} have {length} elements, found {tuple(local.shape)}"
        part = local.detach().as_subclass(cls)
        part.whole, part.runs = tuple(whole), tuple(runs)
        return part

    def size(self, dim: int | None = None) -> Any:
        """Of the flattened whole."""
        numel = math.prod(self.whole)
        return torch.Size([numel]) if dim is None else numel

    @property
    def local(self) -> Tensor:
        """What is held, 1-D, as a plain tensor."""
        return self.as_subclass(Tensor)

    def pieces(self) -> list[tuple[Box, Tensor]]:
        """Every box with its elements, as views."""
        boxes = [box for start, stop in self.runs for box in run_boxes(self.whole, start, stop)]
        views = self.local.split([box.numel for box in boxes]) if boxes else ()
        return [(box, view.view(box.sizes)) for box, view in zip(boxes, views, strict=True)]

    # Protocol of torch.distributed.checkpoint

    def __create_write_items__(self, fqn: str, _: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        if len(self.runs) > 1:
            # HuggingFaceStorageWriter would keep the last of them, without a word.
            raise ValueError(
                f"{fqn}: this rank holds {len(self.runs)} runs of it, and torch.distributed.checkpoint stores one per rank in "
                f"safetensors; save with vlkit.training.save_shards, or use partition='flat'"
            )
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size([start]), torch.Size([stop - start])) for start, stop in self.runs]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        first = 0
        for start, stop in self.runs:
            if start == index.offset[0]:
                return self.local[first : first + stop - start]
            first += stop - start
        raise ValueError(f"{index.fqn}: this rank holds {self.runs}, nothing at {tuple(index.offset)}")


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Of the tensor that all ranks hold together."""
    return tensor.whole if isinstance(tensor, Part) else tuple(tensor.shape)


def pieces_of(tensor: Tensor) -> list[tuple[Box, Tensor]]:
    """What this rank holds of a tensor: boxes, with their elements as views that share memory.

    Raises:
        ValueError: A DTensor whose ranks hold partial sums.
    """
    if isinstance(tensor, Part):
        return tensor.pieces()
    box, local = local_box(tensor), tensor.detach()
    if is_dtensor(local):
        local = local.to_local()
    return [(box, local)] if box.numel else []


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Without importing what only DTensors need."""
    return hasattr(tensor, "placements")


def local_box(tensor: Tensor) -> Box:
    """Where the local tensor of a DTensor lies in the whole; all of a plain tensor.

    Raises:
        ValueError: Its ranks hold partial sums.
    """
    if not is_dtensor(tensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"a DTensor of partial sums ({tensor.placements}) is not yet a tensor; redistribute it")
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Box(tuple(offsets), tuple(sizes))


def is_first_copy(tensor: Tensor, index: int, rank: int, num_ranks: int) -> bool:
    """Whether this rank is the one that stores what it holds: of what several ranks hold alike, one does.

    Args:
        index: Place of the tensor among all, to share the work out.
    """
    if isinstance(tensor, Part):
        return True
    if is_dtensor(tensor):
        coordinate = tensor.device_mesh.get_coordinate()
        return coordinate is not None and all(
            place == 0
            for place, placement in zip(coordinate, tensor.placements, strict=True)
            if placement.is_replicate()
        )
    return index % num_ranks == rank


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the numbers of a contiguous tensor on the CPU."""
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data) if tensor.numel() else 0
