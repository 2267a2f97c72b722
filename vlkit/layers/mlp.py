"""Feed-forward blocks.

MLP:       x -> fc1 -> activation -> fc2
GatedMLP:  x -> activation(gate) * up -> down
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.errors import ConfigError


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # exact, with erf
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,  # x * sigmoid(1.702 x), OpenAI CLIP
    "silu": F.silu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The element-wise function called `name`: gelu (exact), gelu_tanh, quick_gelu or silu.

    Raises:
        ConfigError: Another name.
    """
    if name not in _ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


class MLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(
        self, dim: int, mlp_dim: int, *, out_dim: int | None = None, bias: bool = True, activation: str = "gelu_tanh"
    ) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(dim, mlp_dim, bias=bias)
        self.fc2 = nn.Linear(mlp_dim, dim if out_dim is None else out_dim, bias=bias)
        self._act = activation_function(activation)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows out_dim"]:
        return self.fc2(self._act(self.fc1(x)))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)).

    Source: Shazeer, arXiv:2002.05202 (SwiGLU with the default activation).
    """

    def __init__(self, dim: int, mlp_dim: int, *, bias: bool = False, activation: str = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(dim, mlp_dim, bias=bias)
        self.up = nn.Linear(dim, mlp_dim, bias=bias)
        self.down = nn.Linear(mlp_dim, dim, bias=bias)
        self._act = activation_function(activation)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return self.down(self._act(self.gate(x)) * self.up(x))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
