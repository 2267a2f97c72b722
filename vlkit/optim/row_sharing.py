"""What a variant of Muon needs to know of rows that several ranks hold: one small sum over all ranks per step.

    NorMuon   who orthogonalises a unit knows all of its rows: it moves their second moments on, and tells all ranks both
              those and the factors. Every rank has the state of all rows, and the bits of one process
    AdaMuon   every rank divides its own elements, and the sums of squares of rows are added up

A row is counted by its first element; see `row_places`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlkit.optim.dtensor import first_element
from vlkit.optim.layout import Layout, Piece
from vlkit.optim.partition import Split
from vlkit.optim.units import Units, units_of
from vlkit.optim.update import Block
from vlkit.optim.variants import (
    STATE_KEY,
    adamuon_divide_,
    adamuon_factors,
    normuon_factors,
    num_rows,
    row_places,
    row_sums,
)


@dataclass
class _Rows:
    """Of one parameter, for one step.

    Attributes:
        units: All of the parameter's.
        state: Second moments of all rows ("normuon").
        first: Of this rank's elements of a DTensor, the first.
        rank: Of this process among those that share units.
        weight: In sums over all ranks: one over the number of ranks that know the same.
        told: What this rank knows of the rows' state, zero elsewhere ("normuon").
        factors: What rows of shared units are multiplied with; sums of squares until they are reduced ("adamuon").
    """

    units: list[Units]
    state: Tensor | None
    first: int
    rank: int
    weight: float
    told: Tensor
    factors: Tensor


class RowSharing:
    """One step of the variants over ranks.

    Args:
        pieces: Of all Muon parameters that are updated, in the same order on all ranks.
        layout: Over which ranks to sum.
    """

    def __init__(self, pieces: Sequence[Piece], layout: Layout) -> None:
        self._axes = layout.axes
        self._rows: dict[Tensor, _Rows] = {}
        self._pieces = [piece for piece in pieces if layout.axes and piece.group["variant"] != "none"]
        for piece in self._pieces:
            units = units_of(piece.parameter)
            wide = torch.promote_types(piece.weight.dtype, torch.float32)
            told, factors = torch.zeros(2, num_rows(units), dtype=wide, device=piece.weight.device)
            group, weight = layout.sharing.get(piece.parameter), layout.weight[piece.parameter]
            rank, first = 0 if group is None else dist.get_rank(group), first_element(piece.parameter)
            state = piece.state.get(STATE_KEY["normuon"])
            self._rows[piece.parameter] = _Rows(units, state, first, rank, weight, told, factors)

    def worked_on(self, piece: Piece, split: Split, result: Tensor) -> None:
        """Take note of a span that this rank has orthogonalised."""
        rows = self._rows.get(piece.parameter)
        if rows is None or rows.state is None:
            return
        for unit in split.span.units:
            places = row_places(rows.units, unit, split.span.start)
            sums = row_sums(unit.view(result).to(rows.factors.dtype))
            factors = normuon_factors(sums, places.view(rows.state), unit.cols, piece.group["variant_beta"])
            if split.workers[0] == rows.rank:  # others that have done the same work keep quiet
                places.view(rows.factors).copy_(factors)
                places.view(rows.told).copy_(places.view(rows.state))

    def before(self, piece: Piece, split: Split, share: Block | None, update: Tensor) -> Tensor:
        """This rank's share of an orthogonalised span, before the sum over ranks."""
        rows = self._rows.get(piece.parameter)
        if rows is None or rows.state is not None:
            return update
        assert share is not None
        assert share.second_moment is not None
        update = update.to(rows.factors.dtype, copy=True)
        adamuon_divide_(update, share.second_moment, piece.group["variant_beta"])
        rows.factors.index_add_(0, self._ids(rows, split), update.square())
        return update

    def reduce(self) -> None:
        """Sum over ranks; every rank then has the state of all rows and the factors of shared ones."""
        if not self._pieces:
            return
        for piece in self._pieces:
            rows = self._rows[piece.parameter]
            if rows.state is not None:
                for some, place in piece.holding.whole:
                    places = row_places(rows.units, some, rows.first + place.at)
                    places.view(rows.told).copy_(places.view(rows.state))
        of_all = [self._rows[piece.parameter] for piece in self._pieces]
        tensors = [rows.factors for rows in of_all] + [rows.told for rows in of_all if rows.state is not None]
        wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        weights = [rows.weight for rows in of_all] + [rows.weight for rows in of_all if rows.state is not None]
        joined = torch.cat([tensor.to(wide) * weight for tensor, weight in zip(tensors, weights, strict=True)])
        for group in self._axes:
            dist.all_reduce(joined, group=group)
        torch._foreach_copy_(tensors, list(joined.split([len(tensor) for tensor in tensors])))
        for rows in of_all:
            if rows.state is not None:
                rows.state.copy_(rows.told)
            else:
                for some in rows.units:
                    sums = row_places(rows.units, some).view(rows.factors)
                    sums.copy_(adamuon_factors(sums, some.cols))

    def after(self, piece: Piece, split: Split, update: Tensor) -> Tensor:
        """The share of the update, after the sum."""
        rows = self._rows.get(piece.parameter)
        return update if rows is None else update.to(rows.factors.dtype) * rows.factors[self._ids(rows, split)]

    def _ids(self, rows: _Rows, split: Split) -> Any:
        """The row of every element of this rank's share of a span."""
        numbers = torch.arange(len(rows.factors), device=rows.factors.device)
        ids = numbers.new_empty(split.numel)
        for unit in split.span.units:
            found = row_places(rows.units, unit, split.span.start).view(numbers)
            unit.view(ids).copy_(found.unsqueeze(-1).expand(-1, -1, unit.cols))
        own = next(share for share in split.shares if share.rank == rows.rank)
        return own.of(ids).reshape(-1)
