"""Sums and means per item equal those of the items alone."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from vlkit.errors import LayoutError
from vlkit.objectives import segment_mean, segment_sum
from vlkit.packing import Layout

LAYOUT = Layout((3, 1, 5))


@pytest.mark.parametrize("shape", [(9,), (9, 2)])
def test_sums_are_those_of_the_items(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64)
    want = torch.stack([part.sum(0) for part in values.split(LAYOUT.lengths)])
    torch.testing.assert_close(segment_sum(values, LAYOUT), want, rtol=1e-14, atol=1e-15)


def test_a_sum_does_not_depend_on_the_neighbours() -> None:
    values = torch.randn(1009)
    together = segment_sum(values, Layout((400, 600, 9)))
    alone = [segment_sum(part, Layout((len(part),))) for part in values.split((400, 600, 9))]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_sums_are_right_to_fp32(dtype: torch.dtype) -> None:
    values = torch.full((5000,), 0.1, dtype=dtype)
    found = segment_sum(values, Layout((5000,)))
    assert found.dtype == torch.float32
    assert found.tolist() == (values[:1].double() * 5000).float().tolist()


def test_means_leave_out_what_is_masked_whatever_it_holds() -> None:
    values = torch.tensor([1.0, torch.nan, 5.0, torch.inf, 1.0, 2.0, 3.0, 4.0, -torch.inf], requires_grad=True)
    mask = torch.tensor([1, 0, 1, 0, 1, 1, 1, 1, 0]).bool()
    means = segment_mean(values, mask, LAYOUT)
    means.sum().backward()
    assert means.tolist() == [3.0, 0.0, 2.5]
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0, 0.5, 0, 0.25, 0.25, 0.25, 0.25, 0]


def test_finite_differences_agree() -> None:
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 0, 1, 0, 1, 1, 1, 1, 0]).bool()
    assert gradcheck(lambda v: (segment_sum(v * v, LAYOUT), segment_mean(v * v, mask, LAYOUT)), (values,))


def test_other_numbers_of_values_are_mistakes() -> None:
    with pytest.raises(LayoutError, match="token of 9"):
        segment_sum(torch.ones(8), LAYOUT)
    with pytest.raises(LayoutError, match="one mark per value"):
        segment_mean(torch.ones(9), torch.ones(8).bool(), LAYOUT)
