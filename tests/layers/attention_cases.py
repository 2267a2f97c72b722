"""Packs and widths that every attention backend is tried on, and how two results are compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# One token; equal neighbours; one long among short; nothing equal; equal but apart; just below, at and above 16.
LENGTHS = [(1,), (5, 5, 5), (1, 7, 300, 2, 9, 1, 1), (5, 6, 7), (40, 40, 3, 3, 3, 41), (15, 2, 15, 16, 17, 31, 15)]
# heads, kv_heads, head_dim, value_dim: plain, grouped, one key head with narrow values, values wider than keys.
WIDTHS = [(4, 4, 8, 8), (4, 2, 8, 8), (4, 1, 12, 8), (2, 2, 8, 12)]


def inputs(
    lengths: tuple[int, ...], widths: tuple[int, int, int, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, head_dim, value_dim = widths
    shapes = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim)]
    return tuple(torch.randn(sum(lengths), *s, dtype=dtype, requires_grad=True) for s in shapes)  # type: ignore[return-value]


def with_gradients(run: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = run(*tensors)
    seed = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)
    return out, *torch.autograd.grad(out, tensors, seed)


def largest_difference(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Over all tensors together, relative to the largest value: the gradient of a lone token's query is exactly 0."""
    scale = max(float(b.detach().abs().max()) for b in theirs)
    each = [(a.detach().double() - b.detach().double()).abs().max() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(each).max()) / scale  # Python's max would lose a NaN
