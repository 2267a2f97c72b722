"""The plain attention backend: the formula in fp32 (fp64 for fp64 input), one item after another; the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from vlkit.layers.attention_inputs import check_tokens, read_lengths, wide_dtype
from vlkit.packing import Layout, Segments


def attend_plain(q: Tensor, k: Tensor, v: Tensor, layout: Layout | Segments, causal: bool, scale: float) -> Tensor:
    """Every item by `attend_plain_item`; arguments as those of `attention`."""
    lengths = read_lengths(layout)
    check_tokens(q, lengths)
    if not lengths:
        return q.new_empty(0, q.shape[1], v.shape[-1])
    items = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([attend_plain_item(*item, causal=causal, scale=scale) for item in items])


def attend_plain_item(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """One item; where k and v are longer than q, the queries are the last positions."""
    wide = wide_dtype(q)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) * scale
    if causal:
        later = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(later, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v.to(wide)).to(q.dtype)
