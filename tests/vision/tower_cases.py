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


def check_blocks_compile_once(tower: Any, packs: Sequence[Packed], *, tolerance: float) -> None:
    """The block stack compiles as one graph that all packs reuse, with the same features and gradients."""
    import torch._dynamo as dynamo

    want = [(x.tokens, gradients(tower, x.tokens)) for x in map(tower, packs)]
    dynamo.reset()
    dynamo.utils.counters.clear()
    tower.forward_blocks = torch.compile(tower.forward_blocks, fullgraph=True, dynamic=True, backend="aot_eager")
    for packed, (features, grads) in zip(packs, want, strict=True):
        ours = tower(packed).tokens
        assert difference(ours, features) < tolerance
        assert all(difference(a, b) < 100 * tolerance for a, b in zip(gradients(tower, ours), grads, strict=True))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    dynamo.reset()
