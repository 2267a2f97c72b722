"""Deterministic weights and inputs, so that numbers made once by other code can be written into a test.

weights = fill({name: tensor.shape for name, tensor in published.items()})
pixels = sequence("pixel_values", 24 * 1176).view(24, 1176).float()
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def sequence(name: str, length: int) -> Tensor:
    """A low-discrepancy sequence in [-1, 1) that begins where the name says, float64."""
    seed = zlib.crc32(name.encode()) % 1000
    places = torch.arange(length, dtype=torch.float64)
    return 2 * (0.7548776662466927 * places + 0.5698402909980532 * seed).frac() - 1


def fill(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights of ordinary size for published names, float32; those of norms are near 1."""
    weights = {}
    for name, shape in shapes.items():
        size = torch.Size(shape)
        values = sequence(name, size.numel())
        if len(size) == 1:
            values = 0.1 * values + (1 if name.endswith(".weight") else 0)
        else:
            fan = size[-1] if len(size) == 3 else size.numel() // size[0]
            values = values * (3 / fan) ** 0.5
        weights[name] = values.view(size).float()
    return weights


def check(
    values: Tensor, mean: float, mean_abs: float, l2: float, first: Sequence[float], last: Sequence[float]
) -> None:
    """Compare a tensor with its published summary: to 1e-4 each, the norm to 1e-4 of itself."""
    flat = values.detach().double().flatten()
    found = torch.tensor([flat.mean(), flat.abs().mean(), *flat[: len(first)], *flat[len(flat) - len(last) :]])
    want = torch.tensor([mean, mean_abs, *first, *last], dtype=torch.float64)
    torch.testing.assert_close(found, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(float(flat.norm()), l2, rtol=1e-4, atol=0)
