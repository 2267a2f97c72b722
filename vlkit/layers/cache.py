"""What a decoder keeps of the tokens it has seen, one row per token, written in place.

    cache.write(layer, layout, k, v) -> (all k, all v) [sequences, capacity, ...]      in every layer
    cache.advance(layout)                                                               once, after the last layer

A layer keeps whatever rows it needs: keys and values of each head, or one latent vector per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlkit.errors import LayoutError
from vlkit.packing import Layout


class Cache:
    """Rows of several sequences in every layer.

    Args:
        num_layers: Layers that write.
        num_sequences: Sequences; the items of every layout are these sequences, in order.
        capacity: Tokens per sequence that fit. A longer sequence makes it grow to at least twice the size, by one copy.
        row_shapes: Shape of each kind of row that a layer keeps of a token: ((kv_heads, head_dim), (kv_heads, head_dim))
            for keys and values.

    Attributes:
        lengths: Tokens stored of each sequence, without those of the forward that is running.
        next_positions: Where each sequence goes on: one more than its highest position so far, on any axis.
        prompt_lengths: Tokens that the first forward stored of each sequence; 0 before it.
    """

    def __init__(
        self,
        num_layers: int,
        num_sequences: int,
        capacity: int,
        row_shapes: Sequence[tuple[int, ...]],
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        self.capacity = max(1, capacity)
        self.lengths = [0] * num_sequences
        self.next_positions = [0] * num_sequences
        self.prompt_lengths = [0] * num_sequences
        self._rows = [
            [torch.empty(num_sequences, self.capacity, *shape, dtype=dtype, device=device) for shape in row_shapes]
            for _ in range(num_layers)
        ]
        self._index: tuple[Layout, int, Tensor] | None = None  # of the forward that is running

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, used or not."""
        return sum(rows.nbytes for layer in self._rows for rows in layer)

    def key_lengths(self, layout: Layout) -> list[int]:
        """Tokens of each sequence, with those of the forward that is running.

        Raises:
            LayoutError: The layout has another number of items than the cache has sequences.
        """
        if layout.num_items != len(self.lengths):
            raise LayoutError(
                f"the cache holds {len(self.lengths)} sequences, the layout has {layout.num_items} items; "
                "every forward needs all of them, in order, or cache.select(...) first"
            )
        return [known + new for known, new in zip(self.lengths, layout.lengths, strict=True)]

    def write(self, layer: int, layout: Layout, *rows: Tensor) -> tuple[Tensor, ...]:
        """Store the rows of new tokens behind those of their sequences.

        Args:
            layer: Layer that writes.
            layout: How many tokens of each sequence are new.
            rows: [tokens, ...], one tensor per kind of row.

        Returns:
            Everything stored in this layer, [sequences, capacity, ...] per kind; rows beyond `key_lengths(layout)` are
            undefined.
        """
        index = self._places(layout, rows[0].device)
        for stored, new in zip(self._rows[layer], rows, strict=True):
            stored.view(-1, *stored.shape[2:]).index_copy_(0, index, new.detach().to(stored.dtype))
        return tuple(self._rows[layer])

    def advance(self, layout: Layout, next_positions: Sequence[int] | None = None) -> None:
        """Count the tokens that all layers have written.

        Args:
            layout: How many tokens of each sequence are new.
            next_positions: Where each sequence goes on; None: their positions followed the ones before, one by one.
        """
        if next_positions is None:
            next_positions = [start + new for start, new in zip(self.next_positions, layout.lengths, strict=True)]
        self.lengths, self.next_positions = self.key_lengths(layout), list(next_positions)
        self.prompt_lengths = [old or now for old, now in zip(self.prompt_lengths, self.lengths, strict=True)]
        self._index = None

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the sequences, in the order given."""
        index = torch.tensor(list(rows), dtype=torch.long)
        self._rows = [[kept[index.to(kept.device)] for kept in layer] for layer in self._rows]
        self.lengths = [self.lengths[row] for row in rows]
        self.next_positions = [self.next_positions[row] for row in rows]
        self.prompt_lengths = [self.prompt_lengths[row] for row in rows]
        self._index = None

    def _places(self, layout: Layout, device: torch.device) -> Tensor:
        """Where each new token goes in [sequences * capacity]; worked out once per forward."""
        if self._index is None or self._index[0] is not layout or self._index[1] != self.capacity:
            needed = max(self.key_lengths(layout))
            if needed > self.capacity:
                self._grow(max(needed, 2 * self.capacity))
            starts = [i * self.capacity + known for i, known in enumerate(self.lengths)]
            if all(new == 1 for new in layout.lengths):
                places = starts
            else:
                spans = zip(starts, layout.lengths, strict=True)
                places = [place for start, new in spans for place in range(start, start + new)]
            self._index = (layout, self.capacity, torch.tensor(places, dtype=torch.long).to(device))
        return self._index[2]

    def _grow(self, capacity: int) -> None:
        used = max(self.lengths)
        for layer in self._rows:
            for kind, old in enumerate(layer):
                layer[kind] = old.new_empty(old.shape[0], capacity, *old.shape[2:])
                layer[kind][:, :used] = old[:, :used]
        self.capacity = capacity
