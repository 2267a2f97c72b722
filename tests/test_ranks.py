"""The harness of the distributed tests finds what it has to find."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def add_ranks(rank: int, offset: int) -> torch.Tensor:
    value = torch.tensor([rank + offset])
    dist.all_reduce(value)
    return value


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("what went wrong")


def die_on_one(rank: int) -> None:
    if rank == 1:
        os._exit(3)


def sleep_on_one(rank: int) -> None:
    time.sleep(100 * rank)


def test_results_come_in_the_order_of_ranks() -> None:
    assert [int(value) for value in run_ranks(add_ranks, 3, 10)] == [33, 33, 33]


@pytest.mark.parametrize(
    ("work", "words"), [(fail_on_one, "what went wrong"), (die_on_one, "died"), (sleep_on_one, "not ended")]
)
def test_a_rank_that_fails_fails_the_test(work: object, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        run_ranks(work, 2, timeout=3 if work is sleep_on_one else 120)  # type: ignore[arg-type]
