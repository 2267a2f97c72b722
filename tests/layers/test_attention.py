"""attention(): the formula, isolation of items, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.layers.attention_cases import LENGTHS, inputs
from vlkit.errors import BackendError, LayoutError
from vlkit.layers import attention_fused
from vlkit.layers.attention import attention, choose_backend
from vlkit.packing import Layout


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

    monkeypatch.setattr(attention_fused, "_flash_attn_kernel", missing)
    with pytest.raises(BackendError, match=words):
        attention(*inputs((5,), (4, 2, 8, 8), torch.float32), layout=Layout((5,)), backend=backend)


def test_auto_can_be_printed() -> None:
    assert choose_backend(*inputs((5,), (4, 2, 8, 8))) == "sdpa"
