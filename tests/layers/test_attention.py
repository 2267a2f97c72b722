"""attention(): backends against the plain one, isolation of items, decoding from a cache, how kernels are called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.errors import BackendError, LayoutError
from vlkit.layers import attention as module
from vlkit.layers.attention import SelfAttention, attention, choose_backend
from vlkit.layers.rope import grid_positions, make_rotary, rotary_angles, rotary_frequencies_2d
from vlkit.packing import Layout

# One token; equal neighbours; one long among short; nothing equal; equal but apart; just below, at and above 16.
LENGTHS = [(1,), (5, 5, 5), (1, 7, 300, 2, 9, 1, 1), (5, 6, 7), (40, 40, 3, 3, 3, 41), (15, 2, 15, 16, 17, 31, 15)]
# heads, kv_heads, head_dim, value_dim: plain, grouped, one key head with narrow values, values wider than keys.
WIDTHS = [(4, 4, 8, 8), (4, 2, 8, 8), (4, 1, 12, 8), (2, 2, 8, 12)]


def inputs(
    lengths: tuple[int, ...], widths: tuple[int, int, int, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, head_dim, value_dim = widths
    shapes = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim)]
    return tuple(torch.randn(sum(lengths), *s, dtype=dtype, requires_grad=True) for s in shapes)  # type: ignore[return-value]


def with_gradients(run: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = run(*tensors)
    seed = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)
    return out, *torch.autograd.grad(out, tensors, seed)


def largest_difference(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Over all tensors together, relative to the largest value: the gradient of a lone token's query is exactly 0."""
    scale = max(float(b.detach().abs().max()) for b in theirs)
    each = [(a.detach().double() - b.detach().double()).abs().max() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(each).max()) / scale  # Python's max would lose a NaN


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sdpa_is_plain_with_its_gradients(
    lengths: tuple[int, ...], widths: tuple[int, int, int, int], causal: bool
) -> None:
    tensors = inputs(lengths, widths)
    run = functools.partial(attention, layout=Layout(lengths), causal=causal, scale=0.3)

    ours = with_gradients(functools.partial(run, backend="sdpa"), tensors)

    assert largest_difference(ours, with_gradients(functools.partial(run, backend="plain"), tensors)) < 1e-13


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1.3e-3)]
)
@pytest.mark.parametrize("lengths", [(1, 7, 130, 2, 9), (600,)], ids=str)
def test_sdpa_is_plain_in_other_dtypes(lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """Against the plain backend in fp64; the largest seen are 5e-7, 4e-3 and 5e-4."""
    tensors = inputs(lengths, (4, 2, 16, 16), dtype)
    exact = tuple(x.detach().double().requires_grad_() for x in tensors)

    ours = with_gradients(functools.partial(attention, layout=Layout(lengths), causal=True), tensors)

    assert all(x.dtype == dtype for x in ours)
    plain = functools.partial(attention, layout=Layout(lengths), causal=True, backend="plain")
    assert largest_difference(ours, with_gradients(plain, exact)) < tolerance


@pytest.mark.parametrize("causal", [False, True])
def test_large_scores_of_padded_items_keep_their_gradients(causal: bool) -> None:
    """Scores in the thousands, items of unlike lengths together: padding must not overflow."""
    lengths = (5, 3, 7, 2, 15, 9)
    tensors = tuple((60 * x.detach()).requires_grad_() for x in inputs(lengths, (4, 4, 8, 8)))
    ours = with_gradients(functools.partial(attention, layout=Layout(lengths), causal=causal), tensors)
    plain = functools.partial(attention, layout=Layout(lengths), causal=causal, backend="plain")
    assert largest_difference(ours, with_gradients(plain, tensors)) < 1e-12


def test_plain_is_the_formula() -> None:
    """Against torch on one item at a time, with the mask written out."""
    q, k, v = inputs((4, 3), (4, 2, 8, 6))
    ours = attention(q, k, v, layout=Layout((4, 3)), causal=True, backend="plain")
    for part in (slice(0, 4), slice(4, 7)):
        qi, ki, vi = (x[part].transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
        scores = qi @ ki.mT / 8**0.5
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        torch.testing.assert_close(ours[part], (scores.softmax(-1) @ vi).transpose(0, 1))


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("lengths", LENGTHS[1:], ids=str)
def test_an_item_changes_no_bit_of_another(lengths: tuple[int, ...], backend: Any) -> None:
    """Not even an item full of NaN, whose scores would poison a shared mask."""
    q, k, v = (x.detach() for x in inputs(lengths, (4, 2, 8, 8), torch.float32))
    layout = Layout(lengths)
    before = attention(q, k, v, layout=layout, backend=backend).split(lengths)
    for changed in range(len(lengths)):
        spoilt = [x.clone() for x in (q, k, v)]
        for x in spoilt:
            x.split(lengths)[changed].fill_(float("nan"))
        after = attention(*spoilt, layout=layout, backend=backend).split(lengths)
        for item, (a, b) in enumerate(zip(before, after, strict=True)):
            assert bool(b.isnan().all()) if item == changed else torch.equal(a, b)


def test_gradients_of_one_item_stay_in_it() -> None:
    lengths = (3, 20, 5, 4, 9)
    tensors = inputs(lengths, (4, 4, 8, 8))
    out = attention(*tensors, layout=Layout(lengths))
    for grad in torch.autograd.grad(out.split(lengths)[2].sum(), tensors):
        reached = [bool(part.any()) for part in grad.split(lengths)]
        assert reached in ([False, False, True, False, False], [False] * 5)


def test_views_that_are_not_contiguous_work() -> None:
    lengths = (5, 9, 5)
    wide = torch.randn(19, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = wide.unbind(1)
    again = tuple(x.contiguous() for x in (q, k, v))
    ours = attention(q, k, v, layout=Layout(lengths))
    torch.testing.assert_close(ours, attention(*again, layout=Layout(lengths), backend="plain"))


def test_segments_say_the_same_as_a_layout() -> None:
    tensors = inputs((3, 9, 4), (2, 2, 8, 8))
    layout = Layout((3, 9, 4))
    assert torch.equal(attention(*tensors, layout=layout), attention(*tensors, layout=layout.segments()))


def test_no_items_give_no_rows_and_zero_gradients() -> None:
    tensors = inputs((), (4, 2, 8, 6))
    for backend in ("plain", "sdpa"):
        out = attention(*tensors, layout=Layout(()), backend=backend)  # type: ignore[arg-type]
        assert out.shape == (0, 4, 6)
    assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True))


def test_many_small_items_take_few_kernel_calls() -> None:
    """What makes packs of small images cheap: here 64 of them in at most four calls."""
    lengths = tuple(torch.randint(4, 33, (64,)).tolist())
    assert len(module._plan(lengths, 96)) <= 4
    assert len(module._plan((1024, 1024, 1024), 1152)) == 1
    places = [
        place
        for block in module._plan(lengths, 96)
        for place in (block.target if block.target is not None else block.gather)
    ]
    assert sorted(map(int, places)) == list(range(sum(lengths)))


# ---- from a cache


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((1, 1), (7, 7)),
        ((1, 1, 1), (3, 9, 1)),
        ((1, 1), (5, 2000)),
        ((2, 3), (5, 8)),
        ((4, 4), (4, 4)),
        ((3, 1), (3, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("widths", [*WIDTHS, (4, 1, 12, 12)], ids=str)
def test_a_cache_is_read_up_to_its_lengths(
    queries: tuple[int, ...], keys: tuple[int, ...], widths: tuple[int, int, int, int]
) -> None:
    """Rows beyond an item's length are undefined memory, here NaN."""
    heads, kv_heads, head_dim, value_dim = widths
    k = torch.randn(len(keys), max(keys) + 3, kv_heads, head_dim, dtype=torch.float64)
    v = torch.randn(len(keys), max(keys) + 3, kv_heads, value_dim, dtype=torch.float64)
    for item, known in enumerate(keys):
        k[item, known:], v[item, known:] = float("nan"), float("nan")
    q = torch.randn(sum(queries), heads, head_dim, dtype=torch.float64)
    for values in (v, k[..., :value_dim]):
        for causal in (False, True):
            ours = attention(q, k, values, layout=Layout(queries), causal=causal, key_lengths=keys)
            plain = attention(q, k, values, layout=Layout(queries), causal=causal, key_lengths=keys, backend="plain")
            torch.testing.assert_close(ours, plain, atol=1e-13, rtol=1e-13)


def test_queries_are_the_last_positions_of_a_cache() -> None:
    """The last rows of causal attention over everything."""
    q, k, v = (x.detach() for x in inputs((9,), (4, 2, 8, 8)))
    whole = attention(q, k, v, layout=Layout((9,)), causal=True)
    for new in (1, 4, 9):
        ours = attention(q[-new:], k[None], v[None], layout=Layout((new,)), causal=True, key_lengths=[9])
        torch.testing.assert_close(ours, whole[-new:])


# ---- what is refused


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v = inputs((5,), (4, 2, 8, 8))
    with pytest.raises(LayoutError, match="counts 4 tokens, q has 5"):
        attention(q, k, v, layout=Layout((4,)))
    with pytest.raises(LayoutError, match="multiple of kv_heads"):
        attention(q[:, :3], k, v, layout=Layout((5,)))
    cache = torch.zeros(2, 6, 2, 8, dtype=torch.float64)
    with pytest.raises(LayoutError, match="item 1 has 3 queries and 2 keys in a cache of 6 places"):
        attention(q, cache, cache, layout=Layout((2, 3)), key_lengths=[4, 2])
    with pytest.raises(LayoutError, match="2 items, 1 key lengths"):
        attention(q, cache, cache, layout=Layout((2, 3)), key_lengths=[4])


@pytest.mark.parametrize(
    ("backend", "words"),
    [("varlen", "CUDA"), ("flash", r"vlkit\[flash\]"), ("flex", "no backward"), ("eager", "not one of auto, plain")],
)
def test_a_backend_that_cannot_run_says_why(backend: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError

    monkeypatch.setattr(module, "_flash_attn_kernel", missing)
    with pytest.raises(BackendError, match=words):
        attention(*inputs((5,), (4, 2, 8, 8), torch.float32), layout=Layout((5,)), backend=backend)


def test_auto_can_be_printed() -> None:
    assert choose_backend(*inputs((5,), (4, 2, 8, 8))) == "sdpa"


# ---- kernels that do not run here: how they are called


def by_offsets(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool, scale: float) -> Tensor:
    """What a variable-length kernel computes; it knows one width of head."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    return attention(q, k, v, layout=Layout.from_offsets(offsets, len(q)), causal=causal, scale=scale, backend="plain")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_varlen_is_called_right(
    widths: tuple[int, int, int, int], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(
        q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        assert cu_seq_q is cu_seq_k
        assert cu_seq_q.dtype == torch.int32
        assert max_q == max_k == 9
        assert enable_gqa == (q.shape[1] != k.shape[1])
        assert window_size in ((-1, -1), (-1, 0))
        return by_offsets(q, k, v, cu_seq_q, window_size == (-1, 0), scale)

    monkeypatch.setattr(module, "_varlen_kernel", lambda: kernel)
    monkeypatch.setattr(module, "_why_not_fused", lambda q, v: None)
    tensors = inputs((1, 9, 4), widths)
    for layout in (Layout((1, 9, 4)), Layout((1, 9, 4)).segments()):
        ours = attention(*tensors, layout=layout, causal=causal, backend="varlen")
        torch.testing.assert_close(ours, attention(*tensors, layout=layout, causal=causal, backend="plain"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_flash_is_called_right(
    widths: tuple[int, int, int, int], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, *, softmax_scale: float, causal: bool,
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k == 9
        return by_offsets(q, k, v, cu_seqlens_q, causal, softmax_scale)

    monkeypatch.setattr(module, "_flash_attn_kernel", lambda: kernel)
    monkeypatch.setattr(module, "_why_not_fused", lambda q, v: None)
    tensors, layout = inputs((1, 9, 4), widths), Layout((1, 9, 4))
    ours = attention(*tensors, layout=layout, causal=causal, backend="flash")
    torch.testing.assert_close(ours, attention(*tensors, layout=layout, causal=causal, backend="plain"))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_flex_sees_the_items(widths: tuple[int, int, int, int], causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real flex_attention, uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(module, "_flex_kernel", lambda: flex_attention)
    q, k, v = (x.detach() for x in inputs((1, 140, 4), widths, torch.float32))
    ours = attention(q, k, v, layout=Layout((1, 140, 4)), causal=causal, backend="flex")
    torch.testing.assert_close(ours, attention(q, k, v, layout=Layout((1, 140, 4)), causal=causal, backend="plain"))


def test_the_kernels_that_torch_has_take_our_arguments() -> None:
    """Of this torch; an older one without them is refused with the reason."""
    q, k, v = inputs((5,), (4, 2, 8, 8))
    assert "CUDA" in str(module._why_not_varlen(q, k, v))


def test_without_the_cpu_kernel_runs_of_equal_items_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of other devices, tried here on the CPU."""
    calls = []

    def counting(*args: Any, **options: Any) -> Tensor:
        calls.append(args[0].shape)
        return F.scaled_dot_product_attention(*args, **options)

    lengths, widths = (5, 5, 7, 5, 1), (4, 2, 8, 12)
    tensors = inputs(lengths, widths)
    want = attention(*tensors, layout=Layout(lengths), causal=True, backend="plain")

    class Functional:
        pad = staticmethod(F.pad)
        scaled_dot_product_attention = staticmethod(counting)

    monkeypatch.setattr(module, "F", Functional)
    torch.testing.assert_close(module._by_runs(*tensors, lengths, True, 8**-0.5), want)
    assert [shape[0] for shape in calls] == [2, 1, 1, 1]


# ---- under torch.compile


@pytest.mark.parametrize("widths", [(4, 2, 8, 8), (2, 2, 8, 12)], ids=str)
def test_one_graph_serves_all_lengths(widths: tuple[int, int, int, int]) -> None:
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in [(4, 9), (5, 1, 30), (3,), (2, 2, 2, 2, 17)]:
        tensors, layout = inputs(lengths, widths), Layout(lengths)
        ours = with_gradients(functools.partial(compiled, layout=layout.segments(), causal=True), tensors)
        plain = functools.partial(attention, layout=layout, causal=True, backend="plain")
        assert largest_difference(ours, with_gradients(plain, tensors)) < 1e-13
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    dynamo.reset()


@pytest.mark.parametrize("lengths", [(6,), (3, 9, 3)], ids=str)
def test_the_operator_keeps_torchs_rules(lengths: tuple[int, ...]) -> None:
    """Shapes, strides and dtypes announced to the compiler are those computed, and the backward is registered right."""
    for widths in WIDTHS:
        q, k, v = inputs(lengths, widths)
        offsets = Layout(lengths).cu_seqlens()
        torch.library.opcheck(module._operator, (q, k, v, offsets, True, 0.3))


# ---- the module


def test_self_attention_is_its_formula() -> None:
    layout = Layout.from_grids([(2, 3), (1, 4)])
    block = SelfAttention(16, 2, pairing="interleaved").double()
    x = torch.randn(10, 16, dtype=torch.float64)
    frequencies, axes = rotary_frequencies_2d(8, 100.0, arrangement="alternating")
    rotary = make_rotary(rotary_angles(grid_positions(layout).double(), frequencies, axes))
    first = SelfAttention.forward(
        block, x[:6], type(rotary)(rotary.cos[:6], rotary.sin[:6]), Layout((6,)), backend="plain"
    )
    assert torch.allclose(block(x, rotary, layout)[:6], first, atol=1e-14)
    without = block(x, None, layout)
    q, k, v = (proj(x[6:]).view(4, 2, 8).transpose(0, 1) for proj in (block.q, block.k, block.v))
    want = block.out(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(without[6:], want)
