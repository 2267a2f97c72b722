"""Kernels for GPUs, which do not run here: how they are called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.layers.attention_cases import WIDTHS, inputs
from vlkit.layers import attention_fused
from vlkit.layers.attention import attention
from vlkit.packing import Layout


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

    monkeypatch.setattr(attention_fused, "_varlen_kernel", lambda: kernel)
    monkeypatch.setattr(attention_fused, "_why_not_fused", lambda q, v: None)
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

    monkeypatch.setattr(attention_fused, "_flash_attn_kernel", lambda: kernel)
    monkeypatch.setattr(attention_fused, "_why_not_fused", lambda q, v: None)
    tensors, layout = inputs((1, 9, 4), widths), Layout((1, 9, 4))
    ours = attention(*tensors, layout=layout, causal=causal, backend="flash")
    torch.testing.assert_close(ours, attention(*tensors, layout=layout, causal=causal, backend="plain"))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_flex_sees_the_items(widths: tuple[int, int, int, int], causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real flex_attention, uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention_fused, "_flex_kernel", lambda: flex_attention)
    q, k, v = (x.detach() for x in inputs((1, 140, 4), widths, torch.float32))
    ours = attention(q, k, v, layout=Layout((1, 140, 4)), causal=causal, backend="flex")
    torch.testing.assert_close(ours, attention(q, k, v, layout=Layout((1, 140, 4)), causal=causal, backend="plain"))


def test_the_kernels_that_torch_has_take_our_arguments() -> None:
    """Of this torch; an older one without them is refused with the reason."""
    q, k, v = inputs((5,), (4, 2, 8, 8))
    assert "CUDA" in str(attention_fused.why_not_varlen(q, k, v))
