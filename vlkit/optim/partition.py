"""Who holds which elements: a pure function of shapes and the number of ranks, the same on every rank.

    sizes, spans of units, ranks  -> held ranges of every parameter, rank by rank
    held ranges, spans, one rank  -> Holding: whole units, and spans that several ranks share

A range is (start, stop) in the elements of a parameter, row-major. A rank keeps its ranges one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from vlkit.optim.units import Span, Units

Range: TypeAlias = tuple[int, int]
Held: TypeAlias = tuple[tuple[Range, ...], ...]  # of one parameter: the ranges of every rank, in rising order
SplitStrategy: TypeAlias = Literal["auto", "duplicate", "owner"]

SLACK = 1.25  # most elements of a rank over their mean, where whole units are dealt out and fit


# ----------------------------------------------------------------------------------------------------------------------
# Dealing out elements


def deal_flat(sizes: Sequence[int], num_ranks: int) -> list[Held]:
    """Parameters one after another, cut in equal slices: rank k has elements [k S, (k + 1) S) of all P, S = ceil(P / N).

    Args:
        sizes: Elements of every parameter.
        num_ranks: N.

    Returns:
        What every rank holds of each parameter: one range, or none.
    """
    size = -(-sum(sizes) // num_ranks)
    held: list[Held] = []
    first = 0
    for count in sizes:
        bounds = [(max(0, rank * size - first), min(count, (rank + 1) * size - first)) for rank in range(num_ranks)]
        held.append(tuple(((start, stop),) if start < stop else () for start, stop in bounds))
        first += count
    return held


def deal_spans(spans: Sequence[Sequence[Span]], num_ranks: int) -> list[Held]:
    """Every unit to one rank: in falling order of work, each to the rank with the least work that has room for it.

    Work is that of the orthogonalisation. A rank has room while it would hold at most 1.25 times the mean number of
    elements; where no rank has room, the one with the fewest elements takes the unit.

    Args:
        spans: Of every parameter.
        num_ranks: N.

    Returns:
        What every rank holds of each parameter; ranges that touch are one range.
    """
    items = [(work_of(span), index, span) for index, mine in enumerate(spans) for span in mine]
    most = SLACK * sum(span.stop - span.start for _, _, span in items) / num_ranks
    work, elements = [0] * num_ranks, [0] * num_ranks
    ranges: list[list[list[Range]]] = [[[] for _ in range(num_ranks)] for _ in spans]
    for cost, index, span in sorted(items, key=lambda item: (-item[0], item[1], item[2].start)):
        size = span.stop - span.start
        room = [rank for rank in range(num_ranks) if elements[rank] + size <= most]
        rank = min(room, key=work.__getitem__) if room else min(range(num_ranks), key=elements.__getitem__)
        work[rank] += cost
        elements[rank] += size
        ranges[index][rank].append((span.start, span.stop))
    return [tuple(_joined(sorted(mine)) for mine in per_rank) for per_rank in ranges]


def work_of(span: Span) -> int:
    """Of the orthogonalisation: long side times the square of the short side, over its units."""
    return sum(unit.rows * unit.cols * min(unit.rows, unit.cols) for unit in span.units)


def _joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    joined: list[Range] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


class Run(NamedTuple):
    """Elements of a parameter that a rank holds without a gap.

    Attributes:
        parameter: Its place in the bucket.
        start: First element in the parameter.
        stop: The one after the last.
        position: Of the first among all elements of the rank in this bucket.
    """

    parameter: int
    start: int
    stop: int
    position: int


@dataclass(frozen=True)
class Bucket:
    """Parameters whose elements are dealt out to ranks together; a rank's elements lie one after another.

    Attributes:
        parameters: Of one device, dtype and algorithm, in the order of the groups.
        held: Of each.
        runs: What every rank holds, in order.
    """

    parameters: tuple[Tensor, ...]
    held: tuple[Held, ...]
    runs: tuple[tuple[Run, ...], ...]

    @classmethod
    def of(cls, parameters: Sequence[Tensor], held: Sequence[Held]) -> Bucket:
        runs = []
        for rank in range(len(held[0])):
            mine, position = [], 0
            for index, of_all in enumerate(held):
                for start, stop in of_all[rank]:
                    mine.append(Run(index, start, stop, position))
                    position += stop - start
            runs.append(tuple(mine))
        return cls(tuple(parameters), tuple(held), tuple(runs))

    def count(self, index: int, rank: int) -> int:
        """Elements that a rank holds of a parameter."""
        return sum(stop - start for start, stop in self.held[index][rank])

    @property
    def longest(self) -> int:
        """Elements of the rank with the most."""
        return max((run.position + run.stop - run.start for runs in self.runs for run in runs[-1:]), default=0)


# ----------------------------------------------------------------------------------------------------------------------
# What one rank holds


class Share(NamedTuple):
    """What one rank holds of a span: a view of the span's elements.

    Attributes:
        rank: Who, in the group that shares the span.
        offset: First element, counted from the start of the span.
        sizes: Of the view.
        strides: Of the view.
    """

    rank: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.sizes:
            count *= size
        return count

    def of(self, tensor: Tensor) -> Tensor:
        """The share in a 1-D tensor that has all of the span."""
        return tensor.as_strided(self.sizes, self.strides, tensor.storage_offset() + self.offset)


@dataclass(frozen=True)
class Split:
    """A span that several ranks share; the same on all of them.

    Attributes:
        span: Its length and units.
        shares: Of every rank that has some, in rising order of rank.
        workers: The ranks that orthogonalise it.
    """

    span: Span
    shares: tuple[Share, ...]
    workers: tuple[int, ...]

    @property
    def numel(self) -> int:
        return self.span.stop - self.span.start


class Place(NamedTuple):
    """Where something lies, in the flattened parameter and in what this rank keeps of it.

    They differ only where a rank keeps less than the whole; for DTensors both count in the local tensor.
    """

    at: int
    local: int


@dataclass(frozen=True)
class Holding:
    """What one rank holds of a parameter.

    Attributes:
        ranges: In the flattened parameter (for DTensors, in its local tensor).
        whole: Units that this rank has all of, with offsets from 0, and where they are.
        split: Spans that several ranks share, with the place of this rank's share and its elements; None where it has
            no share.
    """

    ranges: tuple[Range, ...]
    whole: tuple[tuple[Units, Place], ...] = ()
    split: tuple[tuple[Split, Place | None, int], ...] = ()

    @property
    def numel(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


def holding_of(held: Held, rank: int, spans: Sequence[Span], strategy: SplitStrategy = "auto") -> Holding:
    """What a rank holds of a parameter, span by span.

    Args:
        held: Ranges of all ranks.
        rank: This one.
        spans: Of the parameter; none for AdamW.
        strategy: Who orthogonalises a span that several ranks share. "duplicate": all of them. "owner": the one with the
            most of it. "auto": both where they are two, else the owner.
    """
    mine, local = [], 0
    for start, stop in held[rank]:
        mine.append((start, stop, local))
        local += stop - start
    whole: list[tuple[Units, Place]] = []
    split: list[tuple[Split, Place | None, int]] = []
    for span in spans:
        shares = tuple(
            Share(holder, max(lo, span.start) - span.start, (min(hi, span.stop) - max(lo, span.start),), (1,))
            for holder, theirs in enumerate(held)
            for lo, hi in theirs
            if lo < span.stop and span.start < hi
        )
        place, size = None, 0
        for lo, hi, at in mine:
            if lo < span.stop and span.start < hi:
                first = max(lo, span.start)
                place, size = Place(first, at + first - lo), min(hi, span.stop) - first
        if len(shares) > 1:
            split.append((Split(span, shares, _workers(shares, strategy)), place, size))
        elif place is not None:
            whole += [(unit, place) for unit in span.units]
    return Holding(held[rank], tuple(joined_units(whole)), tuple(split))


def _workers(shares: Sequence[Share], strategy: SplitStrategy) -> tuple[int, ...]:
    if strategy == "duplicate" or (strategy == "auto" and len(shares) == 2):
        return tuple(share.rank for share in shares)
    return (max(shares, key=lambda share: (share.numel, -share.rank)).rank,)


def joined_units(found: Sequence[tuple[Units, Place]]) -> list[tuple[Units, Place]]:
    """Equal matrices one step apart as one view, as in a stack of experts; offsets move into the place."""
    joined: list[tuple[Units, Place]] = []
    for unit, (at, local) in found:
        new, place = replace(unit, offset=0), Place(at + unit.offset, local + unit.offset)
        if joined:
            last, before = joined[-1]
            step = place.at - before.at - (last.count - 1) * last.strides[0]
            same = (new.rows, new.cols, new.strides[1:]) == (last.rows, last.cols, last.strides[1:])
            together = place.local - before.local == place.at - before.at
            if new.count == 1 and same and together and step > 0 and (last.count == 1 or step == last.strides[0]):
                joined[-1] = (replace(last, count=last.count + 1, strides=(step, *last.strides[1:])), before)
                continue
        joined.append((new, place))
    return joined
