"""A config is checked where it is made, and survives JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlkit.config import Config, Count, Positive, Size
from vlkit.errors import ConfigError, VlkitError


class Inner(Config):
    dim: Size = 4
    theta: Positive = 10000.0


class Outer(Config):
    inner: Inner = Inner()
    grid: tuple[int, int] = (2, 3)
    layers: tuple[Count, ...] = ()
    mode: Literal["pad", "resize"] = "pad"
    name: str | None = None
    needed: bool

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]

    def check(self) -> None:
        if self.grid[0] > self.grid[1]:
            raise ConfigError(f"Outer: {self.grid[0]} rows, but {self.grid[1]} columns")


@given(
    dim=st.integers(1, 2**40),
    theta=st.floats(min_value=1e-300, allow_infinity=False, allow_nan=False),
    layers=st.lists(st.integers(0, 99)),
    name=st.none() | st.text(),
    needed=st.booleans(),
)
def test_json_round_trip(dim: int, theta: float, layers: list[int], name: str | None, needed: bool) -> None:
    config = Outer(inner=Inner(dim=dim, theta=theta), layers=tuple(layers), name=name, needed=needed)
    assert Outer.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"needed": 1}, "Outer.needed: expected bool, found 1"),
        ({}, "missing needed"),
        ({"needed": True, "grid": [1]}, "Outer.grid: expected 2 values, found 1"),
        ({"needed": True, "grid": [1, "2"]}, r"Outer.grid\[1\]: expected int"),
        ({"needed": True, "grid": [3, 2]}, "3 rows, but 2 columns"),
        ({"needed": True, "layers": [1, -1]}, r"Outer.layers\[1\]: -1 is below 0"),
        ({"needed": True, "layers": 3}, "expected a list"),
        ({"needed": True, "mode": "crop"}, "'crop' is not one of 'pad', 'resize'"),
        ({"needed": True, "inner": {"dim": 0}}, "Inner.dim: 0 is below 1"),
        ({"needed": True, "inner": {"dim": 2**41}}, "above"),
        ({"needed": True, "inner": {"dim": True}}, "expected int, found True"),
        ({"needed": True, "inner": {"dim": 4.0}}, "expected int, found 4.0"),
        ({"needed": True, "inner": {"theta": float("nan")}}, "not a finite number"),
        ({"needed": True, "inner": {"theta": 0}}, "below or equal to 0"),
        ({"needed": True, "inner": 3}, "expected a Inner"),
        ({"needed": True, "nam": "x"}, "no field 'nam'; did you mean 'name'"),
        ([], "expected a JSON object"),
    ],
)
def test_bad_values_are_named(values: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Outer.from_dict(values)


def test_config_error_is_also_a_value_error() -> None:
    with pytest.raises(ValueError):
        Inner(dim=0)
    with pytest.raises(VlkitError):
        Inner(dim=0)


def test_configs_are_frozen_keyword_only_and_hashable() -> None:
    config = Inner()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        Inner(8)  # type: ignore[misc, call-arg]
    assert hash(Inner(dim=8)) == hash(Inner(dim=8))


def test_derived_numbers_follow_replace() -> None:
    config = Outer(needed=True)
    assert config.replace(grid=(3, 5)).cells == 15
    with pytest.raises(ConfigError, match="no field 'gird'"):
        config.replace(gird=(3, 5))
