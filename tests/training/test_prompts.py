"""Draws of prompts: from easy to hard, and by failure; both go on after a restart as if never stopped."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest

from vlkit.errors import ConfigError, SampleError
from vlkit.training.order import Draws
from vlkit.training.prompts import CurriculumDraws, PrioritisedDraws, SuccessRates, difficulties


def indices(draws: Draws, count: int, progress: float) -> list[int]:
    return [draws.next(progress).index for _ in range(count)]


def test_a_curriculum_opens_from_easy_to_hard() -> None:
    levels = [5.0, 1.0, math.inf, 3.0, 2.0, 4.0, 0.0, 6.0, 7.0, 8.0]
    draws = CurriculumDraws([levels], start=0.2, until=0.5)
    assert [draws.open(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == [2, 6, 10, 10]
    assert indices(draws, 4, 0.0) == [6, 1, 6, 1]
    assert indices(draws, 8, 0.25) == [4, 3, 5, 0, 4, 3, 5, 0]
    drawn = Counter(indices(draws, 8, 0.6))
    assert drawn == {7: 2, 8: 2, 9: 2, 2: 2}
    assert CurriculumDraws([levels], start=0.0, until=0.0).open(0.0) == 10


def test_equal_difficulties_come_in_an_order_of_the_seed_and_every_draw_in_an_epoch_of_its_own() -> None:
    orders = [indices(CurriculumDraws([[1.0] * 9], start=1.0, seed=seed), 9, 0.0) for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(9))
    assert orders[0] == orders[1] != orders[2]
    draws = CurriculumDraws([[1.0], [0.0]], start=1.0)
    found = [draws.next(0.5) for _ in range(4)]
    assert [(draw.stream, draw.index, draw.epoch, draw.progress) for draw in found] == [
        (1, 0, 0, 0.5),
        (0, 0, 0, 0.5),
        (1, 0, 1, 0.5),
        (0, 0, 1, 0.5),
    ]


def test_draws_follow_the_failures() -> None:
    """1 - rate is 1, 3/4, 1/2 and 0; 4000 draws have deviations below 0.008."""
    rates = SuccessRates()
    for index, right in ((1, 1), (2, 2), (3, 4)):
        for attempt in range(4):
            rates.count(f"0/{index}", attempt < right)
    draws = PrioritisedDraws([4], rates, seed=5)
    drawn = Counter(indices(draws, 4000, 0.0))
    for index, weight in enumerate((1.0, 0.75, 0.5, 0.0)):
        assert drawn[index] / 4000 == pytest.approx(weight / 2.25, abs=0.03)
    rates.load_state_dict({"counts": {f"0/{index}": [1, 1] for index in range(4)}})
    assert set(indices(draws, 60, 0.0)) == {0, 1, 2, 3}


def test_draws_go_on_from_their_state() -> None:
    def pair() -> list[Any]:
        rates = SuccessRates()
        return [CurriculumDraws([[3.0, 1.0], [2.0]]), PrioritisedDraws([2, 3], rates, seed=1), rates]

    whole, second = pair(), pair()
    for draws in whole[:2]:
        indices(draws, 7, 0.4)
    whole[2].count("0/1", True)
    for before, after in zip(whole, second, strict=True):
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for before, after in zip(whole[:2], second[:2], strict=True):
        assert [before.next(0.9) for _ in range(9)] == [after.next(0.9) for _ in range(9)]
    assert (whole[1].needs_outcome, whole[0].needs_outcome) == (True, False)
    assert second[2].rate("0/1") == 1.0


def test_difficulties_of_a_source() -> None:
    class Source:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 1:
                raise SampleError("broken")
            return {"difficulty": 0.5} if index else {}

    assert difficulties(Source()) == [math.inf, math.inf, 0.5]


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="no samples"):
        PrioritisedDraws([], SuccessRates())
    with pytest.raises(ConfigError, match="NaN"):
        CurriculumDraws([[float("nan")]])
    with pytest.raises(ConfigError, match="start lies between 0 and 1, found 2"):
        CurriculumDraws([[1.0]], start=2)
    with pytest.raises(ConfigError, match="of 1 samples, the data has 2"):
        CurriculumDraws([[1.0, 2.0]]).load_state_dict({"drawn": [0]})
