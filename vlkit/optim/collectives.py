"""Gradients in, parameters out: what every rank does with all elements of a bucket, chunk by chunk.

    reduce_scatter    whole local gradients -> averaged gradients of what this rank holds
    all_gather        parameters, up to date where held -> up to date everywhere

A chunk is the same stretch of elements on every rank, so that the buffers stay small.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vlkit.optim.partition import Bucket, Run

CHUNK_BYTES = 2**26  # of the buffer with the elements of all ranks


def reduce_scatter(
    grads: Sequence[Tensor | None], bucket: Bucket, factor: float, group: dist.ProcessGroup
) -> list[Tensor]:
    """The mean of all ranks' gradients, of the elements that this rank holds.

    Args:
        grads: Of the bucket's parameters, contiguous; None counts as zeros.
        bucket: Who holds what.
        factor: Of this rank's gradients, before they are summed.
        group: All ranks.

    Returns:
        For each parameter, what this rank holds, 1-D; fp32, or fp64 for fp64 parameters.
    """
    dtype = torch.promote_types(bucket.parameters[0].dtype, torch.float32)
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = torch.empty(bucket.longest, dtype=dtype, device=bucket.parameters[0].device)
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    for first, last in _chunks(bucket.longest, num_ranks * dtype.itemsize):
        buffer = torch.zeros(num_ranks, last - first, dtype=dtype, device=mine.device)
        for row, runs in zip(buffer, bucket.runs, strict=True):
            for run, start, stop, place in _within(runs, first, last):
                grad = grads[run.parameter]
                if grad is not None:
                    row[place : place + stop - start].copy_(grad.view(-1)[start:stop])
        if factor != 1.0:
            buffer.mul_(factor)
        scatter(mine[first:last], buffer.view(-1), op=dist.ReduceOp.AVG, group=group)
    counts = [bucket.count(index, rank) for index in range(len(bucket.parameters))]
    return list(mine[: sum(counts)].split(counts))


def all_gather(flat: Sequence[Tensor], bucket: Bucket, group: dist.ProcessGroup) -> None:
    """Bring all parameters up to date with what other ranks hold of them.

    Args:
        flat: The bucket's parameters, flat; written to.
        bucket: Who holds what.
        group: All ranks.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    for first, last in _chunks(bucket.longest, num_ranks * flat[0].element_size()):
        sent = flat[0].new_zeros(last - first)
        for run, start, stop, place in _within(bucket.runs[rank], first, last):
            sent[place : place + stop - start].copy_(flat[run.parameter][start:stop])
        buffer = sent.new_empty(num_ranks, last - first)
        gather(buffer.view(-1), sent, group=group)
        for other, (row, runs) in enumerate(zip(buffer, bucket.runs, strict=True)):
            if other != rank:
                for run, start, stop, place in _within(runs, first, last):
                    flat[run.parameter][start:stop].copy_(row[place : place + stop - start])


def _chunks(length: int, bytes_per_element: int) -> Iterator[tuple[int, int]]:
    size = max(1, CHUNK_BYTES // bytes_per_element)
    return ((first, min(first + size, length)) for first in range(0, length, size))


def _within(runs: Sequence[Run], first: int, last: int) -> Iterator[tuple[Run, int, int, int]]:
    """The parts of runs at positions `first` to `last`: (run, start and stop in the parameter, place in the chunk)."""
    for run in runs[max(0, bisect_right(runs, first, key=lambda run: run.position) - 1) :]:
        begin = max(run.position, first)
        end = min(run.position + run.stop - run.start, last)
        if run.position >= last:
            return
        if begin < end:
            shift = run.start - run.position
            yield run, begin + shift, end + shift, begin - first
