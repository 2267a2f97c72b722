"""Every element has one rank, and every rank knows the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.optim.over_ranks import MATRICES, declare, plain
from vlkit.optim.partition import Held, SplitStrategy, deal_flat, deal_spans, holding_of, work_of
from vlkit.optim.units import Span, spans_of, units_of


def all_spans() -> list[list[Span]]:
    params = plain()
    declare(params)
    return [spans_of(units_of(param)) for param in params[: len(MATRICES)]]


def painted(held: Held, numel: int) -> Tensor:
    """The rank of every element."""
    found = torch.full((numel,), -1)
    for rank, ranges in enumerate(held):
        for start, stop in ranges:
            assert found[start:stop].eq(-1).all()
            found[start:stop] = rank
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 100])
def test_flat_slices_are_those_of_chunk(num_ranks: int) -> None:
    """As a 1-D DTensor of all elements would be cut, so that torch.distributed.checkpoint can say it."""
    sizes = [7, 1, 30, 4]
    expected = torch.cat([torch.full((len(chunk),), i) for i, chunk in enumerate(torch.arange(42).chunk(num_ranks))])
    held = deal_flat(sizes, num_ranks)
    found = torch.cat([painted(ranges, size) for ranges, size in zip(held, sizes, strict=True)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_whole_units_have_one_rank(num_ranks: int) -> None:
    for held, spans in zip(deal_spans(all_spans(), num_ranks), all_spans(), strict=True):
        ranks = painted(held, spans[-1].stop)
        for span in spans:
            assert len(set(ranks[span.start : span.stop].tolist())) == 1
        for ranges in held:  # ranges that touch are one
            assert all(before[1] < after[0] for before, after in pairwise(ranges))


def test_whole_units_share_work_and_memory() -> None:
    """Five mixed matrices that other schemes leave to one rank by 0.41 of all; and many equal ones."""
    matrices = [torch.zeros(shape) for shape in [(64, 64)] * 40 + [(128, 64)] * 9 + [(16, 700)] * 5]
    spans = [spans_of(units_of(matrix)) for matrix in matrices]
    held = deal_spans(spans, 4)
    elements, work = [0] * 4, [0] * 4
    for ranges, mine in zip(held, spans, strict=True):
        for rank in range(4):
            for start, stop in ranges[rank]:
                elements[rank] += stop - start
                work[rank] += sum(work_of(span) for span in mine if start <= span.start < stop)
    assert max(elements) <= 1.25 * sum(elements) / 4
    assert max(work) <= 1.15 * sum(work) / 4


@pytest.mark.parametrize("strategy", ["auto", "duplicate", "owner"])
@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_shares_cover_a_span_and_places_point_at_them(num_ranks: int, strategy: SplitStrategy) -> None:
    spans = all_spans()
    held = deal_flat([mine[-1].stop for mine in spans], num_ranks)
    for ranges, mine in zip(held, spans, strict=True):
        numel = mine[-1].stop
        elements = torch.arange(numel)
        covered = torch.zeros(numel, dtype=torch.int64)
        seen = {}
        for rank in range(num_ranks):
            holding = holding_of(ranges, rank, mine, strategy)
            kept = torch.cat([elements[:0], *(elements[start:stop] for start, stop in holding.ranges)])
            assert holding.numel == len(kept)
            for units, (at, local) in holding.whole:
                assert torch.equal(units.view(elements[at:]), units.view(kept[local:]))
                covered[units.view(elements[at:]).flatten()] += 1
            for split, place, size in holding.split:
                assert seen.setdefault(split.span.start, split) == split  # the same on all ranks
                assert set(split.workers) <= {share.rank for share in split.shares}
                assert len(split.workers) == (1 if strategy == "owner" else len(split.workers))
                share = next((share for share in split.shares if share.rank == rank), None)
                assert (share is None) == (place is None)
                if share is not None and place is not None:
                    own = share.of(elements[split.span.start : split.span.stop])
                    assert torch.equal(own, elements[place.at : place.at + size])
                    assert torch.equal(own, kept[place.local : place.local + size])
                    covered[own] += 1
        assert covered.eq(1).all()
