"""Verifiers on answers as models write them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from vlkit.errors import ConfigError, SampleError
from vlkit.training.verify import boxed, exact, find_verifier, judged, last_boxed, last_number, number


def question(answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "?"}], "answer": answer}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("it is 7, so 7 * 6 = 42.", 42),
        ("-3.50 degrees", Fraction(-7, 2)),
        ("5-3", 3),
        ("x=-3", -3),
        ("1,234,567.8", Fraction("1234567.8")),
        ("1,2", 2),
        ("3/4", Fraction(3, 4)),
        ("1/0", None),
        (".5", Fraction(1, 2)),
        ("\u22122", -2),
        ("none... at all", None),
        ("about 2e3", 2000),
        ("1.5E-2.", Fraction(3, 200)),
        ("1/2e3", Fraction(1, 2000)),
        ("1,000/2,500.5", Fraction(2000, 5001)),
        ("2 eggs", 2),
        ("1e999999999", None),
        ("1/1e-999999999999999999999", None),
        ("0e7", 0),
        ("1/" + "9" * 5000, None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, value: Fraction | None) -> None:
    assert last_number(text) == value


def test_numbers_are_compared_by_value() -> None:
    assert number("so 0.50", question("the answer is 1/2")) == 1.0
    assert number("so 0.5001", question("1/2")) == 0.0
    assert number("no idea", question("1/2")) == 0.0
    with pytest.raises(SampleError, match="needs an answer with a number, found 'blue'"):
        number("3", question("blue"))


def test_the_last_box_counts_with_its_braces() -> None:
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1") is None
    assert last_boxed("1") is None
    assert boxed(r"$\boxed{ 42.0 }$", question("42")) == 1.0
    assert boxed(r"\boxed{\frac{1}{2}}", question(r"\boxed{\frac{1}{2}}")) == 1.0
    assert boxed(r"\boxed{x =  1}", question("x = 1")) == 1.0
    assert boxed(r"\boxed{4}2", question("42")) == 0.0
    assert boxed("42", question("42")) == 0.0


def test_exact_ignores_only_the_spaces_around() -> None:
    assert exact(" a b\n", question("a b")) == 1.0
    assert exact("a  b", question("a b")) == 0.0
    with pytest.raises(SampleError, match="a question with an 'answer' is expected, found None"):
        exact("a", {"messages": []})


def test_verifiers_are_found_by_name_and_checked() -> None:
    def mine(text: str, sample: object) -> float:
        return len(text)

    assert find_verifier("mine", {"mine": mine}) is mine
    assert find_verifier("exact", {"exact": mine}) is mine
    with pytest.raises(ConfigError, match="no verifier 'numbr'; there are exact, number, boxed, mine"):
        find_verifier("numbr", {"mine": mine})
    assert judged(mine, "abc", {}) == 3.0
    for right in (True, np.True_, np.float32(1), np.array(1), torch.tensor(1.0), torch.tensor(True)):
        assert judged(lambda text, sample, value=right: value, "", {}) == 1.0  # type: ignore[misc]
    for value in (None, float("nan"), "1", 10**400, 10**5000, np.ones(1), torch.tensor(float("inf"))):
        with pytest.raises(ConfigError, match="gives a finite number"):
            judged(lambda text, sample, value=value: value, "", {})  # type: ignore[misc]
