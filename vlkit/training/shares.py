"""What one rank holds and sends, for each way of sharing a model: bytes, from the partitions that training itself uses.

    model on meta, groups of the optimizer, ranks -> whole(...)      every rank has everything (one rank, or no sharding)
                                                  -> zero1(...)      the optimizer's state is divided
                                                  -> fsdp(...)       weights, gradients and state are divided

Bytes sent are those of ring algorithms, in which a rank sends as much as it receives: of a buffer of B bytes for N ranks,
(N - 1) / N B in an all-gather or a reduce-scatter, twice that in an all-reduce. Where ranks differ, the numbers are those of
the rank with the most.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from vlkit.layers.moe import Experts
from vlkit.models.vlm import VisionLanguageModel
from vlkit.optim.collectives import CHUNK_BYTES
from vlkit.optim.newton_schulz import NewtonSchulz
from vlkit.optim.partition import Range, Split, deal_spans, holding_of
from vlkit.optim.units import Span, spans_of, units_of
from vlkit.training.cost import count_products
from vlkit.training.recompute import blocks_of, num_elements

WIDE = 4  # bytes of an element in fp32: optimizer state, averaged gradients
Holders: TypeAlias = dict[int, tuple[Range, ...]]  # of one parameter: the ranges of the ranks that have some
TRAVEL = 2  # bytes of an element of a matrix that several ranks share, on its way to who orthogonalises it: bf16


@dataclass(frozen=True, kw_only=True)
class Shares:
    """One rank's part.

    Attributes:
        weights: Bytes of parameters.
        gradients: Bytes of their gradients.
        state: Bytes of the optimizer's state.
        gathered: Bytes of weights, and of gradients not yet averaged, of the groups that exist whole at one moment.
        buffers: Bytes that the optimizer's step needs besides.
        sent_per_micro_batch: Bytes sent in every forward and backward, by what for.
        sent_per_step: Bytes sent once per step, by what for.
        orthogonalisation: Operations of Newton-Schulz of one step.
        orthogonalisation_of_all: The sum over all ranks.
        shared_matrices: Matrices that more than one rank holds.
    """

    weights: int = 0
    gradients: int = 0
    state: int = 0
    gathered: int = 0
    buffers: int = 0
    sent_per_micro_batch: dict[str, int] = field(default_factory=dict)
    sent_per_step: dict[str, int] = field(default_factory=dict)
    orthogonalisation: int = 0
    orthogonalisation_of_all: int = 0
    shared_matrices: int = 0


def whole(groups: Sequence[dict[str, Any]], model: nn.Module, ranks: int) -> Shares:
    """Every rank has everything; gradients are averaged in their own dtype by an all-reduce."""
    gradients = sum(p.numel() * p.element_size() for group in groups for p in group["params"])
    state, work = 0, 0
    for group in groups:
        muon = group["algorithm"] == "muon"
        state += sum((WIDE if muon else 2 * WIDE) * p.numel() + (0 if muon else WIDE) for p in group["params"])
        work += sum(_work(span) for p in group["params"] for span in spans_of(units_of(p))) if muon else 0
    return Shares(
        weights=_bytes(model.parameters()),
        gradients=gradients,
        state=state,
        sent_per_step={"all-reduce of gradients": 2 * gradients * (ranks - 1) // ranks} if ranks > 1 else {},
        orthogonalisation=work,
        orthogonalisation_of_all=work * ranks,
    )


def zero1(
    groups: Sequence[dict[str, Any]],
    model: nn.Module,
    ranks: int,
    *,
    partition: Literal["flat", "matrix"] = "flat",
) -> Shares:
    """Every rank has all weights and gradients, and its part of the optimizer's state (ZeRO-1).

    Per step: gradients are averaged and scattered in fp32, (N - 1) S 4 bytes; matrices that several ranks share go to who
    orthogonalises them and back, in bf16; updated parameters are gathered, (N - 1) S bytes of their dtype. S is the number
    of elements of the rank with the most, ceil(P / N) for the flat partition.
    """
    state = averaged = in_transit = scattered = gathered = shared = 0
    work, exchanged = [0] * ranks, [0] * ranks
    for (algorithm, dtype), parameters in _buckets(groups).items():
        muon = algorithm == "muon"
        spans = [spans_of(units_of(p)) if muon else [] for p in parameters]
        if muon and partition == "matrix":
            held = [{rank: own for rank, own in enumerate(each) if own} for each in deal_spans(spans, ranks)]
        else:
            held = flat_holders([p.numel() for p in parameters], ranks)
        most = _longest(held)
        state += most * (WIDE if muon else 2 * WIDE) + (0 if muon else WIDE * len(parameters))
        averaged += most * WIDE
        # A chunk of what comes from all ranks, and of what goes to them; one bucket after another.
        in_transit = max(in_transit, min(CHUNK_BYTES, ranks * most * WIDE))
        scattered += (ranks - 1) * most * WIDE
        gathered += (ranks - 1) * most * dtype.itemsize
        for holders, mine in zip(held, spans, strict=True):
            shared += _deal_work(holders, mine, work, exchanged)
    gradients = sum(p.numel() * p.element_size() for group in groups for p in group["params"])
    return Shares(
        weights=_bytes(model.parameters()),
        gradients=gradients,
        state=state,
        buffers=averaged + in_transit,
        sent_per_step={
            "reduce-scatter of gradients": scattered,
            "matrices that several ranks share": max(exchanged),
            "all-gather of parameters": gathered,
        },
        orthogonalisation=max(work),
        orthogonalisation_of_all=sum(work),
        shared_matrices=shared,
    )


def fsdp(
    groups: Sequence[dict[str, Any]],
    model: VisionLanguageModel,
    ranks: int,
    *,
    replicate: int = 1,
    expert_parallel: int = 1,
    compute_bytes: int | None = None,
) -> Shares:
    """Weights, gradients and state are divided (FSDP2), as `vlkit.training.sharding.shard_model` does it.

    Every parameter is cut along its first axis in chunks of ceil(rows / shards) rows; what is missing at the end is filled up, in
    memory and on the wire, so a rank holds more than 1 / N where N does not divide the rows: 64 stacked experts over 1,024 ranks
    are 64 chunks and 960 empty ones. A group (a block, or the root with embedding and head) is gathered in the forward, and
    again in the backward, but for the root, which stays; its gradients are scattered in fp32 once. With copies (HSDP) each rank's
    share of the gradients is then averaged over the copies.

    Args:
        groups: Of the optimizer.
        model: On meta.
        ranks: In all.
        replicate: Copies of the sharded model.
        expert_parallel: Ranks over which the experts of a layer are spread.
        compute_bytes: Of an element while it is gathered; None is that of the parameters.
    """
    shards = ranks // replicate
    chunk: dict[Tensor, int] = {}  # elements that every rank has memory for
    root = largest = weights = gradients = sent_twice = sent_once = scattered = averaged = 0
    for parts, others, is_root in _gathered_together(model, expert_parallel):
        over = shards // expert_parallel if others else shards
        together = unreduced = 0
        for p in parts:
            rows = -(-p.shape[0] // expert_parallel) if others else p.shape[0]
            chunk[p] = -(-rows // over) * (p.numel() // max(p.shape[0], 1))
            width = compute_bytes or p.element_size()
            weights += chunk[p] * p.element_size()
            together += over * chunk[p] * width
            once = (over - 1) * chunk[p] * width
            sent_once += once
            sent_twice += 0 if is_root else once
            if p.requires_grad:
                gradients += chunk[p] * p.element_size()
                unreduced += over * chunk[p] * width
                scattered += (over - 1) * chunk[p] * max(WIDE, p.element_size())
                averaged += 2 * (replicate - 1) * chunk[p] * max(WIDE, p.element_size()) // replicate
        if is_root:
            root = together + unreduced
        else:
            # The one at work and the one that comes next; gradients of one, and once more in fp32 on their way.
            largest = max(largest, 2 * together + unreduced + unreduced * WIDE // (compute_bytes or WIDE))
    state, work, exchanged, shared = 0, [0] * shards, [0] * shards, 0
    spread = {id(p) for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
    for group in groups:
        muon = group["algorithm"] == "muon"
        state += sum((WIDE if muon else 2 * WIDE) * chunk[p] + (0 if muon else WIDE) for p in group["params"])
        for p in sorted(group["params"], key=lambda p: -p.numel()) if muon else ():
            parallel = expert_parallel if id(p) in spread else 1
            shared += _cut_work(p, shards, parallel, work, exchanged)
    sent = {
        "all-gather of weights": sent_once + sent_twice,
        "reduce-scatter of gradients": scattered,
    }
    if replicate > 1:
        sent["all-reduce of gradients between copies"] = averaged
    return Shares(
        weights=weights,
        gradients=gradients,
        state=state,
        gathered=root + largest if ranks > 1 else 0,
        sent_per_micro_batch=sent,
        sent_per_step={"matrices that several ranks share": max(exchanged)},
        orthogonalisation=max(work),
        orthogonalisation_of_all=sum(work) * replicate,
        shared_matrices=shared,
    )


# ---- parts ----------------------------------------------------------------------------------------------------------


def _gathered_together(model: VisionLanguageModel, expert_parallel: int) -> list[tuple[list[nn.Parameter], bool, bool]]:
    """Groups of `shard_model`, as (parameters, whether they are spread experts, whether it is the root)."""
    spread = [m for m in model.modules() if isinstance(m, Experts)] if expert_parallel > 1 else []
    tower = blocks_of(model.vision)
    modules: list[nn.Module] = [*spread, *tower, *blocks_of(model.llm)]
    if not tower:
        modules.append(model.vision)
    if num_elements(model.projector) >= max(map(num_elements, tower), default=0):
        modules.append(model.projector)
    modules.append(model)
    claimed: set[nn.Parameter] = set()
    found = []
    for index, module in enumerate(modules):
        parts = [p for p in module.parameters() if p not in claimed]
        claimed.update(parts)
        found.append((parts, index < len(spread), module is model))
    return found


def flat_holders(sizes: Sequence[int], ranks: int) -> list[Holders]:
    """What `deal_flat` deals out, without the ranks that get nothing: there may be a million."""
    size, first = -(-sum(sizes) // ranks), 0
    found: list[Holders] = []
    for count in sizes:
        last = -(-(first + count) // size) if count else 0
        found.append(
            {
                rank: ((max(0, rank * size - first), min(count, (rank + 1) * size - first)),)
                for rank in range(first // size if count else 0, last)
            }
        )
        first += count
    return found


def _deal_work(held: Holders, spans: Sequence[Span], work: list[int], exchanged: list[int]) -> int:
    """Add the work on a parameter's matrices, and the bytes that they travel, to the ranks' sums; returns how many travel."""
    holders = list(held)
    few = tuple(held.values())
    splits = [split for split, _, _ in holding_of(few, 0, spans).split] if len(holders) > 1 else []
    travelling = {split.span.start for split in splits}
    for split in splits:
        for worker in split.workers:
            work[holders[worker]] += _work(split.span)
        _travel(split, holders, exchanged)
    bounds = sorted((start, rank) for rank in holders for start, _ in held[rank])
    starts = [start for start, _ in bounds]
    for span in spans:
        if span.start not in travelling:
            work[bounds[bisect_right(starts, span.start) - 1][1]] += _work(span)
    return len(splits)


def _travel(split: Split, holders: Sequence[int], exchanged: list[int]) -> None:
    """Every share to the workers that do not have it; from a lone worker the results back."""
    for share in split.shares:
        exchanged[holders[share.rank]] += TRAVEL * share.numel * sum(worker != share.rank for worker in split.workers)
        if share.rank not in split.workers:
            exchanged[holders[split.workers[0]]] += TRAVEL * share.numel


def _cut_work(parameter: Tensor, shards: int, parallel: int, work: list[int], exchanged: list[int]) -> int:
    """The same for a parameter whose first axis is cut: a stack of matrices is not cut inside of one."""
    spans = spans_of(units_of(parameter))
    rows, over = -(-parameter.shape[0] // parallel), shards // parallel
    step = -(-rows // over)
    if parameter.ndim == 3:
        for rank in range(-(-rows // step)):  # beyond, ranks have nothing
            mine = spans[rank * step : min((rank + 1) * step, rows)]
            for copy in range(parallel):
                work[rank * parallel + copy] += sum(map(_work, mine))
        return 0
    columns = parameter.numel() // parameter.shape[0]
    holders = -(-rows // step)
    for span in spans if holders > 1 else ():
        first, last = span.start // columns // step, (span.stop - 1) // columns // step
        busy = work[first : last + 1]
        worker = first + busy.index(min(busy))
        work[worker] += _work(span)
        for rank in range(first, last + 1):
            size = min(span.stop, (rank + 1) * step * columns) - max(span.start, rank * step * columns)
            if rank != worker:
                exchanged[rank] += TRAVEL * size
                exchanged[worker] += TRAVEL * size
    if holders == 1:
        work[0] += sum(map(_work, spans))
    return len(spans) if holders > 1 else 0


def _work(span: Span) -> int:
    return sum(unit.count * _newton_schulz(unit.rows, unit.cols) for unit in span.units)


@lru_cache(maxsize=4096)
def _newton_schulz(rows: int, cols: int) -> int:
    """Operations on one matrix, as on a GPU; CPUs leave out 3/8 of those symmetric products that are large."""
    return count_products(lambda: NewtonSchulz.make()(torch.empty(1, rows, cols, device="meta")))


def _buckets(groups: Sequence[dict[str, Any]]) -> dict[tuple[str, torch.dtype], list[Tensor]]:
    """Parameters that are dealt out together: of one algorithm and one dtype."""
    found: dict[tuple[str, torch.dtype], list[Tensor]] = {}
    for group in groups:
        for parameter in group["params"]:
            found.setdefault((group["algorithm"], parameter.dtype), []).append(parameter)
    return found


def _longest(held: Sequence[Holders]) -> int:
    """Elements of the rank with the most."""
    elements: Counter[int] = Counter()
    for holders in held:
        for rank, ranges in holders.items():
            elements[rank] += sum(stop - start for start, stop in ranges)
    return max(elements.values(), default=0)


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
