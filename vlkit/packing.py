"""The one format between all parts: tokens end to end, and where each item starts.

    images -> patches: Packed [patches, patch_dim] -> tower -> Packed [patches, dim] -> projector -> Packed [tokens, llm_dim]
    chats  -> ids:     Packed [tokens]             -> embed + merge -> decoder -> Packed [tokens, llm_dim]

There is no batch axis and no padding. A `Layout` lives on the host, so no layer waits for the device to learn a length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkit.errors import EmptyBatchError, LayoutError


class Segments(NamedTuple):
    """What an attention kernel needs to know of a layout, as tensors: under torch.compile lengths are then data, not guards.

    Attributes:
        offsets: int32 [items + 1] on the host; item i is tokens offsets[i] to offsets[i + 1].
        device_offsets: The same on the device of the tokens.
        longest: int64 scalar on the host, the longest item in tokens.
    """

    offsets: Tensor
    device_offsets: Tensor
    longest: Tensor


@dataclass(frozen=True)
class Layout:
    """Where each item of a packed tensor starts, and the grid that it came from.

    Attributes:
        lengths: Tokens of each item; every item has at least one.
        grids: (time, rows, columns) of each item, in patches and raster order, or None for text.

    Raises:
        LayoutError: An empty item, a negative number, or a grid whose product is not the item's length.
    """

    lengths: tuple[int, ...]
    grids: tuple[tuple[int, int, int], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "lengths", tuple(_whole(n, f"length of item {i}") for i, n in enumerate(_items(self.lengths)))
        )
        for item, length in enumerate(self.lengths):
            if length < 1:
                raise LayoutError(f"item {item} has {length} tokens; every item of a layout needs at least one")
        if self.grids is None:
            return
        object.__setattr__(self, "grids", tuple(_grid(grid, i) for i, grid in enumerate(_items(self.grids))))
        if len(self.grids) != len(self.lengths):
            raise LayoutError(f"{len(self.grids)} grids for {len(self.lengths)} items")
        for item, ((t, h, w), length) in enumerate(zip(self.grids, self.lengths, strict=True)):
            if min(t, h, w) < 1 or t * h * w != length:
                raise LayoutError(f"item {item}: grid {t}x{h}x{w} (time, rows, columns) does not make {length} tokens")

    @classmethod
    def from_grids(cls, grids: Iterable[Sequence[int]]) -> Layout:
        """The layout of images given as (time, rows, columns) or (rows, columns), in patches."""
        full = [_grid(grid, item) for item, grid in enumerate(_items(grids))]
        return cls(lengths=tuple(t * h * w for t, h, w in full), grids=tuple(full))

    @classmethod
    def from_offsets(cls, offsets: Tensor | Sequence[int], num_tokens: int) -> Layout:
        """The layout of boundaries as varlen kernels write them: 0, end of item 0, end of item 1, ..., num_tokens.

        Raises:
            LayoutError: Boundaries that do not start at 0, do not rise, or do not end at num_tokens.
        """
        if isinstance(offsets, Tensor):
            if offsets.ndim != 1 or offsets.is_floating_point() or offsets.is_complex() or offsets.dtype == torch.bool:
                raise LayoutError(f"offsets must be a 1-D integer tensor, found {offsets.dtype} {tuple(offsets.shape)}")
            offsets = offsets.tolist()
        offsets = list(offsets)
        if not offsets or offsets[0] != 0 or offsets[-1] != num_tokens:
            raise LayoutError(f"offsets must run from 0 to {num_tokens}, found {offsets[:1]} ... {offsets[-1:]}")
        return cls(tuple(b - a for a, b in pairwise(offsets)))

    @staticmethod
    def concat(layouts: Sequence[Layout]) -> Layout:
        """The items of all layouts, in order. Either all or none have grids."""
        with_grids = [layout.grids is not None for layout in layouts]
        if any(with_grids) and not all(with_grids):
            raise LayoutError("cannot join a layout with grids and one without")
        grids = tuple(g for layout in layouts for g in layout.grids or ()) if any(with_grids) else None
        return Layout(tuple(n for layout in layouts for n in layout.lengths), grids)

    @property
    def num_items(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each item and, last, the number of tokens."""
        return (0, *accumulate(self.lengths))

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def _per_device(self) -> dict[tuple[str, str], Tensor]:
        return {}

    def _kept(self, what: str, device: torch.device | str, make: Iterable[int] | None = None) -> Tensor:
        if self.num_tokens >= 2**31:
            raise LayoutError(
                f"{self.num_tokens} tokens in one pack; kernels count them in 32 bits, so split the batch"
            )
        key = (what, str(device))
        if key not in self._per_device:
            self._per_device[key] = torch.tensor(list(make or ()), dtype=torch.int32).to(device)
        return self._per_device[key]

    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor:
        """`offsets` as int32 [items + 1]; made once per device and kept."""
        return self._kept("offsets", device, self.offsets)

    def item_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """The item of every token, int32 [tokens]; made once per device and kept."""
        return self._kept("item_ids", device, (i for i, n in enumerate(self.lengths) for _ in range(n)))

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """0, 1, 2, ... inside each item, int32 [tokens]; made once per device and kept."""
        return self._kept("positions", device, (p for n in self.lengths for p in range(n)))

    def segments(self, device: torch.device | str = "cpu") -> Segments:
        """The boundaries as tensors, for code that torch.compile sees."""
        return Segments(self.cu_seqlens("cpu"), self.cu_seqlens(device), torch.tensor(self.max_length))

    def merged(self, size: int) -> Layout:
        """The layout after every size x size block of patches became one token.

        Raises:
            LayoutError: No grids, a size below 1, or a grid side that is not a multiple of size.
        """
        if _whole(size, "merge size") < 1:
            raise LayoutError(f"a merge size is at least 1, found {size}")
        if self.grids is None:
            raise LayoutError("only a layout with grids can be merged")
        for item, (_, h, w) in enumerate(self.grids):
            if h % size or w % size:
                raise LayoutError(
                    f"item {item}: a grid of {h}x{w} patches cannot be merged {size}x{size}; "
                    f"resize or pad the image to multiples of {size} patches"
                )
        return Layout.from_grids((t, h // size, w // size) for t, h, w in self.grids)

    def frames(self) -> Layout:
        """The layout in which every time step of an item is an item: (t, rows, columns) becomes t items (1, rows, columns).

        Raises:
            LayoutError: No grids.
        """
        if self.grids is None:
            raise LayoutError("only a layout with grids has frames")
        if all(t == 1 for t, _, _ in self.grids):
            return self
        return Layout.from_grids((1, h, w) for t, h, w in self.grids for _ in range(t))


def _items(values: Any) -> Iterable[Any]:
    """What lengths and grids are given as: a sequence, not a text and not one number."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise LayoutError(f"expected one entry per item, found {values!r}")
    return values


def _whole(value: Any, what: str) -> int:
    try:
        return index(value)
    except TypeError:
        raise LayoutError(f"{what}: expected a whole number, found {value!r}") from None


def _grid(grid: Any, item: int) -> tuple[int, int, int]:
    """(time, rows, columns), where time may be left out."""
    sides = [] if isinstance(grid, int) else [_whole(side, f"grid of item {item}") for side in _items(grid)]
    if len(sides) not in (2, 3):
        raise LayoutError(f"item {item}: a grid is (rows, columns) or (time, rows, columns), found {grid!r}")
    t, h, w = sides if len(sides) == 3 else [1, *sides]
    return t, h, w


@dataclass(frozen=True, eq=False)
class Packed:
    """Tokens of several items, end to end: `tokens` is [tokens, ...], `layout` says where each item starts."""

    tokens: Tensor
    layout: Layout

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, Tensor) or not isinstance(self.layout, Layout):
            found = f"{type(self.tokens).__name__} and {type(self.layout).__name__}"
            raise LayoutError(f"Packed is a tensor and its Layout, found {found}")
        if self.tokens.ndim < 1 or self.tokens.shape[0] != self.layout.num_tokens:
            raise LayoutError(
                f"the layout counts {self.layout.num_tokens} tokens, the tensor has shape {tuple(self.tokens.shape)}"
            )

    def with_tokens(self, tokens: Tensor) -> Packed:
        """The same items with other contents."""
        return Packed(tokens, self.layout)

    def unpack(self) -> list[Tensor]:
        """One view per item."""
        return list(self.tokens.split(list(self.layout.lengths)))

    def to(self, *args: torch.device | torch.dtype | str) -> Packed:
        return Packed(self.tokens.to(*args), self.layout)  # type: ignore[call-overload]

    @staticmethod
    def concat(parts: Sequence[Packed]) -> Packed:
        if not parts:
            raise EmptyBatchError("nothing to join")
        return Packed(torch.cat([p.tokens for p in parts]), Layout.concat([p.layout for p in parts]))


@dataclass(frozen=True, eq=False)
class Batch:
    """All that a model receives for one forward.

    Attributes:
        ids: Token ids [tokens], int64, one item per sequence. Image placeholders stand where the image's tokens will.
        patches: Flattened patches [patches, patch_dim] of all images and videos, in the order of their placeholders, in raster
            order; None without any. The grid of a video is (time, rows, columns).
        labels: [tokens], int64, aligned with ids: the loss of predicting ids[t + 1] is taken where labels[t + 1] is not -100,
            as on the Hub. The first token of an item never counts.
        positions: [tokens] or [tokens, axes]; None leaves them to the model: 0, 1, 2, ... in every sequence, or positions in
            time, row and column where the model has those.
        seconds: Seconds between the time steps of each item of patches, 0 for an image; None where nothing is known. Read by
            models whose positions follow the clock.

    Raises:
        EmptyBatchError: No sequences.
        LayoutError: Tensors of different lengths.
    """

    ids: Packed
    patches: Packed | None = None
    labels: Tensor | None = None
    positions: Tensor | None = None
    seconds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, packed in (("ids", self.ids), ("patches", self.patches)):
            if not isinstance(packed, Packed) and not (packed is None and name == "patches"):
                raise LayoutError(
                    f"{name} must be Packed, found {type(packed).__name__}; Packed(tensor, Layout((...))) makes one"
                )
        if self.ids.layout.num_items == 0:
            raise EmptyBatchError("a batch needs at least one sequence with one token")
        for name, value in (("ids", self.ids.tokens), ("labels", self.labels), ("positions", self.positions)):
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise LayoutError(f"{name} must be a tensor, found {type(value).__name__}")
            flat = value.ndim == 1 or (name == "positions" and value.ndim == 2)
            if not flat or value.dtype not in (torch.int64, torch.int32):
                raise LayoutError(f"{name} must be 1-D integers, found {value.dtype} {tuple(value.shape)}")
            if value.shape[0] != self.ids.layout.num_tokens:
                raise LayoutError(f"{name} has {value.shape[0]} rows for {self.ids.layout.num_tokens} tokens")
        if self.patches is not None and self.patches.layout.grids is None:
            raise LayoutError("patches need a layout with grids")
        if self.seconds is not None:
            object.__setattr__(self, "seconds", tuple(float(value) for value in self.seconds))
            items = 0 if self.patches is None else self.patches.layout.num_items
            if len(self.seconds) != items:
                raise LayoutError(f"seconds has {len(self.seconds)} entries for {items} images and videos")
            for item, step in enumerate(self.seconds):
                if not 0 <= step < math.inf:
                    raise LayoutError(f"item {item}: {step} seconds between its time steps; expected 0 or more")

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""

        def moved(value: Any) -> Any:
            return None if value is None else value.to(device)

        return Batch(moved(self.ids), moved(self.patches), moved(self.labels), moved(self.positions), self.seconds)

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """One batch with the sequences of all, in order. Labels and positions must be in all batches or in none."""
        if not batches:
            raise EmptyBatchError("nothing to join")
        joined: dict[str, Tensor | None] = {}
        for name in ("labels", "positions"):
            values = [getattr(b, name) for b in batches]
            missing = [i for i, v in enumerate(values) if v is None]
            if missing and len(missing) < len(values):
                raise LayoutError(f"batch {missing[0]} has no {name}, others have; give them to all or to none")
            joined[name] = None if missing else torch.cat(values)
        visual = [(b.patches.layout, b.seconds) for b in batches if b.patches is not None]
        seconds: tuple[float, ...] | None = None
        if any(known is not None for _, known in visual):
            for layout, known in visual:
                if known is None and any(t > 1 for t, _, _ in layout.grids or ()):
                    raise LayoutError("a batch has a video but no seconds, others have; give them to all or to none")
            seconds = tuple(value for layout, known in visual for value in known or (0.0,) * layout.num_items)
        patches = [b.patches for b in batches if b.patches is not None]
        return Batch(
            ids=Packed.concat([b.ids for b in batches]),
            patches=Packed.concat(patches) if patches else None,
            labels=joined["labels"],
            positions=joined["positions"],
            seconds=seconds,
        )
