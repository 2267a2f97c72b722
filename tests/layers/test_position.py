"""Resampled position tables: the one gather for all images against F.interpolate for each."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from vlkit.errors import ConfigError, LayoutError
from vlkit.layers.position import PositionTable, _taps, interpolate_positions, interpolate_positions_reference
from vlkit.packing import Layout

# Larger, smaller, mixed, a single row, a single column, one patch, the table's own grid, a clip of two frames.
GRIDS = [(9, 16), (2, 3), (11, 4), (1, 7), (13, 1), (1, 1), (6, 8), (2, 5, 5)]
OPTIONS = [
    {"mode": mode, "antialias": antialias, "align_corners": corners}
    for mode, antialias, corners in itertools.product(["bicubic", "bilinear"], [False, True], [False, True])
]


def name(options: dict[str, Any]) -> str:
    return "-".join([options["mode"], *(k for k in ("antialias", "align_corners") if options[k])])


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_one_gather_is_interpolate_per_image(options: dict[str, Any]) -> None:
    """fp32, unit-normal table: the largest difference seen is 6e-7."""
    table = torch.randn(6, 8, 5)
    ours = interpolate_positions(table, Layout.from_grids(GRIDS), **options)
    theirs = interpolate_positions_reference(table, Layout.from_grids(GRIDS), **options)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_its_gradient_is_too(options: dict[str, Any]) -> None:
    table = torch.randn(6, 8, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(sum(Layout.from_grids(GRIDS).lengths), 5, dtype=torch.float64)
    grads = [
        torch.autograd.grad((run(table, Layout.from_grids(GRIDS), **options) * weights).sum(), table)[0]
        for run in (interpolate_positions, interpolate_positions_reference)
    ]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("grid", [(37, 90), (64, 64), (128, 17), (300, 64)], ids=str)
def test_a_published_table_is_resampled_to_1e_6(grid: tuple[int, int]) -> None:
    """64 x 64: coordinates near 64 leave fp32 few digits, and only torch's own order of operations stays this close."""
    table = torch.randn(64, 64, 5)
    layout = Layout.from_grids([grid])
    torch.testing.assert_close(
        interpolate_positions(table, layout), interpolate_positions_reference(table, layout), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tables_own_grid_is_the_table(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Bit for bit, next to other images too."""
    table = torch.randn(6, 8, 5).to(dtype)
    ours = interpolate_positions(table, Layout.from_grids([(3, 3), (6, 8), (2, 6, 8)]), **options)
    assert ours.dtype == dtype
    assert torch.equal(ours[9:], table.flatten(0, 1).repeat(3, 1))


def test_half_precision_is_rounded_once() -> None:
    table = torch.randn(6, 8, 5).bfloat16()
    layout = Layout.from_grids(GRIDS)
    exact = interpolate_positions_reference(table.float(), layout)
    assert torch.equal(interpolate_positions(table, layout), exact.bfloat16())


def test_the_kernel_without_antialias_is_keys_with_three_quarters() -> None:
    """Published taps at a quarter of a cell; a = -1/2 belongs to antialias alone, also where it widens nothing."""
    for antialias, want in ((False, [-0.1055, 0.8789, 0.2617, -0.0352]), (True, [-0.0703, 0.8672, 0.2266, -0.0234])):
        cells, weights = _taps(16, 8, "bicubic", antialias, False, torch.float64)
        assert cells[5].tolist() == [1, 2, 3, 4]
        assert [round(float(x), 4) for x in weights[5]] == want


def test_no_images_give_no_rows() -> None:
    table = torch.randn(6, 8, 5, requires_grad=True)
    for run in (interpolate_positions, interpolate_positions_reference):
        assert run(table, Layout((), ())).shape == (0, 5)


def test_mistakes_are_named() -> None:
    table = torch.randn(6, 8, 5)
    for run in (interpolate_positions, interpolate_positions_reference):
        with pytest.raises(LayoutError, match="from_grids"):
            run(table, Layout((4,)))
    with pytest.raises(ConfigError, match="'nearest'"):
        interpolate_positions(table, Layout.from_grids([(2, 2)]), mode="nearest")  # type: ignore[arg-type]


def test_a_table_starts_unit_normal() -> None:
    positions = PositionTable(40, 40, 8)
    assert abs(float(positions.table.detach().std()) - 1) < 0.03
    layout = Layout.from_grids([(3, 5)])
    assert torch.equal(
        positions(layout, mode="bilinear"), interpolate_positions(positions.table, layout, mode="bilinear")
    )
