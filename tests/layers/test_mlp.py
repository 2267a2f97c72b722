"""Feed-forward blocks: each activation by its closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from vlkit.errors import ConfigError
from vlkit.layers.mlp import MLP, GatedMLP, activation_function

FORMULAS: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_an_activation_is_its_formula(name: str) -> None:
    points = torch.linspace(-4, 4, 33, dtype=torch.float64)
    want = torch.tensor([FORMULAS[name](float(x)) for x in points], dtype=torch.float64)
    torch.testing.assert_close(activation_function(name)(points), want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_blocks_use_the_activation_they_are_given(name: str) -> None:
    x = torch.randn(3, 5)
    act = activation_function(name)
    mlp = MLP(5, 7, out_dim=4, activation=name)
    torch.testing.assert_close(mlp(x), mlp.fc2(act(mlp.fc1(x))))
    assert mlp(x).shape == (3, 4)
    gated = GatedMLP(5, 7, activation=name)
    torch.testing.assert_close(gated(x), gated.down(act(gated.gate(x)) * gated.up(x)))


def test_biases_are_as_asked() -> None:
    assert MLP(5, 7).fc1.bias is not None
    assert MLP(5, 7, bias=False).fc2.bias is None
    assert GatedMLP(5, 7).down.bias is None
    assert GatedMLP(5, 7, bias=True).gate.bias is not None


def test_an_unknown_activation_is_named() -> None:
    for kind in (MLP, GatedMLP):
        with pytest.raises(ConfigError, match="'relu' is not one of gelu, gelu_tanh"):
            kind(5, 7, activation="relu")
