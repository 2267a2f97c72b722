"""The sdpa attention backend: fused kernels that run everywhere, never a tokens x tokens mask.

    CPU        blocks of items of like length -> the kernel of F.scaled_dot_product_attention -> [tokens, heads, value_dim]
    elsewhere  runs of equal items -> F.scaled_dot_product_attention, which chooses a kernel -> [tokens, heads, value_dim]

Under torch.compile both are one operator of the graph with its own backward; it takes the boundaries of items as a
tensor, so that new lengths are new data, not a new graph.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.layers.attention_blocks import plan_blocks, put, take
from vlkit.layers.attention_inputs import (
    check_tokens,
    needs_gradients,
    pad_channels,
    read_lengths,
    read_offsets,
    wide_dtype,
)
from vlkit.packing import Layout, Segments

# ---- on the CPU: the kernel that F.scaled_dot_product_attention uses, called block by block -------------------------

cpu_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [tokens, heads, value_dim], logsumexp [tokens, heads])."""
    check_tokens(q, lengths)
    value_dim, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    q, k, v = pad_channels(q, width), pad_channels(k, width), pad_channels(v, width)  # the kernel knows one width
    plan = plan_blocks(lengths, q.shape[1] * width)
    outs: Tensor | None = None
    lses: Tensor | None = None
    for block in plan:
        # A causal item never looks at its padding, which comes last.
        mask = None if block.mask is None or causal else block.mask.to(q.dtype)
        out, lse = cpu_kernel(take(q, block), take(k, block), take(v, block), 0.0, causal, attn_mask=mask, scale=scale)
        out, lse = out.transpose(1, 2)[..., :value_dim], lse.transpose(1, 2)  # [rows, length, heads, .]
        if block.gather is None and len(plan) == 1:
            return out.flatten(0, 1).contiguous(), lse.flatten(0, 1).contiguous()
        if outs is None or lses is None:
            outs, lses = q.new_empty(*q.shape[:2], value_dim), lse.new_empty(q.shape[:2])
        put(outs, out, block)
        put(lses, lse, block)
    if outs is None or lses is None:
        return q.new_empty(0, q.shape[1], value_dim), q.new_empty(0, q.shape[1], dtype=wide_dtype(q))
    return outs, lses


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = q, k, v
    width = max(q.shape[-1], v.shape[-1])
    q, k, v, out, grad = (pad_channels(x, width) for x in (q, k, v, out, grad))
    grads = tuple(x.new_empty(x.shape) for x in wanted)
    for block in plan_blocks(lengths, q.shape[1] * width):
        # In half precision the kernel's backward is four times less precise, and for small items ten times slower.
        taken = [take(x, block).to(wide_dtype(x)) for x in (grad, q, k, v, out)]
        mask = None if block.mask is None or causal else block.mask.to(taken[0].dtype)
        lses = take(lse[..., None], block).squeeze(-1)  # [rows, heads, length]
        if block.mask is not None:
            # No loss comes from padding, and it attends to nothing: under a causal mask it would see more keys than the
            # token that it repeats, whose logsumexp it has, and infinite probabilities times no loss would be NaN.
            taken[0] = taken[0] * (block.mask == 0).transpose(2, 3)
            lses = lses.masked_fill(block.mask[:, 0] != 0, float("inf"))
        parts = _cpu_kernel_backward(*taken, lses, 0.0, causal, attn_mask=mask, scale=scale)
        for whole, part in zip(grads, parts, strict=True):
            put(whole, part.transpose(1, 2)[..., : whole.shape[-1]], block)
    return grads[0], grads[1], grads[2]


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, scale: float
    ) -> Tensor:
        out, lse = _forward(q, k, v, lengths, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = (lengths, causal, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


# ---- elsewhere: torch's own choice of kernel, one call for a run of equal items -------------------------------------


def _by_runs(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, scale: float) -> Tensor:
    check_tokens(q, lengths)
    if not lengths:
        return q.new_empty(0, q.shape[1], v.shape[-1])
    runs = [(len(list(run)), length) for length, run in groupby(lengths)]
    sizes = [count * length for count, length in runs]
    outs = []
    for (count, length), *parts in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        rows = (x.view(count, length, *x.shape[1:]) for x in parts)
        outs.append(attend_rows(*rows, causal=causal, scale=scale).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """Items of equal lengths, [items, length, heads, dim]; queries fewer than keys are the last positions."""
    mask = None
    if causal and 1 < q.shape[1] != k.shape[1]:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
    value_dim, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    if q.device.type == "cpu":  # without one width the CPU falls back to a kernel that keeps all scores
        q, k, v = pad_channels(q, width), pad_channels(k, width), pad_channels(v, width)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None and q.shape[1] > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)[..., :value_dim]


# ---- under torch.compile --------------------------------------------------------------------------------------------


@torch.library.custom_op("vlkit::attention", mutates_args=())
def _operator(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return _forward(q, k, v, read_offsets(offsets), causal, scale)
    out = _by_runs(q, k, v, read_offsets(offsets), causal, scale)
    return out.contiguous(), q.new_empty(q.shape[:2], dtype=wide_dtype(q))  # the backward computes the scores again


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=wide_dtype(q))


@torch.library.custom_op("vlkit::attention_backward", mutates_args=())
def _operator_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = read_offsets(offsets)
    if q.device.type == "cpu":
        return _backward(grad, q, k, v, out, lse, lengths, causal, scale)
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        again = _by_runs(q, k, v, lengths, causal, scale)
    dq, dk, dv = torch.autograd.grad(again, (q, k, v), grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_operator_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, causal, scale = inputs
    ctx.save_for_backward(q, k, v, *output, offsets)
    ctx.options = (causal, scale)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_operator_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


_operator.register_autograd(_differentiate, setup_context=_keep)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout | Segments, causal: bool, scale: float) -> Tensor:
    if torch.compiler.is_compiling() or q.is_meta:
        offsets = layout.cu_seqlens("cpu") if isinstance(layout, Layout) else layout.offsets
        return _operator(q, k, v, offsets, causal, scale)[0]
    lengths = read_lengths(layout)
    if q.device.type != "cpu":
        return _by_runs(q, k, v, lengths, causal, scale)
    if needs_gradients(q, k, v):
        return _CpuAttention.apply(q, k, v, lengths, causal, scale)
    return _forward(q, k, v, lengths, causal, scale)[0]
