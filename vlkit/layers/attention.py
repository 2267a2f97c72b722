"""The one attention function: every item attends to itself, whatever the kernel.

    q, k, v [tokens, heads, head_dim] + a layout -> attention(...) -> [tokens, heads, value_dim]

    backend   where it runs                    how
    plain     anywhere                         fp32 (fp64 for fp64), one item after another; the reference
    sdpa      anywhere                         fused kernel over items of equal length together; never a tokens x tokens mask
    varlen    CUDA, fp16 and bf16              torch.nn.attention.varlen
    flash     CUDA, fp16 and bf16              flash-attn's variable-length kernel (optional package)
    flex      CUDA, CPU without gradients      compiled flex_attention with a block mask
    auto      choose_backend(...)

Under torch.compile the sdpa backend is one operator of the graph with its own backward. It takes the item boundaries as a tensor,
so new lengths are new data, not a new graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.errors import BackendError, LayoutError
from vlkit.layers.rope import Pairing, Rotary, apply_rotary
from vlkit.packing import Layout, Segments

Backend = Literal["auto", "plain", "sdpa", "varlen", "flash", "flex"]


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
    """softmax(scale q k^T) v inside every item, with the softmax in fp32.

    Args:
        q: Queries.
        k: Keys [tokens, kv_heads, head_dim]; heads is a multiple of kv_heads, and query head h reads key head h // (heads / kv_heads).
        v: Values [tokens, kv_heads, value_dim].
        layout: The items. Code that torch.compile sees passes `layout.segments(device)`.
        causal: A token sees itself and what comes before it in its item.
        scale: Factor of the scores; None means head_dim ** -0.5.
        backend: See the top of this file.
        key_lengths: Decoding from a cache. k and v are then [items, capacity, kv_heads, .], of which the first key_lengths[i] rows of
            item i count, and the queries of an item are its last positions.

    Raises:
        LayoutError: Shapes that do not fit the layout or each other.
        BackendError: A backend that cannot run these inputs here; the message says why.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if key_lengths is not None:
        return _cached_attention(q, k, v, _lengths(layout), key_lengths, causal, scale, backend)
    if (
        q.shape[1] % k.shape[1]
        or k.shape[1] != v.shape[1]
        or q.shape[-1] != k.shape[-1]
        or not len(q) == len(k) == len(v)
    ):
        raise LayoutError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit each other; expected "
            "[tokens, heads, head_dim], [tokens, kv_heads, head_dim], [tokens, kv_heads, value_dim] with heads a multiple of kv_heads"
        )
    if backend == "auto":
        backend = choose_backend(q, k, v)
    if backend == "sdpa":
        return _sdpa(q, k, v, layout, causal, scale)
    if backend == "plain":
        return _plain(q, k, v, _lengths(layout), causal, scale)
    raise BackendError(f"attention backend {backend!r} is not one of plain, sdpa, varlen, flash, flex, auto")


def choose_backend(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend that "auto" stands for with these inputs on this machine."""
    return "sdpa"


def _lengths(layout: Layout | Segments) -> tuple[int, ...]:
    if isinstance(layout, Layout):
        return layout.lengths
    offsets = layout.offsets.tolist()
    return tuple(b - a for a, b in zip(offsets, offsets[1:], strict=False))


def _check_tokens(q: Tensor, lengths: tuple[int, ...]) -> None:
    if sum(lengths) != q.shape[0]:
        raise LayoutError(f"attention: the layout counts {sum(lengths)} tokens, q has {q.shape[0]}")


# ---------------------------------------------------------------------------------------------------------------------- plain


def _plain(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, scale: float) -> Tensor:
    _check_tokens(q, lengths)
    if not lengths:
        return q.new_empty(0, q.shape[1], v.shape[-1])
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_plain_item(*part, causal=causal, scale=scale) for part in parts])


def _plain_item(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """One item; k and v may be longer than q, whose tokens are then the last positions."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) * scale
    if causal:
        hidden = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v.to(wide)).to(q.dtype)


# ----------------------------------------------------------------------------------------------------------------------- sdpa


class _Block(NamedTuple):
    """Items that one kernel call computes: `count` rows of `length` tokens.

    Attributes:
        first: First token when the items lie end to end with equal lengths; unused otherwise.
        index: int64 [count * length], the token of every place; None when the items lie end to end. Padding repeats the item's own
            first token, so that nothing of one item, not even a NaN, can reach another.
        real: int64, the places that are not padding, and the tokens there (`tokens`); None without padding.
        mask: [count, 1, 1, length], 0 at tokens and -inf at padding; None without padding.
    """

    count: int
    length: int
    first: int
    index: Tensor | None = None
    real: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None


_GATHER_BELOW = 16384  # elements of one item's queries below which a kernel call costs more than gathering (measured)


@lru_cache(maxsize=512)
def _plan(lengths: tuple[int, ...], gather_below: int) -> tuple[_Block, ...]:
    """Blocks that cover all items: runs of equal neighbours as views, small items gathered by similar length."""
    starts = (0, *accumulate(lengths))
    blocks: list[_Block] = []
    small: list[int] = []
    item = 0
    for length, run in groupby(lengths):
        count = len(list(run))
        if length >= gather_below or count == len(lengths):
            blocks.append(_Block(count, length, starts[item]))
        else:
            small.extend(range(item, item + count))
        item += count
    small.sort(key=lambda i: lengths[i])
    while small:
        # Padding up to a quarter of an item, or a few tokens, costs less than another call.
        limit = max(lengths[small[0]] * 1.25, lengths[small[0]] + 8)
        bucket = [i for i in small if lengths[i] <= limit]
        small = small[len(bucket) :]
        if len(bucket) == 1:
            blocks.append(_Block(1, lengths[bucket[0]], starts[bucket[0]]))
        else:
            blocks.append(_gathered([starts[i] for i in bucket], [lengths[i] for i in bucket]))
    return tuple(blocks)


def _gathered(starts: list[int], lengths: list[int]) -> _Block:
    place = torch.arange(max(lengths))
    inside = place < torch.tensor(lengths)[:, None]  # [count, longest]
    index = (torch.tensor(starts)[:, None] + place * inside).flatten()
    if len(set(lengths)) == 1:
        return _Block(len(lengths), lengths[0], -1, index)
    real = inside.flatten().nonzero().flatten()
    mask = torch.zeros(inside.shape).masked_fill(~inside, float("-inf"))[:, None, None]
    return _Block(len(lengths), max(lengths), -1, index, real, index[real], mask)


def _take(x: Tensor, block: _Block) -> Tensor:
    """The block's tokens as [count, heads, length, dim]."""
    if block.index is None:
        x = x.narrow(0, block.first, block.count * block.length)
    else:
        x = x.index_select(0, block.index.to(x.device))
    return x.view(block.count, block.length, *x.shape[1:]).transpose(1, 2)


def _put(whole: Tensor, part: Tensor, block: _Block) -> None:
    """Write [count, length, heads, ...] into the block's tokens of [tokens, heads, ...]."""
    part = part.reshape(block.count * block.length, *part.shape[2:])
    if block.index is None:
        whole.narrow(0, block.first, block.count * block.length).copy_(part)
    elif block.real is None:
        whole.index_copy_(0, block.index, part)
    else:
        whole.index_copy_(0, block.tokens, part.index_select(0, block.real))


def _widen(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))


_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [tokens, heads, value_dim], logsumexp [tokens, heads]) by the CPU's fused kernel."""
    _check_tokens(q, lengths)
    value_dim, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    q, k, v = _widen(q, width), _widen(k, width), _widen(v, width)  # the kernel knows one width; zeros change nothing
    plan = _plan(lengths, _GATHER_BELOW // (q.shape[1] * width))
    whole: tuple[Tensor, Tensor] | None = None
    for block in plan:
        mask = None if block.mask is None or causal else block.mask.to(q.dtype)  # causal: the padding comes last anyway
        out, lse = _cpu_flash(
            _take(q, block), _take(k, block), _take(v, block), 0.0, causal, attn_mask=mask, scale=scale
        )
        out, lse = out.transpose(1, 2)[..., :value_dim], lse.transpose(1, 2)  # [count, length, heads, .]
        if block.index is None and len(plan) == 1:
            return out.reshape(*q.shape[:2], value_dim).contiguous(), lse.reshape(q.shape[:2]).contiguous()
        if whole is None:
            whole = out.new_empty(*q.shape[:2], value_dim), lse.new_empty(q.shape[:2])
        _put(whole[0], out, block)
        _put(whole[1], lse, block)
    if whole is None:
        return q.new_empty(*q.shape[:2], value_dim), q.new_empty(q.shape[:2])
    return whole


def _blocks_backward(
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
    dims = q.shape[-1], k.shape[-1], v.shape[-1]
    width = max(dims)
    q, k, v, out, grad = (_widen(x, width) for x in (q, k, v, out, grad))
    plan = _plan(lengths, _GATHER_BELOW // (q.shape[1] * width))
    whole: list[Tensor] | None = None
    for block in plan:
        mask = None if block.mask is None or causal else block.mask.to(q.dtype)
        grad_block = _take(grad, block)
        if block.mask is not None:
            grad_block = grad_block * (block.mask == 0).transpose(2, 3)  # padding has no loss
        parts = _cpu_flash_backward(
            grad_block,
            *(_take(x, block) for x in (q, k, v, out)),
            _take(lse[..., None], block).squeeze(-1),
            0.0,
            causal,
            attn_mask=mask,
            scale=scale,
        )
        cut = [part.transpose(1, 2)[..., :dim] for part, dim in zip(parts, dims, strict=True)]
        if block.index is None and len(plan) == 1:
            return tuple(part.flatten(0, 1) for part in cut)  # type: ignore[return-value]
        if whole is None:
            whole = [x.new_empty(*x.shape[:2], dim) for x, dim in zip((q, k, v), dims, strict=True)]
        for target, part in zip(whole, cut, strict=True):
            _put(target, part, block)
    if whole is None:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    return whole[0], whole[1], whole[2]


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, scale: float
    ) -> Tensor:
        out, lse = _blocks_forward(q, k, v, lengths, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = (lengths, causal, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_blocks_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


@torch.library.custom_op("vlkit::segment_attention", mutates_args=())
def _segment_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return _blocks_forward(q, k, v, _lengths(Segments(offsets, offsets, offsets)), causal, scale)


@_segment_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=wide)


@torch.library.custom_op("vlkit::segment_attention_backward", mutates_args=())
def _segment_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = _lengths(Segments(offsets, offsets, offsets))
    grads = _blocks_backward(grad, q, k, v, out, lse, lengths, causal, scale)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_segment_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, causal, scale = inputs
    ctx.save_for_backward(q, k, v, *output, offsets)
    ctx.options = (causal, scale)


def _operator_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_segment_attention_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


_segment_attention.register_autograd(_operator_backward, setup_context=_keep_for_backward)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout | Segments, causal: bool, scale: float) -> Tensor:
    if torch.compiler.is_compiling():
        offsets = layout.cu_seqlens("cpu") if isinstance(layout, Layout) else layout.offsets
        return _segment_attention(q, k, v, offsets, causal, scale)[0]
    lengths = _lengths(layout)
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _BlockAttention.apply(q, k, v, lengths, causal, scale)  # type: ignore[no-untyped-call]
        return _blocks_forward(q, k, v, lengths, causal, scale)[0]
    _check_tokens(q, lengths)
    if not lengths:
        return q.new_empty(0, q.shape[1], v.shape[-1])
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_sdpa_item(*part, causal=causal, scale=scale) for part in parts])


def _sdpa_item(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """One item through torch's own choice of kernel; k and v may be longer than q."""
    mask = None
    if causal and 1 < len(q) != len(k):
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    out = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        attn_mask=mask,
        is_causal=causal and mask is None and len(q) > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


# ------------------------------------------------------------------------------------------------------------- from a cache


def _cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    key_lengths: Sequence[int],
    causal: bool,
    scale: float,
    backend: Backend,
) -> Tensor:
    _check_tokens(q, lengths)
    if not len(lengths) == len(key_lengths) == k.shape[0] == v.shape[0]:
        raise LayoutError(
            f"attention: {len(lengths)} items, {len(key_lengths)} key lengths and a cache of {k.shape[0]} items; expected one of each"
        )
    for item, (length, known) in enumerate(zip(lengths, key_lengths, strict=True)):
        if not length <= known <= k.shape[1]:
            raise LayoutError(
                f"attention: item {item} has {length} queries and {known} keys in a cache of {k.shape[1]} places; "
                "expected queries <= keys <= places"
            )
    run = _plain_item if backend == "plain" else _sdpa_item
    parts = [
        run(part, k[item, :known], v[item, :known], causal=causal, scale=scale)
        for item, (part, known) in enumerate(zip(q.split(lengths), key_lengths, strict=True))
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


# ------------------------------------------------------------------------------------------------------------ as a module


class SelfAttention(nn.Module):
    """Multi-head attention of a tower: every patch sees all patches of its item.

    Args:
        dim: Width of input and output.
        num_heads: Must divide dim.
        bias: Whether the four projections have one.
        pairing: Which channels the rotary embedding turns together, see `apply_rotary`.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool = True, pairing: Pairing = "half") -> None:
        super().__init__()
        self.num_heads, self.pairing = num_heads, pairing
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(dim, dim, bias=bias)
        self.v = nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        rotary: Rotary | None,
        layout: Layout | Segments,
        *,
        backend: Backend = "auto",
    ) -> Float[Tensor, "tokens dim"]:
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q, self.k, self.v))
        if rotary is not None:
            q, k = apply_rotary(q, rotary, pairing=self.pairing), apply_rotary(k, rotary, pairing=self.pairing)
        return self.out(attention(q, k, v, layout=layout, backend=backend).flatten(-2))
