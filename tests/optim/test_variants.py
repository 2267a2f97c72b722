"""NorMuon, AdaMuon, cautious decay and orthogonalisations of one's own, against their equations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vlkit.optim.units import spans_of, units_of
from vlkit.optim.variants import (
    adamuon_divide_,
    adamuon_factors,
    adapt_,
    normuon_factors,
    num_rows,
    row_ids,
    row_sums,
)

SHAPES = [(2, 7, 5), (1, 4, 9), (3, 1, 6)]


def randoms(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# The functions


@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_is_its_equation(shape: tuple[int, int, int]) -> None:
    """Three steps in fp64, matrix by matrix and row by row."""
    state = torch.zeros(shape[:2], dtype=torch.float64)
    expected_state = torch.zeros(shape[:2], dtype=torch.float64)
    for step in range(3):
        update = randoms(shape, step, torch.float64)
        expected = update.clone()
        for matrix, means in zip(expected, expected_state, strict=True):
            norm = matrix.norm()
            for r, row in enumerate(matrix):
                means[r] = 0.9 * means[r] + 0.1 * row.square().mean()
                row /= means[r].sqrt() + 1e-10
            matrix *= norm / matrix.norm()
        adapt_(update, state, "normuon", 0.9)
        assert_close(update, expected, rtol=1e-12, atol=0)
        assert_close(state, expected_state, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_adamuon_is_its_equation(shape: tuple[int, int, int]) -> None:
    state = torch.zeros(shape, dtype=torch.float64)
    expected_state = torch.zeros(shape, dtype=torch.float64)
    for step in range(3):
        update = randoms(shape, step, torch.float64)
        expected_state = 0.9 * expected_state + 0.1 * update**2
        expected = update / (expected_state.sqrt() + 1e-8)
        expected *= min(shape[1:]) ** 0.5 / expected.flatten(1).norm(dim=1)[:, None, None]
        adapt_(update, state, "adamuon", 0.9)
        assert_close(update, expected, rtol=1e-12, atol=0)
        assert_close(state, expected_state, rtol=1e-12, atol=0)


def test_a_zero_update_stays_zero() -> None:
    """Of a matrix without gradient from the start, and later of one that had one."""
    for variant, state in (("normuon", torch.zeros(2, 3)), ("adamuon", torch.zeros(2, 3, 4))):
        for before in (torch.zeros(2, 3, 4), randoms((2, 3, 4), 0)):
            adapt_(before, state, variant, 0.95)
            update = torch.zeros(2, 3, 4)
            adapt_(update, state, variant, 0.95)
            assert torch.equal(update, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("variant", ["normuon", "adamuon"])
@pytest.mark.parametrize("cuts", [(0, 100), (0, 3, 40, 100), (0, 10, 20, 55, 99, 100)])
@pytest.mark.parametrize("attributes", [{}, {"muon_column_splits": (3, 7)}, {"muon_splits": (4, 6)}])
def test_slices_with_summed_rows_equal_the_whole(
    variant: Any, cuts: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    """A 10 x 10 weight, as one matrix, in columns and in rows, cut anywhere: what ranks do that hold slices of it."""
    weight = torch.zeros(10, 10)
    for name, value in attributes.items():
        setattr(weight, name, value)
    units = units_of(weight)
    whole_states = [torch.zeros(u.count, u.rows, *[u.cols] * (variant == "adamuon")) for u in units]
    row_state, element_state = torch.zeros(num_rows(units)), torch.zeros(100)
    ids = row_ids(units, 100)
    for step in range(3):
        update = randoms((10, 10), step)
        expected = update.clone()
        for some, state in zip(units, whole_states, strict=True):
            view = some.view(expected)
            adapt_(view, state, variant, 0.9)
        flat = update.view(-1).clone()
        slices = [slice(a, b) for a, b in pairwise(cuts)]
        sums = torch.zeros(num_rows(units))
        for part in slices:
            if variant == "adamuon":
                adamuon_divide_(flat[part], element_state[part], 0.9)
            sums += torch.zeros_like(sums).index_add_(0, ids[part], flat[part].square())  # the sum over ranks
        counts = [u.count * u.rows for u in units]
        factors = [
            normuon_factors(s.view(u.count, u.rows), v.view(u.count, u.rows), u.cols, 0.9)
            if variant == "normuon"
            else adamuon_factors(s.view(u.count, u.rows), u.cols)
            for u, s, v in zip(units, sums.split(counts), row_state.split(counts), strict=True)
        ]
        by_row = torch.cat([factor.reshape(-1) for factor in factors])
        for part in slices:
            flat[part] *= by_row[ids[part]]
        assert_close(flat.view(10, 10), expected, rtol=2e-6, atol=0)


def test_row_ids_count_through_spans() -> None:
    """Interleaved columns of two heads: rows of the first head, then of the second."""
    weight = torch.zeros(2, 4)
    weight.muon_column_splits = (3, 1)
    (span,) = spans_of(units_of(weight))
    assert row_ids(span.units, 8).tolist() == [0, 0, 0, 2, 1, 1, 1, 3]


def test_row_sums_are_of_squares() -> None:
    assert row_sums(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]).bfloat16()).tolist() == [[5.0, 9.0]]
