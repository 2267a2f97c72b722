"""Tiny towers, packed patches for them, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlkit.packing import Layout, Packed
from vlkit.registry import component


def tiny(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """The tiny tower of a name, with weights large enough for every one of them to matter."""
    made = component("vision", name)
    tower = made.module(made.configs[f"{name}-tiny"].replace(**changes)).to(dtype)
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 2 else 0.5)
    return tower


def randomized(module: nn.Module, *, std: float = 0.2) -> nn.Module:
    """Weights of ordinary size everywhere, so that no norm, bias or table can be wrong unseen."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else std * noise)
    return module.eval()


def patches_of(tower: Any, grids: Sequence[tuple[int, ...]]) -> Packed:
    """Random patches of images and clips, in the dtype of the tower."""
    layout = Layout.from_grids(grids)
    return Packed(torch.randn(layout.num_tokens, tower.config.patch_dim, dtype=next(tower.parameters()).dtype), layout)


def gradients(tower: nn.Module, features: Tensor) -> list[Tensor]:
    """Of every parameter, for a loss to which every feature adds in its own way."""
    weights = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
    return list(torch.autograd.grad((features * weights).sum(), list(tower.parameters())))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude of the second."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
