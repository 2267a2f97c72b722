"""What ranks tell one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from vlkit.errors import RankError, SampleError
from vlkit.training.ranks import Ranks, first_difference, lost_rank


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 2]}}, None),
        ({"a": (1, 2)}, {"a": [1, 2]}, None),
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 3]}}, "b.c[1]: found 3, expected 2"),
        ({"a": [1, 2]}, {"a": [1]}, "a: found 1 entries, expected 2"),
        ({"a": 1}, {}, "a: found nothing, expected 1"),
        ({}, {"a": 1}, "a: found 1, expected nothing"),
        ({"a": 1}, {"a": 1.0}, "a: found 1.0, expected 1"),
        ({"a": 1}, {"a": True}, "a: found true, expected 1"),
        ({"a": None}, {"a": "x"}, 'a: found "x", expected null'),
    ],
)
def test_the_first_difference_is_named(expected: Any, found: Any, message: str | None) -> None:
    assert first_difference(expected, found) == message


def test_one_process_asks_nobody() -> None:
    alone = Ranks(0, 1, torch.device("cpu"))
    assert alone.gather(3, 4) == [[3, 4]]
    assert alone.from_first({"a": 1}) == {"a": 1}
    assert float(alone.sum(torch.tensor(2.0))) == 2
    alone.check_equal({"a": 1}, "x")


def _talk(rank: int) -> list[Any]:
    import torch.distributed as dist

    ranks = Ranks(rank, 3, torch.device("cpu"), dist.group.WORLD)
    told: list[Any] = [ranks.gather(rank, 10 * rank), ranks.from_first(f"from {rank}")]
    told.append(float(ranks.sum(torch.tensor(float(rank)))))
    try:
        ranks.check_equal({"parameters": [["a", [2, 3]], ["b", [4 if rank == 2 else 5]]]}, "shapes")
    except RankError as error:
        told.append(str(error))
    try:
        with ranks.together():
            if rank == 1:
                raise SampleError("line 7")
    except SampleError as error:
        told.append(str(error))
    return told


def test_ranks_agree() -> None:
    for rank, told in enumerate(run_ranks(_talk, 3)):
        gathered, first, total, differs, failed = told
        assert gathered == [[0, 0], [1, 10], [2, 20]]
        assert first == "from 0"
        assert total == 3
        assert "rank 2 differs from rank 0 in parameters[1][1][0]: found 4, expected 5" in differs
        assert failed == ("line 7" if rank == 1 else "rank 1: line 7")


def test_only_errors_about_other_ranks_are_taken_for_them() -> None:
    assert lost_rank(RuntimeError("[pair.cc:545] Read error [::1]:1: Connection reset by peer"))
    assert lost_rank(RuntimeError("Timed out waiting 3000ms for recv operation to complete"))
    assert lost_rank(torch.distributed.DistNetworkError("x"))
    assert not lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))
    assert not lost_rank(ValueError("connection"))
