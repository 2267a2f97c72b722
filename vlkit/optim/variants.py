"""What can follow the orthogonalisation: second moments of its result, by row (NorMuon) or by element (AdaMuon).

    orthogonalised unit -> divided by the root of a running mean of its squares -> brought back to a fixed norm

Both need sums of squares over rows, nothing else, of whatever the norm is made of. So who holds only some elements of a
unit computes `row_sums` of those, adds them up over ranks, and scales its own elements by the factors that follow.

    NorMuon   v_r <- beta v_r + (1 - beta) mean_c O_rc^2      O_rc <- O_rc / (sqrt(v_r) + eps) * norm(before) / norm(after)
              state "row_second_moment": fp32, one value per row of every unit, in the order of their first elements
    AdaMuon   V <- beta V + (1 - beta) O * O                  O <- O / (sqrt(V) + eps) * sqrt(min(rows, cols)) / norm(after)
              state "second_moment": as momentum_buffer

Source: NorMuon, arXiv:2510.05491, in the form of its published code, which keeps the norm; AdaMuon, arXiv:2507.11005,
without the sign in front of the orthogonalisation, as timm has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlkit.optim.units import Units

Variant: TypeAlias = Literal["none", "normuon", "adamuon"]

VARIANTS = ("none", "normuon", "adamuon")
STATE_KEY = {"normuon": "row_second_moment", "adamuon": "second_moment"}
EPS = {"normuon": 1e-10, "adamuon": 1e-8}  # under the elements of O, which are about 1 / sqrt(long side)


def num_rows(units: Sequence[Units]) -> int:
    """Rows of all units together: the length of a row second moment."""
    return sum(some.count * some.rows for some in units)


class RowPlaces(NamedTuple):
    """Where the rows of units are in a row second moment: a view [count, rows] of it."""

    sizes: tuple[int, int]
    strides: tuple[int, int]
    first: int

    def view(self, rows: Tensor) -> Tensor:
        return rows.as_strided(self.sizes, self.strides, rows.storage_offset() + self.first)


@lru_cache(maxsize=4096)
def _row_starts(units: tuple[Units, ...]) -> Tensor:
    """First elements of all rows, rising."""
    starts = [
        some.offset + torch.arange(some.count).view(-1, 1) * some.strides[0] + torch.arange(some.rows) * some.strides[1]
        for some in units
    ]
    return torch.cat([rows.flatten() for rows in starts]).sort().values


def row_places(units: Sequence[Units], some: Units, start: int = 0) -> RowPlaces:
    """The place of the rows of some units among those of all.

    Args:
        units: All of the parameter.
        some: Of which, as a view of the parameter from element `start` on.
        start: That element.
    """
    first = start + some.offset
    wanted = torch.tensor(
        [first, first + some.strides[0] * (some.count > 1), first + some.strides[1] * (some.rows > 1)]
    )
    one, unit, row = torch.searchsorted(_row_starts(tuple(units)), wanted).tolist()
    return RowPlaces((some.count, some.rows), (unit - one, row - one), one)


def row_sums(update: Float[Tensor, "count rows cols"]) -> Float[Tensor, "count rows"]:
    """Sums of squares over what is held of each row; they add up over ranks."""
    wide = update if update.dtype == torch.float64 else update.float()
    return wide.square().sum(-1)


def row_ids(units: Sequence[Units], numel: int) -> Int[Tensor, " numel"]:
    """The row of every element of a flat run that holds these units, counted through all of them.

    With it a share of any form has its row sums: zeros(num_rows).index_add_(0, ids of the share, share ** 2).
    """
    ids = torch.empty(numel, dtype=torch.int64)
    first = 0
    for some in units:
        rows = torch.arange(first, first + some.count * some.rows).view(some.count, some.rows, 1)
        some.view(ids).copy_(rows.expand(-1, -1, some.cols))
        first += some.count * some.rows
    return ids


def normuon_factors(
    sums: Float[Tensor, "count rows"], second_moment: Float[Tensor, "count rows"], cols: int, beta: float
) -> Float[Tensor, "count rows"]:
    """Move the second moment of every row on, and return what the rows are multiplied with.

    The norm afterwards follows from the same sums, so that of a unit needs no look at its elements.

    Args:
        sums: Of whole rows.
        second_moment: Written to.
        cols: Of a unit.
        beta: Decay of the running mean.
    """
    second_moment.lerp_((sums / cols).to(second_moment.dtype), 1 - beta)
    factors = 1 / (second_moment.to(sums.dtype).sqrt() + EPS["normuon"])
    after = (sums * factors.square()).sum(-1, keepdim=True)
    kept = (sums.sum(-1, keepdim=True) / after.clamp_min(torch.finfo(after.dtype).tiny)).sqrt()
    return factors * kept


def adamuon_divide_(update: Tensor, second_moment: Tensor, beta: float) -> None:
    """Move the second moment of every element on, and divide by its root; elementwise, so exact on any slice."""
    second_moment.lerp_(update.square().to(second_moment.dtype), 1 - beta)
    update.div_(second_moment.to(update.dtype).sqrt().add_(EPS["adamuon"]))


def adamuon_factors(sums: Float[Tensor, "count rows"], cols: int) -> Float[Tensor, "count rows"]:
    """What brings divided units back to the norm of an orthogonal matrix; alike for all rows of a unit."""
    norm = math.sqrt(min(sums.shape[-1], cols))
    total = sums.sum(-1, keepdim=True).clamp_min(torch.finfo(sums.dtype).tiny)
    return (norm / total.sqrt()).expand_as(sums)


def adapt_(update: Float[Tensor, "count rows cols"], second_moment: Tensor, variant: Variant, beta: float) -> None:
    """One variant on whole units.

    Args:
        update: Orthogonalised units; written to.
        second_moment: [count, rows] for "normuon", [count, rows, cols] for "adamuon"; written to.
        variant: Which.
        beta: Decay of the second moment.
    """
    if variant == "normuon":
        factors = normuon_factors(row_sums(update), second_moment, update.shape[-1], beta)
    else:
        adamuon_divide_(update, second_moment, beta)
        factors = adamuon_factors(row_sums(update), update.shape[-1])
    update.mul_(factors.unsqueeze(-1).to(update.dtype))
