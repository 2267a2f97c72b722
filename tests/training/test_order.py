"""The endless order of a stream, and the random numbers of a draw."""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from vlkit.training.order import Draw, Order, order, stage_seed


def test_every_epoch_has_every_sample_once_in_another_order() -> None:
    first, second = order(13, range(13), seed=0), order(13, range(13, 26), seed=0)
    assert sorted(first) == sorted(second) == list(range(13))
    assert first != second
    assert first != order(13, range(13), seed=1)
    assert order(13, range(12, 15), seed=0) == [first[-1], *second[:2]]
    assert order(13, range(11, 15), seed=0, shuffle=False) == [11, 12, 0, 1]


def test_the_order_is_that_of_runs_begun_earlier() -> None:
    """Saved runs hold a position and no order: these permutations must never change."""
    assert order(9, range(12), seed=0) == [4, 5, 2, 6, 3, 8, 7, 0, 1, 1, 3, 6]
    permutation = np.random.Generator(np.random.PCG64([7, 2])).permutation(50)
    assert order(50, range(100, 150), seed=7) == permutation.tolist()


def test_streams_have_orders_of_their_own() -> None:
    orders = [[Order(13, seed=3, stream=stream).at(place)[0] for place in range(13)] for stream in range(3)]
    assert len({tuple(each) for each in orders}) == 3
    assert orders[0] == order(13, range(13), seed=3)


def test_positions_can_be_asked_in_any_order() -> None:
    sequence = Order(5, seed=0)
    forward = [sequence.at(position) for position in range(15)]
    assert [sequence.at(position) for position in reversed(range(15))] == forward[::-1]
    assert [epoch for _, epoch in forward] == [0] * 5 + [1] * 5 + [2] * 5


def test_random_numbers_depend_on_seed_stream_sample_and_epoch_alone() -> None:
    draw = Draw(stream=1, index=2, epoch=3, progress=0.25, seed=4)
    again = Draw(*json.loads(json.dumps(draw.as_json())))
    assert again == draw
    numbers = draw.rng.random(3).tolist()
    assert again.rng.random(3).tolist() == numbers
    assert draw.rng.random() != numbers[0], "they go on"
    assert dataclasses.replace(draw, progress=0.5).rng.random(3).tolist() == numbers
    for field in ("stream", "index", "epoch", "seed"):
        assert dataclasses.replace(draw, **{field: 0}).rng.random() != numbers[0], field


def test_the_first_sample_does_not_draw_the_numbers_of_the_first_permutation() -> None:
    """Seeds that are lists are filled up with zeros: [0] and [0, 0, 0, 0] are the same."""
    assert Draw(0, 0).rng.random() != np.random.Generator(np.random.PCG64([0, 0])).random()


def test_stages_share_no_order() -> None:
    """Not with another epoch of an earlier stage either: seed + 2**32 gives the second epoch of the seed."""
    assert stage_seed(5, 0) == 5
    orders = [
        tuple(Order(13, seed=stage_seed(5, stage)).at(13 * epoch + place)[0] for place in range(13))
        for stage in range(4)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 16
