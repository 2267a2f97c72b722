"""Parameters and gradients of odd shapes for tests of Muon over ranks, the same wherever they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlkit.optim import Muon

# One matrix is larger than a fourth of everything; stacks, fused weights, heads in columns and a convolution.
MATRICES = [(65, 33), (5, 9), (6, 7, 9), (129, 40), (3, 3), (40, 200), (12, 5, 3, 3), (4, 30, 17)]
VECTORS = [(31,), (17, 5), (1,), (64,)]
SHAPES = [*MATRICES, *VECTORS]


def values(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).mul(0.1).to(dtype) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def declare(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The groups: what is fused is said, and options differ."""
    params[3].muon_splits = (64, 32, 33)  # type: ignore[attr-defined]
    params[5].muon_column_splits = (50, 100, 50)  # type: ignore[attr-defined]
    params[7].muon_splits = (15, 15)  # type: ignore[attr-defined]
    return [
        {"params": params[:4]},
        {"params": params[4:8], "lr": 0.03, "weight_decay": 0.01, "nesterov": False},
        {"params": params[8:10], "algorithm": "adamw"},
        {"params": params[10:], "algorithm": "adamw", "lr": 0.5},
    ]


def plain(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in values(dtype)]


def train(params: Sequence[Tensor], optimizer: Muon, steps: int = 3, dtype: torch.dtype = torch.float32) -> None:
    for step in range(steps):
        for param, grad in zip(params, gradients(step, dtype), strict=True):
            param.grad = grad
        optimizer.step()


def one_process(dtype: torch.dtype = torch.float32, steps: int = 3, **options: Any) -> tuple[list[Tensor], Muon]:
    params = plain(dtype)
    optimizer = Muon(declare(params), 0.02, **options)
    train(params, optimizer, steps, dtype)
    return [param.detach() for param in params], optimizer


def state_tensors(optimizer: Muon) -> Iterator[Tensor]:
    """What this rank keeps, element by element; without step counts."""
    for state in optimizer.state.values():
        for value in state.values():
            local = value.to_local() if hasattr(value, "to_local") else value
            if local.ndim:
                yield local
