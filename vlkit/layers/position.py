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
    """The learned table [rows, cols, dim], one vector per cell of the training grid.

    Args:
        std: Standard deviation of the normal numbers at the start.
    """

    def __init__(self, rows: int, cols: int, dim: int, *, std: float = 1.0) -> None:
        super().__init__()
        self.std = std
        self.table = nn.Parameter(torch.empty(rows, cols, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=self.std)

    def forward(
        self, layout: Layout, *, mode: Mode = "bicubic", antialias: bool = False, align_corners: bool = False
    ) -> Float[Tensor, "tokens dim"]:
        return interpolate_positions(self.table, layout, mode=mode, antialias=antialias, align_corners=align_corners)

    def extra_repr(self) -> str:
        return "{}x{}, {}".format(*self.table.shape)


def list_to_table(cells: Float[Tensor, "*one cells dim"]) -> Float[Tensor, "rows cols dim"]:
    """A square table that is published as a list of its cells, row by row: [cells, dim] or [1, cells, dim].

    Raises:
        ConfigError: The number of cells is not a square.
    """
    count, dim = cells.shape[-2:]
    side = math.isqrt(count)
    if side * side != count or cells.numel() != count * dim:
        raise ConfigError(f"a position table of shape {list(cells.shape)} is not a list of the cells of a square")
    return cells.reshape(side, side, dim)


def table_to_list(table: Float[Tensor, "rows cols dim"]) -> Float[Tensor, "1 cells dim"]:
    """The inverse of `list_to_table`, with its leading axis of one.

    Raises:
        ConfigError: The table is not square.
    """
    rows, cols, _ = table.shape
    if rows != cols:
        raise ConfigError(f"a position table of {rows}x{cols} cells is published as a list only if it is square")
    return table.flatten(0, 1)[None]


def table_to_cells(table: Float[Tensor, "rows cols dim"]) -> Float[Tensor, "cells dim"]:
    """The inverse of `list_to_table` without a leading axis."""
    return table_to_list(table)[0]


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
    lengths = torch.tensor(layout.lengths, dtype=torch.int64, device="cpu")
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
        resized = _resize(image, (rows, cols), mode, antialias, align_corners)
        parts.append(rearrange(resized, "1 dim rows cols -> (rows cols) dim").repeat(time, 1))
    return torch.cat(parts) if parts else table.new_empty(0, table.shape[-1])


def _resize(
    image: Float[Tensor, "1 dim rows cols"], size: tuple[int, int], mode: Mode, antialias: bool, align_corners: bool
) -> Tensor:
    if antialias and size[1] == 1 != size[0]:
        # With antialias, torch (2.14 at least) reads the wrong cells where the result has one column; one row is right.
        return _resize(image.mT, (1, size[0]), mode, antialias, align_corners).mT
    return F.interpolate(image, size=size, mode=mode, antialias=antialias, align_corners=align_corners)


def _weighted_gather(table: Float[Tensor, "cells dim"], cells: Tensor, weights: Tensor) -> Float[Tensor, "tokens dim"]:
    """sum over taps of weights[token, tap] * table[cells[token, tap]]."""
    wide = table.to(weights.dtype)
    return F.embedding_bag(cells, wide, per_sample_weights=weights, mode="sum").to(table.dtype)


def _starts(sides: list[int]) -> Tensor:
    """Where each side begins when all are laid end to end."""
    length = torch.tensor(sides, dtype=torch.int64, device="cpu")
    return length.cumsum(0) - length


def _taps_of_sides(
    sides: list[int], size: int, mode: Mode, antialias: bool, align_corners: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The taps of all items' sides end to end, padded with zero weights to the widest."""
    parts = [_taps(side, size, mode, antialias, align_corners, dtype) for side in sides]
    if not parts:
        return torch.empty(0, 1, dtype=torch.int64, device="cpu"), torch.empty(0, 1, dtype=dtype, device="cpu")
    widest = max(cells.shape[1] for cells, _ in parts)
    cells = torch.cat([F.pad(cells, (0, widest - cells.shape[1])) for cells, _ in parts])
    return cells, torch.cat([F.pad(weights, (0, widest - weights.shape[1])) for _, weights in parts])


@lru_cache(maxsize=4096)
def _taps(
    side: int, size: int, mode: Mode, antialias: bool, align_corners: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Which cells of a table side of `size` make each of `side` places, and with which weights.

    They are read off torch itself, by resampling an identity matrix: in fp32 a coordinate near 64 is known to 4e-6 only,
    and torch's own rounding is what checkpoints were trained with.

    Returns:
        cells int64 [side, taps], weights [side, taps].
    """
    if mode not in ("bicubic", "bilinear"):
        raise ConfigError(f"mode {mode!r} is neither 'bicubic' nor 'bilinear'")
    identity = torch.eye(size, dtype=dtype, device="cpu")[None, None]
    spread = F.interpolate(identity, size=(size, side), mode=mode, antialias=antialias, align_corners=align_corners)
    weights = spread[0, 0].T  # [side, size]
    cells = weights.abs().topk(int((weights != 0).sum(1).max()), dim=1).indices.sort(dim=1).values
    return cells, weights.gather(1, cells)
