"""The sdpa backend against the plain one, on the CPU, by the path of other devices, and under torch.compile."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.layers.attention_cases import LENGTHS, WIDTHS, inputs, largest_difference, with_gradients
from vlkit.layers import attention_sdpa
from vlkit.layers.attention import attention
from vlkit.packing import Layout


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
        scaled_dot_product_attention = staticmethod(counting)

    monkeypatch.setattr(attention_sdpa, "F", Functional)
    torch.testing.assert_close(attention_sdpa._by_runs(*tensors, lengths, True, 8**-0.5), want)
    assert [shape[0] for shape in calls] == [2, 1, 1, 1]


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
        torch.library.opcheck(attention_sdpa._operator, (q, k, v, offsets, True, 0.3))
