"""What every attention backend reads from its inputs: lengths, whether shapes fit, widths and dtypes."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.errors import LayoutError
from vlkit.packing import Layout, Segments


def read_lengths(layout: Layout | Segments) -> tuple[int, ...]:
    """Tokens of each item."""
    return layout.lengths if isinstance(layout, Layout) else read_offsets(layout.offsets)


def read_offsets(offsets: Tensor) -> tuple[int, ...]:
    """Tokens of each item, from boundaries [items + 1] on the host."""
    return tuple(b - a for a, b in pairwise(offsets.tolist()))


def check_tokens(q: Tensor, lengths: tuple[int, ...]) -> None:
    if sum(lengths) != q.shape[0]:
        raise LayoutError(f"attention: the layout counts {sum(lengths)} tokens, q has {q.shape[0]}")


def heads_fit(q: Tensor, k: Tensor) -> bool:
    """Whether queries [..., heads, head_dim] have the width of the keys and whole groups of heads per key head."""
    return q.shape[-1] == k.shape[-1] and q.shape[1] % k.shape[-2] == 0


def needs_gradients(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def pad_channels(x: Tensor, dim: int) -> Tensor:
    """Zero channels up to dim: they add nothing to a score, and nothing to the channels before them."""
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums and softmax are computed in: fp32, or fp64 for fp64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
