"""The attention backends for GPUs: torch's varlen attention, flash-attn and flex_attention.

    q, k, v [tokens, heads, head_dim], boundaries of items -> one kernel over the whole pack -> [tokens, heads, value_dim]

All three on CUDA have been written against their documentation and tested for how they are called, not on a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from vlkit.errors import BackendError
from vlkit.layers.attention_inputs import check_tokens, needs_gradients, pad_channels, read_lengths
from vlkit.packing import Layout, Segments


def _why_not_fused(q: Tensor, v: Tensor) -> str | None:
    """Why a fused variable-length kernel cannot run; None if it can."""
    if q.device.type != "cuda":
        return f"it runs on CUDA, the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes fp16 and bf16, q is {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"its heads have at most 256 channels, these have {max(q.shape[-1], v.shape[-1])}"
    major, minor = torch.cuda.get_device_capability(q.device)
    if major < 8:
        return f"it needs compute capability 8.0, this device has {major}.{minor}"
    return None


def why_not_varlen(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why torch's varlen attention cannot run; None if it can."""
    try:
        parameters = _varlen_parameters()
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    missing = {"window_size", "scale", "enable_gqa"} - parameters
    if missing:
        return f"varlen_attn of torch {torch.__version__} has no {', '.join(sorted(missing))}; use torch 2.12 or later"
    return _why_not_fused(q, v)


def why_not_flash(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why flash-attn cannot run; None if it can."""
    try:
        _flash_attn_kernel()
    except ImportError:
        return "flash-attn is not installed; pip install 'vlkit[flash]' builds it where CUDA is"
    return _why_not_fused(q, v)


@cache
def _varlen_parameters() -> frozenset[str]:
    return frozenset(inspect.signature(_varlen_kernel()).parameters)


def _varlen_kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _flash_attn_kernel() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def _device_offsets(q: Tensor, layout: Layout | Segments) -> tuple[Tensor, int]:
    """(boundaries on the device of q, the longest item).

    In a graph the longest item is not known; all tokens are an upper bound, and a bound is all that the kernels need.
    """
    if torch.compiler.is_compiling():
        return layout.cu_seqlens(q.device) if isinstance(layout, Layout) else layout.device_offsets, q.shape[0]
    if isinstance(layout, Layout):
        check_tokens(q, layout.lengths)
        return layout.cu_seqlens(q.device), layout.max_length
    return layout.device_offsets, int(layout.longest)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout | Segments, causal: bool, scale: float) -> Tensor:
    reason = why_not_varlen(q, k, v)
    if reason is not None:
        raise BackendError(f"attention backend 'varlen' cannot run: {reason}")
    offsets, longest = _device_offsets(q, layout)
    value_dim, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    out = _varlen_kernel()(
        pad_channels(q, width),
        pad_channels(k, width),
        pad_channels(v, width),
        offsets,
        offsets,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[..., :value_dim]


def attend_flash(q: Tensor, k: Tensor, v: Tensor, layout: Layout | Segments, causal: bool, scale: float) -> Tensor:
    reason = why_not_flash(q, k, v)
    if reason is not None:
        raise BackendError(f"attention backend 'flash' cannot run: {reason}")
    offsets, longest = _device_offsets(q, layout)
    value_dim, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    out = _flash_attn_kernel()(
        pad_channels(q, width),
        pad_channels(k, width),
        pad_channels(v, width),
        cu_seqlens_q=offsets,
        cu_seqlens_k=offsets,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=causal,
    )
    return out[..., :value_dim]


@cache
def _flex_kernel() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout | Segments, causal: bool, scale: float) -> Tensor:
    if q.device.type == "cpu" and needs_gradients(q, k, v):
        raise BackendError("attention backend 'flex' cannot run: on the CPU it has no backward; use 'sdpa'")
    lengths = read_lengths(layout)
    check_tokens(q, lengths)
    if not lengths:
        return q.new_empty(0, q.shape[1], v.shape[-1])
    out = _flex_kernel()(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        block_mask=_block_mask(lengths, causal, q.device),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


@lru_cache(maxsize=16)
def _block_mask(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    item = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = item[query] == item[key]
        return same & (query >= key) if causal else same

    return create_block_mask(visible, None, None, len(item), len(item), device=str(device))
