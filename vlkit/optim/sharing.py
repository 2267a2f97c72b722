"""The part of a Muon step that several ranks do together: units of which each holds a share.

    shares of gradients -> momentum -> directions, sent to the workers       Sharing(...)
    whole directions -> orthogonalised, sent back -> update of the shares    finish()

The stages and their order are those of a unit that one rank has all of, so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlkit.optim.exchange import Carrier, gather, give_back
from vlkit.optim.layout import Layout, Piece
from vlkit.optim.partition import Split
from vlkit.optim.row_sharing import RowSharing
from vlkit.optim.update import Block, batches, newton_schulz_of, orthogonalize_units, update_momentum, update_weights


@dataclass
class _Shared:
    """A span that several ranks hold, with the share of this rank."""

    split: Split
    rank: int
    piece: Piece
    share: Block | None
    direction: Tensor | None = None

    @property
    def group(self) -> dict[str, Any]:
        return self.piece.group


class Sharing:
    """One step of the units that ranks share, from the first message to the last.

    Args:
        groups: Options, and pieces of all parameters that are updated with them, in the same order on all ranks.
        layout: Which ranks share them.
        factor: That clips and unscales gradients.
    """

    def __init__(self, groups: Sequence[tuple[dict[str, Any], list[Piece]]], layout: Layout, factor: float) -> None:
        self._rows = RowSharing([piece for _, pieces in groups for piece in pieces], layout)
        self._exchanges: list[tuple[list[_Shared], Carrier, Callable[[], dict[int, Tensor]]]] = []
        by_carrier: dict[Carrier, list[_Shared]] = {}
        for piece in (piece for _, pieces in groups for piece in pieces):
            for split, place, size in piece.holding.split:
                group = layout.sharing[piece.parameter]
                device = piece.weight.device
                carrier = Carrier(
                    group, dist.get_rank(group), newton_schulz_of(piece.group).compute_dtype(device), device
                )
                share = None if place is None else piece.share(place, size)
                by_carrier.setdefault(carrier, []).append(_Shared(split, carrier.rank, piece, share))
        for carrier, items in by_carrier.items():
            _directions(items, carrier.dtype, factor)
            wait = gather([item.split for item in items], [item.direction for item in items], carrier)
            self._exchanges.append((items, carrier, wait))

    def finish(self) -> None:
        """Orthogonalise what this rank works on, and update all shares."""
        returned = []
        for items, carrier, wait in self._exchanges:
            results = _orthogonalized(wait(), items)
            for index, result in results.items():
                self._rows.worked_on(items[index].piece, items[index].split, result)
            returned.append((items, give_back([item.split for item in items], results, carrier)))
        updates = [(items[index], update) for items, wait in returned for index, update in wait().items()]
        updates = [(item, self._rows.before(item.piece, item.split, item.share, update)) for item, update in updates]
        self._rows.reduce()
        for item, update in updates:
            _update(item, self._rows.after(item.piece, item.split, update))


def _directions(items: Sequence[_Shared], dtype: torch.dtype, factor: float) -> None:
    """Momentum, and the direction of every share in the number format of the products."""
    alike: dict[tuple[object, ...], list[_Shared]] = {}
    for item in items:
        if item.share is not None:
            key = (id(item.group), item.share.grad.dtype, item.share.momentum.dtype)
            alike.setdefault(key, []).append(item)
    for some in alike.values():
        blocks = [item.share for item in some if item.share is not None]
        directions = update_momentum(blocks, some[0].group, factor)
        for item, direction in zip(some, directions, strict=True):
            item.direction = direction.to(dtype)


def _orthogonalized(spans: dict[int, Tensor], items: Sequence[_Shared]) -> dict[int, Tensor]:
    """The spans with their units orthogonalised, by index."""
    results = {index: torch.empty_like(span) for index, span in spans.items()}
    by_options: dict[int, list[Block]] = {}
    for index, span in spans.items():
        for units in items[index].split.span.units:
            direction, result = units.view(span), units.view(results[index])
            by_options.setdefault(id(items[index].group), []).append(Block(result, direction, direction))
    options = {id(item.group): item.group for item in items}
    for key, blocks in by_options.items():
        for batch in batches(blocks):
            found = orthogonalize_units([block.grad for block in batch], newton_schulz_of(options[key]))
            for block, result in zip(batch, found, strict=True):
                block.weight.copy_(result)
    return results


def _update(item: _Shared, update: Tensor) -> None:
    """Weight decay and update of a share; where a span holds units of several shapes, unit by unit."""
    assert item.share is not None
    weight = item.share.weight
    update = update.to(torch.promote_types(item.share.momentum.dtype, torch.float32))
    span = item.split.span
    if len({(unit.rows, unit.cols) for unit in span.units}) == 1:
        update_weights([weight], [update], item.group, span.units[0].rows, span.units[0].cols)
        return
    own = next(share for share in item.split.shares if share.rank == item.rank)
    weights, updates = weight.new_zeros(item.split.numel), update.new_zeros(item.split.numel)
    own.of(weights).copy_(weight.view(own.sizes))
    own.of(updates).copy_(update.view(own.sizes))
    for unit in span.units:
        update_weights([unit.view(weights)], [unit.view(updates)], item.group, unit.rows, unit.cols)
    weight.copy_(own.of(weights).reshape(-1))
