"""DTensor parameters, as fully_shard makes them: what this rank holds, and with whom it shares units.

    mesh, placements, spans  -> Holding, and the group of the ranks that share its units

Never an operation on a DTensor: it would gather whole matrices, and would not give the bits of one device. Only local
tensors are computed with, and units that several ranks hold travel as vlkit.optim.exchange says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlkit.errors import ConfigError
from vlkit.optim.partition import Holding, Place, Share, Split, joined_units, work_of
from vlkit.optim.parts import is_dtensor
from vlkit.optim.units import Span, Units, cut_of

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; a plain tensor itself."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def like_parameter(local: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds of a tensor as a DTensor with the mesh, placements and shape of a parameter."""
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def axes_of(parameter: Any) -> dict[int, int]:
    """Mesh axis -> axis of the tensor that it cuts; mesh axes of one rank cut nothing.

    Raises:
        ConfigError: Ranks hold partial sums.
    """
    found = {}
    for axis, placement in enumerate(parameter.placements):
        if placement.is_partial():
            raise ConfigError(f"ranks hold partial sums ({parameter.placements}): an optimizer needs whole gradients")
        if not placement.is_replicate() and parameter.device_mesh.size(axis) > 1:
            found[axis] = placement.dim % parameter.ndim
    return found


def first_element(parameter: Any) -> int:
    """Of what this rank holds, the first element in the whole parameter, for one that is cut along its first axis or not at
    all; 0 for a plain tensor.
    """
    if not is_dtensor(parameter):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return int(offsets[0]) * math.prod(parameter.shape[1:])


def copies_of(parameter: Any) -> int:
    """How many ranks of the mesh hold the same elements."""
    mesh: DeviceMesh = parameter.device_mesh
    return math.prod(mesh.size(axis) for axis in range(mesh.ndim) if parameter.placements[axis].is_replicate())


def holdings_of(
    parameters: Sequence[Tensor], spans: Sequence[Sequence[Span]], names: Sequence[str]
) -> list[tuple[Holding, dist.ProcessGroup | None]]:
    """What this rank holds of each parameter, and the ranks that it shares units with.

    Stacks of matrices cut along the stack are whole matrices, however many mesh axes cut them; rows or columns may be cut
    by one mesh axis. Every shared span is worked on by one of its ranks, so that the work on all ranks is alike.

    Args:
        parameters: DTensors, with equal layouts on all ranks.
        spans: Of each; none for AdamW.
        names: For messages.

    Raises:
        ConfigError: Rows or columns are cut by two mesh axes, as tensor parallelism does, or ranks hold partial sums.
    """
    found = [_holding(*each) for each in zip(parameters, spans, names, strict=True)]
    load: dict[tuple[int, int], int] = {}  # (group, rank in it) -> work
    shared: list[tuple[int, int, int]] = []  # (work, parameter, index of its split)
    for i, (holding, group) in enumerate(found):
        for j, (split, _, _) in enumerate(holding.split):
            if len(split.shares) > 1:
                shared.append((work_of(split.span), i, j))
            else:
                key = (id(group), split.shares[0].rank)
                load[key] = load.get(key, 0) + work_of(split.span)
    workers: list[dict[int, int]] = [{} for _ in found]
    for work, i, j in sorted(shared, key=lambda item: (-item[0], *item[1:])):
        holding, group = found[i]
        keys = [(id(group), share.rank) for share in holding.split[j][0].shares]
        best = min(keys, key=lambda key: (load.get(key, 0), key[1]))
        load[best] = load.get(best, 0) + work
        workers[i][j] = best[1]
    return [(_with_workers(holding, mine), group) for (holding, group), mine in zip(found, workers, strict=True)]


def _with_workers(holding: Holding, workers: dict[int, int]) -> Holding:
    """Of the spans, those that one rank holds are whole there."""
    whole, split = list(holding.whole), []
    for j, (some, place, size) in enumerate(holding.split):
        if j in workers:
            split.append((replace(some, workers=(workers[j],)), place, size))
        elif place is not None:
            whole += [(unit, place) for unit in some.span.units]
    return Holding(holding.ranges, tuple(joined_units(whole)), tuple(split))


def _holding(parameter: Any, spans: Sequence[Span], name: str) -> tuple[Holding, dist.ProcessGroup | None]:
    """Every span that is cut along rows or columns is a Split here, also where one rank holds all of it."""
    try:
        axes = axes_of(parameter)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    local = local_of(parameter)
    ranges = ((0, local.numel()),) if local.numel() else ()
    if not spans:
        return Holding(ranges), None
    shape = tuple(parameter.shape)
    stacked = len(shape) == 3 and not cut_of(parameter, name).flatten
    inner = {axis: dim - stacked for axis, dim in axes.items() if dim >= stacked}  # 0 cuts rows, 1 columns
    if len(inner) > 1 or any(dim > 1 for dim in inner.values()):
        raise ConfigError(
            f"{name} {shape} lies on its mesh as {parameter.placements}: Muon takes matrices whose rows or columns are cut "
            f"by one mesh axis, as fully_shard does; give tensor-parallel matrices to algorithm='adamw'"
        )
    rows, cols = shape[stacked], math.prod(shape[stacked + 1 :])
    count = local.shape[0] if stacked else 1
    of_one = [span for span in spans if span.start < rows * cols]  # every matrix of a stack is cut alike
    if not inner:
        whole: list[tuple[Units, Place]] = [
            (unit, Place(first + span.start, first + span.start))
            for first in range(0, count * rows * cols, rows * cols)
            for span in of_one
            for unit in span.units
        ]
        return Holding(ranges, tuple(joined_units(whole))), None
    ((axis, dim),) = inner.items()
    mesh: DeviceMesh = parameter.device_mesh
    scale = 1 if dim == 0 else cols // shape[stacked + 1]
    bounds = [(a * scale, b * scale) for a, b in _chunks(shape[stacked + dim], mesh.size(axis))]
    rank = mesh.get_local_rank(axis)
    here = bounds[rank][1] - bounds[rank][0]
    split: list[tuple[Split, Place | None, int]] = []
    for matrix in range(count):
        for span in of_one:
            first, last = span.start // cols, span.stop // cols
            shares = []
            for holder, (low, high) in enumerate(bounds):
                if dim == 0 and max(first, low) < min(last, high):
                    length = min(last, high) - max(first, low)
                    shares.append(Share(holder, (max(first, low) - first) * cols, (length * cols,), (1,)))
                elif dim == 1 and low < high:
                    shares.append(Share(holder, low, (last - first, high - low), (cols, 1)))
            mine = next((share for share in shares if share.rank == rank), None)
            place = None
            if mine is not None:
                at = (
                    (matrix * here + max(first, bounds[rank][0]) - bounds[rank][0]) * cols
                    if dim == 0
                    else (matrix * rows + first) * here
                )
                place = Place(at, at)
            split.append((Split(span, tuple(shares), ()), place, mine.numel if mine else 0))
    return Holding(ranges, (), tuple(split)), mesh.get_group(axis)


def _chunks(length: int, num_ranks: int) -> list[tuple[int, int]]:
    """As torch.chunk, with empty chunks at the end."""
    size = -(-length // num_ranks)
    return [(min(rank * size, length), min((rank + 1) * size, length)) for rank in range(num_ranks)]
