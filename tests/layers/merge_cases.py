"""Packed features of images and a clip, and merging them by plain loops."""

from __future__ import annotations

import torch

from vlkit.packing import Layout, Packed

GRIDS: list[tuple[int, ...]] = [(2, 6), (4, 4), (2, 2, 4), (10, 2), (4, 4)]


def features(grids: list[tuple[int, ...]], dim: int = 3) -> Packed:
    layout = Layout.from_grids(grids)
    return Packed(torch.randn(layout.num_tokens, dim, dtype=torch.float64), layout)


def by_hand(packed: Packed, m: int) -> torch.Tensor:
    """Block after block, row after row of the block."""
    rows = []
    for item, (time, height, width) in zip(packed.unpack(), packed.layout.grids or (), strict=True):
        frames = item.view(time, height, width, -1)
        rows += [
            torch.cat([frames[t, i + a, j + b] for a in range(m) for b in range(m)])
            for t in range(time)
            for i in range(0, height, m)
            for j in range(0, width, m)
        ]
    return torch.stack(rows)
