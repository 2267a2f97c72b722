"""Samples into packs of a budget."""

from __future__ import annotations

import itertools
import json
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlkit.errors import ConfigError
from vlkit.training.packs import Fill, StreamingPacker, fewest_packs, pack, pack_items

COSTS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), max_size=30)
BUDGET = st.one_of(st.none(), st.integers(1, 50))


def over(costs: list[tuple[int, int]], tokens: int | None, patches: int | None, items: int | None = None) -> bool:
    """Whether a pack exceeds a budget."""
    return (
        (tokens is not None and sum(cost[0] for cost in costs) > tokens)
        or (patches is not None and sum(cost[1] for cost in costs) > patches)
        or (items is not None and len(costs) > items)
    )


@settings(max_examples=150, deadline=None)
@given(COSTS, BUDGET, BUDGET, BUDGET, st.sampled_from(["first-fit", "best-fit"]))
def test_no_pack_exceeds_a_budget_and_every_sample_is_in_one(
    costs: list[tuple[int, int]], tokens: int | None, patches: int | None, items: int | None, method: Any
) -> None:
    packs = pack(costs, tokens=tokens, patches=patches, items=items, method=method)
    assert sorted(itertools.chain(*packs)) == list(range(len(costs)))
    assert all(numbers == sorted(numbers) for numbers in packs)
    assert packs == sorted(packs)
    for numbers in packs:
        assert len(numbers) == 1 or not over([costs[i] for i in numbers], tokens, patches, items)
    assert len(packs) >= fewest_packs(costs, tokens=tokens, patches=patches, items=items)


def fewest_of_all(lengths: list[int], budget: int) -> int:
    """The fewest packs, by trying all ways."""
    best = len(lengths)

    def place(rest: list[int], rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if not rest:
            best = len(rooms)
            return
        for i, room in enumerate(rooms):
            if room >= rest[0] and room not in rooms[:i]:
                place(rest[1:], [*rooms[:i], room - rest[0], *rooms[i + 1 :]])
        place(rest[1:], [*rooms, budget - rest[0]])

    place(sorted(lengths, reverse=True), [])
    return best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_few_samples_need_hardly_more_packs_than_the_fewest(lengths: list[int]) -> None:
    """First-fit decreasing: at most 11/9 of the fewest and 6/9 (Dosa 2007); so does best-fit decreasing (Johnson 1974)."""
    costs = [(length, 0) for length in lengths]
    fewest = fewest_of_all(lengths, 20)
    assert fewest_packs(costs, tokens=20) <= fewest
    for method in ("first-fit", "best-fit"):
        assert fewest <= len(pack(costs, tokens=20, method=method)) <= 11 / 9 * fewest + 6 / 9  # type: ignore[arg-type]


def test_samples_of_a_realistic_mix_need_no_more_packs_than_their_sum() -> None:
    """4,000 log-normal lengths; benchmarks/packing.py has 20,000."""
    lengths = np.random.default_rng(0).lognormal(6.5, 1.0, 4000).astype(int).clip(1, 8192)
    costs = [(int(length), 0) for length in lengths]
    bound = fewest_packs(costs, tokens=8192)
    assert bound == -(-int(lengths.sum()) // 8192)
    assert len(pack(costs, tokens=8192)) == len(pack(costs, tokens=8192, method="best-fit")) == bound


def test_first_fit_and_best_fit_choose_as_their_names_say() -> None:
    costs = [(6, 0), (5, 0), (4, 0), (3, 0)]  # of 10: 6+4 and 5+3 by both
    assert pack(costs, tokens=10) == [[0, 2], [1, 3]]
    costs = [(6, 0), (7, 0), (3, 0)]  # 3 fits beside 7 and, sorted later, beside 6
    assert pack(costs, tokens=10, method="best-fit") == [[0], [1, 2]]
    costs = [(70, 0), (60, 0), (35, 0), (28, 0), (5, 0)]
    assert pack(costs, tokens=100) == [[0, 3], [1, 2, 4]] == pack(costs, tokens=100, method="best-fit")
    costs = [(70, 0), (65, 0), (29, 0), (34, 0), (1, 0)]  # both rows have one token left
    assert pack(costs, tokens=100) == [[0, 2, 4], [1, 3]]
    costs = [(70, 0), (66, 0), (34, 0), (25, 0), (5, 0), (3, 0)]
    assert pack(costs, tokens=104, method="first-fit") == [[0, 2], [1, 3, 4, 5]]


def test_without_a_budget_all_are_together_and_with_a_number_neighbours_are() -> None:
    costs = [(3, 1), (9, 0), (3, 2), (4, 0), (1, 1)]
    assert pack(costs) == [[0, 1, 2, 3, 4]]
    assert pack(costs, items=2) == [[0, 1], [2, 3], [4]]
    assert pack([], tokens=5) == pack([]) == []


def test_a_sample_over_the_budget_goes_alone() -> None:
    assert pack([(2, 0), (11, 0), (2, 0), (1, 6)], tokens=10, patches=5) == [[0, 2], [1], [3]]
    packer: StreamingPacker[str] = StreamingPacker(10, 5)
    assert packer.add("a", 2) == []
    assert packer.add("long", 11) == [["long"]]
    assert packer.add("large", 1, 6) == [["large"]]
    assert packer.add("b", 8) == [["a", "b"]]


def test_patches_limit_a_pack_as_tokens_do() -> None:
    assert pack([(1, 4), (1, 4), (1, 2), (1, 0)], tokens=100, patches=6) == [[0, 2, 3], [1]]


@pytest.mark.parametrize("budget", [{"tokens": 0}, {"patches": -1}, {"items": 0}])
def test_a_budget_of_nothing_is_refused(budget: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        pack([(1, 1)], **budget)


@settings(max_examples=150, deadline=None)
@given(COSTS, st.integers(1, 50), BUDGET, st.integers(1, 4), st.integers(1, 30), st.integers(0, 30))
def test_packs_of_a_stream_lose_nothing_and_keep_the_budget(
    costs: list[tuple[int, int]], tokens: int, patches: int | None, open_rows: int, patience: int, saved_at: int
) -> None:
    """And they are the same when the state is written and read on the way."""

    def new() -> StreamingPacker[int]:
        return StreamingPacker(tokens, patches, open_rows=open_rows, patience=patience)

    packer, other = new(), new()
    packs: list[list[int]] = []
    for key, (length, seen) in enumerate(costs):
        if key == saved_at:
            state = json.loads(json.dumps(packer.state_dict()))
            packer = new()
            packer.load_state_dict(state)
        packs += (found := packer.add(key, length, seen))
        assert found == other.add(key, length, seen)
        assert len(packer.state_dict()["rows"]) <= open_rows
    packs += packer.flush()
    assert sorted(itertools.chain(*packs)) == list(range(len(costs)))
    for keys in packs:
        assert keys == sorted(keys)
        assert len(keys) == 1 or not over([costs[i] for i in keys], tokens, patches)
    assert packer.fill == Fill.of([[costs[i] for i in keys] for keys in packs], tokens=tokens, patches=patches)


def test_no_sample_of_a_stream_waits_for_ever() -> None:
    """Nothing fits beside the first, and all that come later are fuller."""
    packer: StreamingPacker[int] = StreamingPacker(100, open_rows=3, patience=20)
    packs = []
    for key, tokens in enumerate([51] + [60] * 40):
        packs += packer.add(key, tokens)
        state = packer.state_dict()
        packer = StreamingPacker(100, open_rows=3, patience=20)
        packer.load_state_dict(state)
    assert packs.index([0]) + 4 == 22  # of 3 rows that wait; it is gone with the sample after its 20th
    assert packs[:3] == [[1], [2], [3]]


def test_a_stream_goes_where_it_leaves_the_least_room_and_the_fullest_row_leaves() -> None:
    packer: StreamingPacker[str] = StreamingPacker(10, open_rows=2)
    assert packer.add("a", 6) == []
    assert packer.add("b", 7) == []
    assert packer.add("c", 2) == []  # beside b, where one token stays free
    assert packer.add("d", 9) == [["b", "c"]]  # three rows: of the two with one free token the older leaves
    assert packer.add("e", 1) == [["d", "e"]]  # full
    assert packer.flush() == [["a"]]
    assert packer.flush() == []


def test_room_is_what_is_left_of_both_budgets() -> None:
    """Beside b three tokens and three patches stay free; beside a fourteen tokens, but no patch: a is the fuller one."""
    packer: StreamingPacker[str] = StreamingPacker(20, 10, open_rows=2)
    assert packer.add("a", 5, 9) == packer.add("b", 16, 6) == packer.add("c", 1, 1) == []
    assert [row["keys"] for row in packer.state_dict()["rows"]] == [["a", "c"], ["b"]]
    assert packer.add("d", 19, 0) == [["a", "c"]]  # and leaves first
    costs = [(60, 60), (10, 90), (10, 10)]  # the last is placed last; the second has no patch left with it
    assert pack(costs, tokens=100, patches=100) == [[0, 2], [1]]
    assert pack(costs, tokens=100, patches=100, method="best-fit") == [[0], [1, 2]]


def test_what_is_saved_does_not_change_with_the_packer() -> None:
    packer: StreamingPacker[int] = StreamingPacker(10)
    packer.add(0, 3)
    state = packer.state_dict()
    packer.add(1, 3)
    assert state["rows"] == [{"keys": [0], "tokens": 3, "patches": 0, "begun": 1}]
    assert state["samples"] == 1
    with pytest.raises(ConfigError, match="filled for 10 tokens and None patches, and now the budget is 12 and None"):
        StreamingPacker(12).load_state_dict(state)


def test_fill_is_tokens_over_the_budget_of_all_packs() -> None:
    fill = Fill.of([[(3, 4), (2, 0)], [(4, 1)]], tokens=6, patches=5).plus(Fill.of([[(6, 0)]], tokens=6, patches=5))
    assert fill == (3, 4, 15, 5, 18, 15)
    assert (fill.token_fill, fill.patch_fill) == (15 / 18, 5 / 15)
    assert Fill.of([[(3, 4)]]).token_fill is None


def test_fewest_packs_counts_what_is_over_the_budget_apart() -> None:
    assert fewest_packs([(11, 0), (2, 0), (2, 0)], tokens=10) == 2
    assert fewest_packs([(1, 6), (1, 6), (1, 6)], tokens=10, patches=12) == 2
    assert fewest_packs([(1, 0)] * 5, items=2) == 3
    assert (fewest_packs([], tokens=3), fewest_packs([(3, 3)])) == (0, 1)


class Thing(NamedTuple):
    index: int
    num_tokens: int
    num_patches: int


def test_items_are_together_in_forwards_of_a_budget() -> None:
    things = [Thing(i, tokens, patches) for i, (tokens, patches) in enumerate([(3, 0), (9, 4), (3, 4), (4, 0)])]

    def numbers(**budget: int) -> list[list[int]]:
        return [[thing.index for thing in together] for together in pack_items(things, **budget)]

    assert numbers() == [[0, 1, 2, 3]]
    assert numbers(most=3) == [[0, 1, 2], [3]]
    assert numbers(tokens=8) == [[0, 3], [1], [2]]
    assert numbers(patches=4) == [[0, 1, 3], [2]]
