"""Merging patches: every m x m block becomes one row, its patches side by side.

[patches, dim] -> merge_blocks(., m) -> [patches / m^2, m^2 * dim]
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from vlkit.packing import Packed


def merge_blocks(features: Packed, size: int) -> Packed:
    """Put every size x size block of patches side by side, row by row of the block.

    Args:
        features: [patches, dim] in raster order, with grids.
        size: Side of a block, in patches.

    Returns:
        [tokens, size ** 2 * dim], blocks in raster order, with `layout.merged(size)`.

    Raises:
        LayoutError: No grids, or a grid side that is not a multiple of size.
    """
    merged = features.layout.merged(size)
    if size == 1:
        return Packed(features.tokens, merged)
    return Packed(_side_by_side(features, size), merged)


def merged_grid(grid: tuple[int, int, int], size: int) -> tuple[int, int, int]:
    """The grid of tokens that `merge_blocks` makes of a grid of patches."""
    time, rows, columns = grid
    return time, rows // size, columns // size


def _side_by_side(features: Packed, m: int) -> Tensor:
    grids = features.layout.grids or ()
    if not grids:
        return features.tokens.reshape(0, m * m * features.tokens.shape[-1])
    if len(set(grids)) == 1:
        t, h, w = grids[0]
        return rearrange(
            features.tokens, "(n t h a w b) d -> (n t h w) (a b d)", n=len(grids), t=t, h=h // m, w=w // m, a=m, b=m
        )
    parts = [
        rearrange(item, "(t h a w b) d -> (t h w) (a b d)", t=t, h=h // m, w=w // m, a=m, b=m)
        for item, (t, h, w) in zip(features.unpack(), grids, strict=True)
    ]
    return torch.cat(parts)
