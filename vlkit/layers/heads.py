"""What the weights of an attention are made of: the heads in their rows or columns, and which channels a head has.

Optimizers ask it, for updates head by head and to keep attention logits small.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Heads(NamedTuple):
    """Heads side by side in a weight.

    Attributes:
        num_heads: How many.
        channels: What a head is made of, in order: (role, number of channels). Roles are "q", "k" and "v", with "_nope" or
            "_rope" where only some channels are rotated.
    """

    num_heads: int
    channels: tuple[tuple[str, int], ...]


class HeadAxis(NamedTuple):
    """The rows (axis 0) or columns (axis 1) of a weight, as heads. Several entries are a fused weight."""

    axis: Literal[0, 1]
    heads: tuple[Heads, ...]


def head_rows(role: str, num_heads: int, channels: int) -> HeadAxis:
    """Rows of a projection into heads of one kind."""
    return HeadAxis(0, (Heads(num_heads, ((role, channels),)),))


def head_columns(num_heads: int, channels: int) -> HeadAxis:
    """Columns of the projection that joins the heads' values."""
    return HeadAxis(1, (Heads(num_heads, (("v", channels),)),))
