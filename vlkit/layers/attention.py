"""The one attention function: every item attends to itself, whatever the kernel.

    q, k, v [tokens, heads, head_dim] + a layout -> attention(...) -> [tokens, heads, value_dim]

    backend   runs on                         how
    plain     everything                      one item after another in fp32 (fp64 for fp64 input); the reference
    sdpa      everything                      fused kernel over items of like length; never a tokens x tokens mask
    varlen    CUDA, fp16 and bf16             torch.nn.attention.varlen
    flash     CUDA, fp16 and bf16             flash-attn's variable-length kernel, an optional package
    flex      CUDA; CPU without gradients     compiled flex_attention over blocks
    auto                                      what choose_backend(...) says

Items are isolated: what one item holds changes no bit of another. This file checks arguments and chooses a backend; the
backends are in attention_plain.py, attention_sdpa.py and attention_fused.py, decoding in attention_cache.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vlkit.errors import BackendError, LayoutError
from vlkit.layers.attention_cache import attend_cached
from vlkit.layers.attention_fused import attend_flash, attend_flex, attend_varlen, why_not_flash, why_not_varlen
from vlkit.layers.attention_inputs import heads_fit, read_lengths
from vlkit.layers.attention_plain import attend_plain
from vlkit.layers.attention_sdpa import attend_sdpa
from vlkit.layers.autocast import autocast_dtype
from vlkit.packing import Layout, Segments

Backend = Literal["auto", "plain", "sdpa", "varlen", "flash", "flex"]

_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Layout | Segments, bool, float], Tensor]] = {
    "plain": attend_plain,
    "sdpa": attend_sdpa,
    "varlen": attend_varlen,
    "flash": attend_flash,
    "flex": attend_flex,
}


def attention(
    q: Float[Tensor, "tokens heads head_dim"],
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout | Segments,
    causal: bool = False,
    scale: float | None = None,
    backend: Backend = "auto",
    key_lengths: Sequence[int] | None = None,
) -> Float[Tensor, "tokens heads value_dim"]:
    """softmax(scale q k^T) v inside every item.

    Args:
        q: Queries.
        k: Keys [tokens, kv_heads, head_dim]; query head h reads key head h // (heads / kv_heads).
        v: Values [tokens, kv_heads, value_dim].
        layout: The items. Code that torch.compile sees passes `layout.segments(device)`.
        causal: A token sees itself and what comes before it in its item.
        scale: Factor of the scores; None means head_dim ** -0.5.
        backend: See the top of this file.
        key_lengths: For decoding from a cache. k and v are then [items, capacity, kv_heads, .], of which the first
            key_lengths[i] rows of item i count, and the queries of an item are its last positions. Rows beyond are
            never read.

    Raises:
        LayoutError: Shapes that do not fit the layout or each other.
        BackendError: A backend that cannot run these inputs here; the message says why.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    narrow = autocast_dtype(q)
    if narrow is not None and q.dtype != torch.float64:
        q, k, v = (x.to(narrow) for x in (q, k, v))  # as torch's own attention does
    elif not q.dtype == k.dtype == v.dtype:
        raise LayoutError(f"attention: q is {q.dtype}, k {k.dtype} and v {v.dtype}; expected one dtype")
    if backend == "auto":
        backend = choose_backend(q, k, v)
    if backend not in _BACKENDS:
        raise BackendError(f"attention backend {backend!r} is not one of auto, {', '.join(_BACKENDS)}")
    if key_lengths is not None:
        return attend_cached(q, k, v, read_lengths(layout), key_lengths, causal, scale, plain=backend == "plain")
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1] != v.shape[1] or not heads_fit(q, k):
        raise LayoutError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other; expected "
            "[tokens, heads, head_dim], [tokens, kv_heads, head_dim] and [tokens, kv_heads, value_dim], "
            "heads a multiple of kv_heads"
        )
    return _BACKENDS[backend](q, k, v, layout, causal, scale)


def choose_backend(q: Tensor, k: Tensor, v: Tensor) -> Literal["sdpa", "varlen", "flash"]:
    """The backend that "auto" stands for with such inputs on this machine.

    A fused variable-length kernel where one runs (flash-attn if it is installed, else torch's own), sdpa everywhere
    else.
    """
    if q.device.type != "cuda":
        return "sdpa"
    if why_not_flash(q, k, v) is None:
        return "flash"
    return "varlen" if why_not_varlen(q, k, v) is None else "sdpa"
