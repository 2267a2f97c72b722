"""The one attention function: every item attends to itself, whatever the kernel.

    q, k, v [tokens, heads, head_dim] + a layout -> attention(...) -> [tokens, heads, value_dim]

    backend   runs on                         how
    plain     everything                      one item after another in fp32 (fp64 for fp64 input); the reference
    sdpa      everything                      fused kernel over items of like length; never a tokens x tokens mask
    varlen    CUDA, fp16 and bf16             torch.nn.attention.varlen
    flash     CUDA, fp16 and bf16             flash-attn's variable-length kernel, an optional package
    flex      CUDA; CPU without gradients     compiled flex_attention over blocks
    auto                                      what choose_backend(...) says

Items are isolated: what one item holds changes no bit of another. Under torch.compile the sdpa backend is one operator
of the graph with its own backward; it takes the boundaries of items as a tensor, so that new lengths are new data, not
a new graph.

varlen, flash and flex on CUDA have been written against their documentation and tested for how they are called, not on
a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate, groupby, pairwise, zip_longest
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
    if backend == "auto":
        backend = choose_backend(q, k, v)
    if key_lengths is not None:
        return _cached(q, k, v, _lengths(layout), key_lengths, causal, scale, backend)
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1] != v.shape[1] or not _heads_fit(q, k):
        raise LayoutError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other; expected "
            "[tokens, heads, head_dim], [tokens, kv_heads, head_dim] and [tokens, kv_heads, value_dim], "
            "heads a multiple of kv_heads"
        )
    if backend not in _BACKENDS:
        raise BackendError(f"attention backend {backend!r} is not one of auto, {', '.join(_BACKENDS)}")
    return _BACKENDS[backend](q, k, v, layout, causal, scale)


def choose_backend(q: Tensor, k: Tensor, v: Tensor) -> Literal["sdpa", "varlen", "flash"]:
    """The backend that "auto" stands for with such inputs on this machine.

    A fused variable-length kernel where one runs (flash-attn if it is installed, else torch's own), sdpa everywhere
    else.
    """
    if q.device.type != "cuda":
        return "sdpa"
    if _why_not_flash(q, k, v) is None:
        return "flash"
    return "varlen" if _why_not_varlen(q, k, v) is None else "sdpa"


def _heads_fit(q: Tensor, k: Tensor) -> bool:
    return q.shape[-1] == k.shape[-1] and q.shape[1] % k.shape[-2] == 0


def _lengths(layout: Layout | Segments) -> tuple[int, ...]:
    return layout.lengths if isinstance(layout, Layout) else _differences(layout.offsets)


def _differences(offsets: Tensor) -> tuple[int, ...]:
    return tuple(b - a for a, b in pairwise(offsets.tolist()))


def _check_tokens(q: Tensor, lengths: tuple[int, ...]) -> None:
    if sum(lengths) != q.shape[0]:
        raise LayoutError(f"attention: the layout counts {sum(lengths)} tokens, q has {q.shape[0]}")


def _widen(x: Tensor, dim: int) -> Tensor:
    """Zero channels up to dim: they add nothing to a score, and nothing to the channels before them."""
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))


# ---- plain ----------------------------------------------------------------------------------------------------------


def _plain(q: Tensor, k: Tensor, v: Tensor, layout: Layout | Segments, causal: bool, scale: float) -> Tensor:
    lengths = _lengths(layout)
    _check_tokens(q, lengths)
    if not lengths:
        return q.new_empty(0, q.shape[1], v.shape[-1])
    items = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_plain_item(*item, causal=causal, scale=scale) for item in items])


def _plain_item(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """One item; where k and v are longer than q, the queries are the last positions."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) * scale
    if causal:
        later = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(later, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v.to(wide)).to(q.dtype)


# ---- sdpa: which items go together ----------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Items that one kernel call computes: `rows` rows of `length` places.

    Attributes:
        first: First token, where the items lie end to end; unused otherwise.
        gather: int64 [rows * length], the token of every place; None where the items lie end to end. Padding repeats
            the first token of its own item, so that nothing of one item, not even a NaN, reaches another.
        real: int64, the places that are not padding; None without padding.
        target: int64, the tokens at those places; None without padding.
        mask: [rows, 1, 1, length], 0 at tokens and -inf at padding; None without padding.
    """

    rows: int
    length: int
    first: int
    gather: Tensor | None = None
    real: Tensor | None = None
    target: Tensor | None = None
    mask: Tensor | None = None


# Measured on AVX-512 with torch 2.14: a kernel call with its views costs about 25 microseconds, as much as gathering 8k
# elements or computing 300k more products. The kernel is slow at the end of a row that is no multiple of 16: 15 keys
# take twice as long as 16.
_SMALL = 8192
_PRODUCTS_OF_A_CALL = 300_000
_LANES = 16


@lru_cache(maxsize=512)
def _plan(lengths: tuple[int, ...], width: int) -> tuple[_Block, ...]:
    """Blocks that cover all items: equal neighbours as views, small items gathered with those of like length.

    Args:
        width: Elements of one token's queries.
    """
    starts = (0, *accumulate(lengths))
    blocks: list[_Block] = []
    small: dict[int, list[int]] = {}  # by places
    item = 0
    for length, run in groupby(lengths):
        count = len(list(run))
        if length * width >= _SMALL or (count == len(lengths) and _places(length) == length):
            blocks.append(_Block(count, length, starts[item]))
        else:
            small.setdefault(-(-length // _LANES), []).extend(range(item, item + count))
        item += count
    waiting: list[int] = []
    sizes = sorted(small)
    for size, larger in zip_longest(sizes, sizes[1:]):
        waiting += small[size]
        if larger is not None:
            products = len(waiting) * (larger**2 - size**2) * _LANES**2 * width
            if products < _PRODUCTS_OF_A_CALL:
                continue
        if len(waiting) == 1:
            blocks.append(_Block(1, lengths[waiting[0]], starts[waiting[0]]))
        else:
            blocks.append(_gathered([starts[i] for i in waiting], [lengths[i] for i in waiting]))
        waiting = []
    return tuple(blocks)


def _places(length: int) -> int:
    """The length itself, or the next multiple of the kernel's lanes where that is quicker."""
    return -(-length // _LANES) * _LANES if length % _LANES >= _LANES // 2 else length


def _gathered(starts: list[int], lengths: list[int]) -> _Block:
    length = _places(max(lengths))
    place = torch.arange(length)
    inside = place < torch.tensor(lengths)[:, None]  # [rows, length]
    index = (torch.tensor(starts)[:, None] + place * inside).flatten()
    if min(lengths) == length:
        return _Block(len(lengths), length, -1, index)
    real = inside.flatten().nonzero().flatten()
    mask = torch.zeros(inside.shape).masked_fill_(~inside, float("-inf"))[:, None, None]
    return _Block(len(lengths), length, -1, index, real, index[real], mask)


def _take(x: Tensor, block: _Block) -> Tensor:
    """The block's tokens as [rows, heads, length, dim]."""
    x = x.narrow(0, block.first, block.rows * block.length) if block.gather is None else x.index_select(0, block.gather)
    return x.view(block.rows, block.length, *x.shape[1:]).transpose(1, 2)


def _put(whole: Tensor, part: Tensor, block: _Block) -> None:
    """Write [rows, length, heads, ...] into the block's tokens of [tokens, heads, ...]."""
    part = part.flatten(0, 1)
    if block.gather is None:
        whole.narrow(0, block.first, block.rows * block.length).copy_(part)
    elif block.real is None or block.target is None:
        whole.index_copy_(0, block.gather, part.to(whole.dtype))
    else:
        whole.index_copy_(0, block.target, part.index_select(0, block.real).to(whole.dtype))


# ---- sdpa on the CPU: the kernel that F.scaled_dot_product_attention uses, called block by block --------------------

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [tokens, heads, value_dim], logsumexp [tokens, heads])."""
    _check_tokens(q, lengths)
    value_dim, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    q, k, v = _widen(q, width), _widen(k, width), _widen(v, width)  # the kernel knows one width
    plan = _plan(lengths, q.shape[1] * width)
    outs: Tensor | None = None
    lses: Tensor | None = None
    for block in plan:
        # A causal item never looks at its padding, which comes last.
        mask = None if block.mask is None or causal else block.mask.to(q.dtype)
        out, lse = _flash(_take(q, block), _take(k, block), _take(v, block), 0.0, causal, attn_mask=mask, scale=scale)
        out, lse = out.transpose(1, 2)[..., :value_dim], lse.transpose(1, 2)  # [rows, length, heads, .]
        if block.gather is None and len(plan) == 1:
            return out.flatten(0, 1).contiguous(), lse.flatten(0, 1).contiguous()
        if outs is None or lses is None:
            outs, lses = q.new_empty(*q.shape[:2], value_dim), lse.new_empty(q.shape[:2])
        _put(outs, out, block)
        _put(lses, lse, block)
    if outs is None or lses is None:
        return q.new_empty(0, q.shape[1], value_dim), q.new_empty(0, q.shape[1], dtype=_wide(q))
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
    q, k, v, out, grad = (_widen(x, width) for x in (q, k, v, out, grad))
    grads = tuple(x.new_empty(x.shape) for x in wanted)
    for block in _plan(lengths, q.shape[1] * width):
        # In half precision the kernel's backward is four times less precise, and for small items ten times slower.
        taken = [_take(x, block).to(_wide(x)) for x in (grad, q, k, v, out)]
        mask = None if block.mask is None or causal else block.mask.to(taken[0].dtype)
        lses = _take(lse[..., None], block).squeeze(-1)  # [rows, heads, length]
        if block.mask is not None:
            # No loss comes from padding, and it attends to nothing: under a causal mask it would see more keys than the
            # token that it repeats, whose logsumexp it has, and infinite probabilities times no loss would be NaN.
            taken[0] = taken[0] * (block.mask == 0).transpose(2, 3)
            lses = lses.masked_fill(block.mask[:, 0] != 0, float("inf"))
        parts = _flash_backward(*taken, lses, 0.0, causal, attn_mask=mask, scale=scale)
        for whole, part in zip(grads, parts, strict=True):
            _put(whole, part.transpose(1, 2)[..., : whole.shape[-1]], block)
    return grads[0], grads[1], grads[2]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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


# ---- sdpa elsewhere: torch's own choice of kernel, one call for a run of equal items --------------------------------


def _by_runs(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, scale: float) -> Tensor:
    _check_tokens(q, lengths)
    if not lengths:
        return q.new_empty(0, q.shape[1], v.shape[-1])
    runs = [(len(list(run)), length) for length, run in groupby(lengths)]
    sizes = [count * length for count, length in runs]
    outs = []
    for (count, length), *parts in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        rows = (x.view(count, length, *x.shape[1:]) for x in parts)
        outs.append(_rows(*rows, causal=causal, scale=scale).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _rows(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """Items of equal lengths, [items, length, heads, dim]; queries fewer than keys are the last positions."""
    mask = None
    if causal and 1 < q.shape[1] != k.shape[1]:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
    value_dim, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    if q.device.type == "cpu":  # without one width the CPU falls back to a kernel that keeps all scores
        q, k, v = _widen(q, width), _widen(k, width), _widen(v, width)
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


# ---- sdpa under torch.compile ---------------------------------------------------------------------------------------


@torch.library.custom_op("vlkit::attention", mutates_args=())
def _operator(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return _forward(q, k, v, _differences(offsets), causal, scale)
    out = _by_runs(q, k, v, _differences(offsets), causal, scale)
    return out.contiguous(), q.new_empty(q.shape[:2], dtype=_wide(q))  # the backward computes the scores again


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=_wide(q))


@torch.library.custom_op("vlkit::attention_backward", mutates_args=())
def _operator_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = _differences(offsets)
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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout | Segments, causal: bool, scale: float) -> Tensor:
    if torch.compiler.is_compiling():
        offsets = layout.cu_seqlens("cpu") if isinstance(layout, Layout) else layout.offsets
        return _operator(q, k, v, offsets, causal, scale)[0]
    lengths = _lengths(layout)
    if q.device.type != "cpu":
        return _by_runs(q, k, v, lengths, causal, scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _CpuAttention.apply(q, k, v, lengths, causal, scale)
    return _forward(q, k, v, lengths, causal, scale)[0]


# ---- varlen, flash, flex --------------------------------------------------------------------------------------------


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


def _why_not_varlen(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    try:
        parameters = _varlen_parameters()
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    missing = {"window_size", "scale", "enable_gqa"} - parameters
    if missing:
        return f"varlen_attn of torch {torch.__version__} has no {', '.join(sorted(missing))}; use torch 2.12 or later"
    return _why_not_fused(q, v)


def _why_not_flash(q: Tensor, k: Tensor, v: Tensor) -> str | None:
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
        _check_tokens(q, layout.lengths)
        return layout.cu_seqlens(q.device), layout.max_length
    return layout.device_offsets, int(layout.longest)


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout | Segments, causal: bool, scale: float) -> Tensor:
    reason = _why_not_varlen(q, k, v)
    if reason is not None:
        raise BackendError(f"attention backend 'varlen' cannot run: {reason}")
    offsets, longest = _device_offsets(q, layout)
    value_dim, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    out = _varlen_kernel()(
        _widen(q, width),
        _widen(k, width),
        _widen(v, width),
        offsets,
        offsets,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[..., :value_dim]


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, layout: Layout | Segments, causal: bool, scale: float) -> Tensor:
    reason = _why_not_flash(q, k, v)
    if reason is not None:
        raise BackendError(f"attention backend 'flash' cannot run: {reason}")
    offsets, longest = _device_offsets(q, layout)
    value_dim, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    out = _flash_attn_kernel()(
        _widen(q, width),
        _widen(k, width),
        _widen(v, width),
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


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout | Segments, causal: bool, scale: float) -> Tensor:
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type == "cpu" and grad:
        raise BackendError("attention backend 'flex' cannot run: on the CPU it has no backward; use 'sdpa'")
    lengths = _lengths(layout)
    _check_tokens(q, lengths)
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


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Layout | Segments, bool, float], Tensor]] = {
    "plain": _plain,
    "sdpa": _sdpa,
    "varlen": _varlen,
    "flash": _flash_attn,
    "flex": _flex,
}


# ---- from a cache ---------------------------------------------------------------------------------------------------

_COPY_BELOW = 65536  # bytes of one item's keys that are copied sooner than a kernel is called again


def _cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    key_lengths: Sequence[int],
    causal: bool,
    scale: float,
    backend: Backend,
) -> Tensor:
    """Queries against the cache. sdpa serves for the other fused backends, whose kernels want packed keys."""
    if not _heads_fit(q, k) or k.shape[:3] != v.shape[:3]:
        raise LayoutError(
            f"attention: q {tuple(q.shape)} does not fit a cache of keys {tuple(k.shape)} and values {tuple(v.shape)}; "
            "expected [tokens, heads, head_dim], [items, capacity, kv_heads, head_dim] and "
            "[items, capacity, kv_heads, value_dim]"
        )
    _check_tokens(q, lengths)
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
    if backend != "plain" and len(lengths) == q.shape[0]:
        return _decode(q, k, v, tuple(key_lengths), scale)
    outs = []
    for item, (part, known) in enumerate(zip(q.split(lengths), key_lengths, strict=True)):
        keys, values = k[item, :known], v[item, :known]
        if backend == "plain":
            outs.append(_plain_item(part, keys, values, causal=causal, scale=scale))
        else:
            outs.append(_rows(part[None], keys[None], values[None], causal=causal, scale=scale)[0])
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
        out = _one_query(q, k[:, :longest], v[:, :longest], None, scale)
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
    return out[..., :value_dim].reshape(items, heads, value_dim)


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = _widen(q, width), _widen(k, width).transpose(1, 2), _widen(v, width).transpose(1, 2)
    if q.device.type == "cpu":
        return _flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@lru_cache(maxsize=8)  # all layers of a step ask for the same
def _rows_of_cache(key_lengths: tuple[int, ...], capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(where the rows of all items lie in [items * capacity], mask): padded as in `_Block`."""
    block = _gathered([i * capacity for i in range(len(key_lengths))], list(key_lengths))
    assert block.gather is not None
    assert block.mask is not None
    return block.gather.to(device), block.mask.to(device)


# ---- as a module ----------------------------------------------------------------------------------------------------


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
