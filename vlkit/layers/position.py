"""Learned absolute positions, resampled to the patch grid of every image.

    table [rows, cols, dim] + grids -> taps per side (host) -> one weighted gather for all images -> [tokens, dim]

Resampling is separable: a token's value is a sum over a few table rows times a few table columns (4 x 4 for bicubic, 2
x 2 for bilinear, more where antialiasing shrinks). `interpolate_positions_reference` is the plain version, one
F.interpolate per image.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.errors import ConfigError, LayoutError
from vlkit.layers.rope import grid_positions
from vlkit.packing import Layout

Mode = Literal["bicubic", "bilinear"]


class PositionTable(nn.Module):
    """The learned table [rows, cols, dim], one vector per cell of the training grid; unit normal at the start."""

    def __init__(self, rows: int, cols: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(rows, cols, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table)

    def forward(
        self, layout: Layout, *, mode: Mode = "bicubic", antialias: bool = False, align_corners: bool = False
    ) -> Float[Tensor, "tokens dim"]:
        return interpolate_positions(self.table, layout, mode=mode, antialias=antialias, align_corners=align_corners)

    def extra_repr(self) -> str:
        return "{}x{}, {}".format(*self.table.shape)


def interpolate_positions(
    table: Float[Tensor, "rows cols dim"],
    layout: Layout,
    *,
    mode: Mode = "bicubic",
    antialias: bool = False,
    align_corners: bool = False,
) -> Float[Tensor, "tokens dim"]:
    """Resample a learned position table to the patch grid of every image.

    An image whose grid equals the table gets the table itself, bit for bit. In half precision the sums are taken in
    fp32 and rounded once; F.interpolate on a half-precision table differs by up to its rounding.

    Args:
        table: One vector per cell of the training grid.
        layout: Grids are (time, rows, columns) in patches; the table repeats over time.
        mode: "bicubic" or "bilinear".
        antialias: Widen the kernel where an image has fewer patches than the table. In torch this also changes the
            bicubic kernel (a = -0.5 instead of -0.75), even where the image has more.
        align_corners: The corner cells, not the outer edges, of table and image coincide.

    Returns:
        One vector per token in the order of the layout, in the dtype of the table.

    Raises:
        LayoutError: The layout has no grids.
        ConfigError: An unknown mode.

    Matches: F.interpolate per image, to 1e-6 in fp32 for a unit-normal table.
    """
    rows, cols, dim = table.shape
    position = grid_positions(layout).long()  # (time, row, column)
    assert layout.grids is not None
    options = (mode, antialias, align_corners, torch.float64 if table.dtype == torch.float64 else torch.float32)
    row_cells, row_weights = _taps_of_sides([h for _, h, _ in layout.grids], rows, *options)
    col_cells, col_weights = _taps_of_sides([w for _, _, w in layout.grids], cols, *options)
    # Each item has its own run of taps; where it begins is repeated over the item's tokens.
    lengths = torch.tensor(layout.lengths, dtype=torch.int64)
    row = position[:, 1] + _starts([h for _, h, _ in layout.grids]).repeat_interleave(lengths)
    col = position[:, 2] + _starts([w for _, _, w in layout.grids]).repeat_interleave(lengths)
    cells = row_cells[row][:, :, None] * cols + col_cells[col][:, None, :]  # [tokens, row taps, column taps]
    weights = row_weights[row][:, :, None] * col_weights[col][:, None, :]
    return _weighted_gather(
        table.reshape(rows * cols, dim), cells.flatten(1).to(table.device), weights.flatten(1).to(table.device)
    )


def interpolate_positions_reference(
    table: Float[Tensor, "rows cols dim"],
    layout: Layout,
    *,
    mode: Mode = "bicubic",
    antialias: bool = False,
    align_corners: bool = False,
) -> Float[Tensor, "tokens dim"]:
    """The plain version of `interpolate_positions`: F.interpolate for one image after another."""
    if layout.grids is None:
        raise LayoutError("resampling positions needs a layout with grids; make it with Layout.from_grids")
    image = rearrange(table, "rows cols dim -> 1 dim rows cols")
    parts = []
    for time, rows, cols in layout.grids:
        resized = F.interpolate(image, size=(rows, cols), mode=mode, antialias=antialias, align_corners=align_corners)
        parts.append(rearrange(resized, "1 dim rows cols -> (rows cols) dim").repeat(time, 1))
    return torch.cat(parts) if parts else table.new_empty(0, table.shape[-1])


def _weighted_gather(table: Float[Tensor, "cells dim"], cells: Tensor, weights: Tensor) -> Float[Tensor, "tokens dim"]:
    """sum over taps of weights[token, tap] * table[cells[token, tap]]."""
    wide = table.to(weights.dtype)
    return F.embedding_bag(cells, wide, per_sample_weights=weights, mode="sum").to(table.dtype)


def _starts(sides: list[int]) -> Tensor:
    """Where each side begins when all are laid end to end."""
    ends = torch.tensor(sides, dtype=torch.int64).cumsum(0)
    return ends - torch.tensor(sides, dtype=torch.int64)


def _taps_of_sides(
    sides: list[int], size: int, mode: Mode, antialias: bool, align_corners: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The taps of all items' sides end to end, padded with zero weights to the widest."""
    parts = [_taps(side, size, mode, antialias, align_corners, dtype) for side in sides]
    if not parts:
        return torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1, dtype=dtype)
    widest = max(cells.shape[1] for cells, _ in parts)
    cells = torch.cat([F.pad(cells, (0, widest - cells.shape[1])) for cells, _ in parts])
    return cells, torch.cat([F.pad(weights, (0, widest - weights.shape[1])) for _, weights in parts])


@lru_cache(maxsize=4096)
def _taps(
    side: int, size: int, mode: Mode, antialias: bool, align_corners: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Which cells of a table side of `size` make each of `side` places, and with which weights.

    The arithmetic is in the dtype of the table, like torch's: in fp32 a coordinate near 64 is exact to 4e-6 only, so
    computing it more precisely would move away from what checkpoints were trained with.

    Returns:
        cells int64 [side, taps], weights [side, taps].
    """
    if mode not in ("bicubic", "bilinear"):
        raise ConfigError(f"mode {mode!r} is neither 'bicubic' nor 'bilinear'")
    place = torch.arange(side, dtype=dtype)
    if align_corners:
        scale = torch.tensor((size - 1) / (side - 1) if side > 1 else 0.0, dtype=dtype)
    else:
        scale = torch.tensor(size / side, dtype=dtype)
    if antialias:
        reach = (2.0 if mode == "bicubic" else 1.0) * max(float(scale), 1.0)
        centre = scale * (place + 0.5)
        first = (centre - reach + 0.5).long().clamp(min=0)
        end = (centre + reach + 0.5).long().clamp(max=size)
        cells = first[:, None] + torch.arange(math.ceil(reach) * 2 + 1)
        distance = (cells + 0.5 - centre[:, None]) / max(float(scale), 1.0)
        weights = _cubic(distance, -0.5) if mode == "bicubic" else (1 - distance.abs()).clamp(min=0)
        weights = weights * (cells < end[:, None])
        return cells.clamp(max=size - 1), weights / weights.sum(1, keepdim=True)
    at = scale * place if align_corners else scale * (place + 0.5) - 0.5
    if mode == "bilinear":
        at = at.clamp(min=0)
    below = at.floor()
    offsets = torch.arange(-1, 3) if mode == "bicubic" else torch.arange(2)
    distance = (at - below)[:, None] - offsets.to(dtype)
    weights = _cubic(distance, -0.75) if mode == "bicubic" else 1 - distance.abs()
    return (below.long()[:, None] + offsets).clamp(0, size - 1), weights


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic kernel with slope a at distance 1.

    Source: Keys, "Cubic convolution interpolation for digital image processing", 1981.
    """
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
