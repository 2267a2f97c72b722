"""Attention of new tokens to a cache: q [tokens, heads, head_dim] against rows [items, capacity, kv_heads, head_dim].

One query per item, the common step of decoding, goes into one kernel call where items are of one length or short;
several queries per item go item by item. Rows beyond an item's length are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.errors import LayoutError
from vlkit.layers.attention_blocks import gather_block
from vlkit.layers.attention_inputs import check_tokens, heads_fit, pad_channels
from vlkit.layers.attention_plain import attend_plain_item
from vlkit.layers.attention_sdpa import attend_rows, cpu_kernel

_COPY_BELOW = 65536  # bytes of one item's keys that are copied sooner than a kernel is called again


def attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    key_lengths: Sequence[int],
    causal: bool,
    scale: float,
    *,
    plain: bool,
) -> Tensor:
    """Queries against the cache.

    Args:
        plain: By the reference, item after item; otherwise by sdpa, which serves for the other fused backends too: their
            kernels want packed keys.
    """
    if not heads_fit(q, k) or k.shape[:3] != v.shape[:3]:
        raise LayoutError(
            f"attention: q {tuple(q.shape)} does not fit a cache of keys {tuple(k.shape)} and values {tuple(v.shape)}; "
            "expected [tokens, heads, head_dim], [items, capacity, kv_heads, head_dim] and "
            "[items, capacity, kv_heads, value_dim]"
        )
    check_tokens(q, lengths)
    if not len(lengths) == len(key_lengths) == k.shape[0]:
        raise LayoutError(
            f"attention: {len(lengths)} items, {len(key_lengths)} key lengths and a cache of {k.shape[0]} items; "
            "expected one of each"
        )
    for item, (length, known) in enumerate(zip(lengths, key_lengths, strict=True)):
        if not length <= known <= k.shape[1]:
            raise LayoutError(
                f"attention: item {item} has {length} queries and {known} keys in a cache of {k.shape[1]} places; "
                "expected queries <= keys <= places"
            )
    if not plain and len(lengths) == q.shape[0]:
        return _decode(q, k, v, tuple(key_lengths), scale)
    outs = []
    for item, (part, known) in enumerate(zip(q.split(lengths), key_lengths, strict=True)):
        keys, values = k[item, :known], v[item, :known]
        if plain:
            outs.append(attend_plain_item(part, keys, values, causal=causal, scale=scale))
        else:
            outs.append(attend_rows(part[None], keys[None], values[None], causal=causal, scale=scale)[0])
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _decode(q: Tensor, k: Tensor, v: Tensor, key_lengths: tuple[int, ...], scale: float) -> Tensor:
    """One query per item [items, heads, head_dim]. Heads that share a key head become the queries of one row."""
    items, heads, _ = q.shape
    kv_heads, value_dim = v.shape[-2], v.shape[-1]
    q = q.view(items, kv_heads, heads // kv_heads, -1)
    if v.data_ptr() == k.data_ptr() and v.stride() == k.stride():
        v = k  # values are the first channels of the keys, as in latent attention: no copy makes the widths equal
    longest = max(key_lengths)
    if min(key_lengths) == longest:
        k, v = k.narrow(1, 0, longest), v.narrow(1, 0, longest)
        out = _one_query(q, k, v, None, scale)
    elif longest * k.shape[-1] * kv_heads * k.element_size() < _COPY_BELOW:
        index, mask = _rows_of_cache(key_lengths, k.shape[1], k.device)
        rows = [
            x.flatten(0, 1).index_select(0, index).view(items, -1, *x.shape[2:]) for x in ((k,) if v is k else (k, v))
        ]
        out = _one_query(q, rows[0], rows[-1], mask.to(q.dtype), scale)
    else:
        out = torch.cat(
            [
                _one_query(q[i : i + 1], k[i : i + 1, :known], v[i : i + 1, :known], None, scale)
                for i, known in enumerate(key_lengths)
            ]
        )
    return (out if out.shape[-1] == value_dim else out[..., :value_dim]).reshape(items, heads, value_dim)


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if q.shape[-1] != v.shape[-1]:
        width = max(q.shape[-1], v.shape[-1])
        q, k, v = pad_channels(q, width), pad_channels(k, width), pad_channels(v, width)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu":
        return cpu_kernel(q, k, v, 0.0, False, attn_mask=mask, scale=scale)[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@lru_cache(maxsize=8)  # all layers of a step ask for the same
def _rows_of_cache(key_lengths: tuple[int, ...], capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(where the rows of all items lie in [items * capacity], mask): padded as in `Block`."""
    block = gather_block([i * capacity for i in range(len(key_lengths))], list(key_lengths))
    assert block.gather is not None
    assert block.mask is not None
    return block.gather.to(device), block.mask.to(device)
