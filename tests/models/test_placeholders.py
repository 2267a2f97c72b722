"""Positions in time, row and column, against tables worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlkit.models.placeholders import grid_positions
from vlkit.packing import Layout

# 3 words, a mark, a 2x3 image, a mark, 2 words, a mark, a video of 4 steps of 2x2, a mark, 3 words.
TEXT = Layout((34,))
VISUAL = Layout.from_grids([(1, 2, 3), (4, 2, 2)])
ROWS = [4, 14]
BEFORE = [[p] * 3 for p in range(4)]
IMAGE = [[4, r, c] for r in (4, 5) for c in (4, 5, 6)]
BETWEEN = [[p] * 3 for p in (7, 8, 9, 10)]


def video(times: list[int]) -> list[list[int]]:
    return [[t, r, c] for t in times for r in (11, 12) for c in (11, 12)]


@pytest.mark.parametrize(
    ("rule", "ticks", "times", "after"),
    [
        ("original", None, [11, 12, 13, 14], [15, 16, 17, 18]),
        ("transformers-5", None, [11, 12, 13, 14], [13, 14, 15, 16]),
        ("original", [0.0, 2.0], [11, 13, 15, 17], [18, 19, 20, 21]),
        ("transformers-5", [0.0, 2.0], [11, 13, 15, 17], [13, 14, 15, 16]),
        (
            "original",
            [0.0, 0.75],
            [11, 11, 12, 13],
            [14, 15, 16, 17],
        ),  # 0, 0.75, 1.5, 2.25: the product is rounded down
    ],
)
def test_positions_of_an_image_and_a_video(
    rule: str, ticks: list[float] | None, times: list[int], after: list[int]
) -> None:
    want = BEFORE + IMAGE + BETWEEN + video(times) + [[p] * 3 for p in after]
    assert grid_positions(TEXT, ROWS, VISUAL, ticks=ticks, rule=rule).tolist() == want  # type: ignore[arg-type]


def test_the_longer_side_of_an_image_counts() -> None:
    """After a tall image and after a wide one the text goes on behind the longer side."""
    for grid in [(1, 5, 2), (1, 2, 5)]:
        made = grid_positions(Layout((12,)), [1], Layout.from_grids([grid]))
        assert made[11].tolist() == [6, 6, 6]


def test_sequences_count_alone_and_go_on_where_they_are_told() -> None:
    visual = Layout.from_grids([(1, 2, 2), (1, 1, 3)])
    together = grid_positions(Layout((5, 3, 4)), [1, 9], visual)
    first = grid_positions(Layout((5,)), [1], Layout.from_grids([(1, 2, 2)]))
    last = grid_positions(Layout((4,)), [1], Layout.from_grids([(1, 1, 3)]))
    assert torch.equal(together, torch.cat([first, torch.arange(3)[:, None].expand(3, 3), last]))
    moved = grid_positions(Layout((5, 3, 4)), [1, 9], visual, starts=[10, 0, 7])
    assert torch.equal(moved[:5], first + 10)
    assert torch.equal(moved[5:8], together[5:8])
    assert torch.equal(moved[8:], last + 7)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), max_size=4), st.integers(0, 3))
def test_no_position_comes_twice(grids: list[tuple[int, int, int]], gap: int) -> None:
    """Under the original rule every token has a place of its own, and what follows is higher on every axis."""
    rows, tokens = [], gap
    for t, h, w in grids:
        rows.append(tokens)
        tokens += t * h * w + gap
    made = grid_positions(Layout((tokens,)) if tokens else Layout(()), rows, Layout.from_grids(grids))
    places = [tuple(place) for place in made.tolist()]
    assert len(set(places)) == len(places)
    ends = [*rows[1:], tokens][: len(rows)]
    for (t, h, w), row, end in zip(grids, rows, ends, strict=True):
        if row + t * h * w < end:
            assert int(made[row : row + t * h * w].max()) + 1 == int(made[row + t * h * w, 0])
