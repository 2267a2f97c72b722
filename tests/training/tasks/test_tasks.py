"""Objectives are found by their kind, and mistakes are told."""

from __future__ import annotations

import pytest

from vlkit.errors import ConfigError
from vlkit.training.tasks import TASKS, read_objective
from vlkit.training.tasks.next_token import NextToken, NextTokenOptions


def test_an_objective_is_found_by_its_kind() -> None:
    assert read_objective({"kind": "next-token"}) == (NextTokenOptions(), NextToken)
    assert {"next-token", "dpo", "mpo", "grpo", "mirror-descent", "contrast"} <= set(TASKS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("next-token", "expected a table with kind, found 'next-token'"),
        ({}, "kind is missing; there are next-token, dpo"),
        ({"kind": "next token"}, "there is no 'next token'; did you mean 'next-token'"),
        ({"kind": "next-token", "normalize": "token"}, "no field 'normalize'; did you mean 'normalise'"),
    ],
)
def test_objectives_that_are_none_are_refused(values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_objective(values)
