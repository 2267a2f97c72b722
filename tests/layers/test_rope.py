"""Rotary embedding: the equation in fp64, relative positions, and both ways of pairing channels and sharing axes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vlkit.errors import ConfigError, LayoutError
from vlkit.layers.rope import (
    Rotary,
    apply_rotary,
    grid_positions,
    make_rotary,
    rotary_angles,
    rotary_frequencies,
    rotary_frequencies_2d,
    rotary_sections,
)
from vlkit.packing import Layout


def by_hand(x: Tensor, angles: Tensor, pairing: str) -> Tensor:
    """One pair after another, from the definition."""
    out = torch.empty_like(x)
    pairs = x.shape[-1] // 2
    for j in range(pairs):
        first, second = (2 * j, 2 * j + 1) if pairing == "interleaved" else (j, j + pairs)
        cos, sin = angles[:, None, j].cos(), angles[:, None, j].sin()
        a, b = x[..., first], x[..., second]
        out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


def test_frequencies_fall_from_one() -> None:
    frequencies = rotary_frequencies(72, 10000.0)
    assert frequencies.dtype == torch.float32
    want = torch.tensor([10000.0 ** (-2 * i / 72) for i in range(36)])
    torch.testing.assert_close(frequencies, want)
    assert frequencies[0] == 1


def test_alternating_axes_take_the_column_first() -> None:
    """Channels 4i, 4i + 1 turn by column * f_i, 4i + 2 and 4i + 3 by row * f_i, with f_i = theta^(-4i / head_dim)."""
    frequencies, axes = rotary_frequencies_2d(72, 10000.0, arrangement="alternating")
    assert axes[:4] == (2, 1, 2, 1)
    assert frequencies[::2].equal(frequencies[1::2])
    # Published values of f_1, f_2, f_9, f_17.
    torch.testing.assert_close(frequencies[[2, 4, 18, 34]], torch.tensor([0.59948425, 0.35938137, 0.01, 0.00016681]))


def test_blocked_axes_take_the_row_first() -> None:
    frequencies, axes = rotary_frequencies_2d(8, 100.0, arrangement="blocked")
    assert axes == (1, 1, 2, 2)
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1, 1.0, 0.1]))


def test_grid_positions_count_every_item_from_zero_in_raster_order() -> None:
    layout = Layout.from_grids([(2, 3), (2, 1, 2), (1, 1)])
    want = (
        [[0, r, c] for r in range(2) for c in range(3)] + [[t, 0, c] for t in range(2) for c in range(2)] + [[0, 0, 0]]
    )
    assert grid_positions(layout).tolist() == want
    assert grid_positions(Layout((), ())).shape == (0, 3)
    with pytest.raises(LayoutError, match="from_grids"):
        grid_positions(Layout((3,)))


def test_angles_are_position_times_frequency() -> None:
    positions = torch.tensor([[0, 5, 7], [2, 0, 1]])
    frequencies = torch.tensor([1.0, 0.5, 0.25])
    angles = rotary_angles(positions, frequencies, [2, 0, 1])
    assert angles.tolist() == [[7.0, 0.0, 1.25], [1.0, 1.0, 0.0]]
    assert rotary_angles(torch.tensor([3, 4]), frequencies).tolist() == [[3.0, 1.5, 0.75], [4.0, 2.0, 1.0]]
    assert rotary_angles(positions.double(), frequencies, [2, 0, 1]).dtype == torch.float64


def test_half_precision_positions_do_not_lose_places() -> None:
    """Angles of bf16 positions would all be multiples of 8 beyond 1024."""
    angles = rotary_angles(torch.tensor([1025], dtype=torch.int32), torch.ones(1))
    assert angles.item() == 1025


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_every_pair_turns_by_its_angle(pairing: str) -> None:
    x, angles = torch.randn(5, 3, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(apply_rotary(x, make_rotary(angles), pairing=pairing), by_hand(x, angles, pairing))  # type: ignore[arg-type]


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_gradients_turn_back(pairing: str) -> None:
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    rotary = make_rotary(torch.randn(3, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, rotary, pairing=pairing), (x,))  # type: ignore[arg-type]
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary(x, rotary, pairing=pairing) ** 2, (x,))  # type: ignore[arg-type]


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_gradients_reach_angles_that_want_them(pairing: str) -> None:
    x, angles = torch.randn(3, 2, 6, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: apply_rotary(x, make_rotary(a), pairing=pairing), (angles,))  # type: ignore[arg-type]


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_and_layout_of_the_input_do_not_matter(pairing: str, dtype: torch.dtype) -> None:
    """Half precision is turned in fp32 and rounded once; a slice that does not start at an even element works too."""
    whole = torch.randn(5, 3, 13).to(dtype)
    rotary = make_rotary(torch.randn(5, 4))
    x = whole[..., 1:9]
    ours = apply_rotary(x, rotary, pairing=pairing)  # type: ignore[arg-type]
    assert ours.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = apply_rotary(x.to(wide).contiguous(), rotary, pairing=pairing)  # type: ignore[arg-type]
    assert torch.equal(ours, exact.to(dtype))


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_compiled_code_turns_alike(pairing: str) -> None:
    compiled = torch.compile(apply_rotary, backend="aot_eager", fullgraph=True)
    x, rotary = torch.randn(5, 3, 8), make_rotary(torch.randn(5, 4))
    torch.testing.assert_close(compiled(x, rotary, pairing=pairing), apply_rotary(x, rotary, pairing=pairing))  # type: ignore[arg-type]


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 16, dtype=torch.float64)
    frequencies = rotary_frequencies(16, 1e4)

    def score(at: int, other: int) -> float:
        turned = [
            apply_rotary(x, make_rotary(rotary_angles(torch.tensor([float(p)]).double(), frequencies)), pairing="half")
            for x, p in ((q, at), (k, other))
        ]
        return float((turned[0] * turned[1]).sum())

    assert math.isclose(score(3, 1), score(1003, 1001), rel_tol=1e-9)
    assert not math.isclose(score(3, 1), score(3, 2), rel_tol=1e-3)


def test_mistakes_are_named() -> None:
    x, rotary = torch.randn(2, 1, 8), make_rotary(torch.randn(2, 3))
    with pytest.raises(LayoutError, match="3 angles for heads of 8 channels; expected 4"):
        apply_rotary(x, rotary, pairing="half")
    with pytest.raises(ConfigError, match="neither 'interleaved' nor 'half'"):
        apply_rotary(x[..., :6], rotary, pairing="neox")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="head_dim=7 is odd"):
        rotary_frequencies(7, 1e4)
    with pytest.raises(ConfigError, match="multiple of 4"):
        rotary_frequencies_2d(6, 1e4, arrangement="blocked")
    with pytest.raises(ConfigError, match="arrangement"):
        rotary_frequencies_2d(8, 1e4, arrangement="rows")  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="need `axes`"):
        rotary_angles(torch.zeros(2, 3), torch.ones(4))
    with pytest.raises(LayoutError, match="one axis per pair"):
        rotary_angles(torch.zeros(2, 3), torch.ones(4), [0, 1])
    assert isinstance(rotary, Rotary)


def test_sections_one_block_after_another() -> None:
    """Qwen2-VL: 64 pairs; the first 16 follow time, then 24 rows and 24 columns."""
    axes = rotary_sections((16, 24, 24), interleaved=False)
    assert axes == (0,) * 16 + (1,) * 24 + (2,) * 24
    assert rotary_sections((2, 3, 3), interleaved=False) == (0, 0, 1, 1, 1, 2, 2, 2)


def test_sections_in_turns() -> None:
    """Qwen3-VL: pair j < 60 follows rows where j mod 3 is 1, columns where it is 2; all others follow time."""
    axes = rotary_sections((24, 20, 20), interleaved=True)
    assert axes[:7] == (0, 1, 2, 0, 1, 2, 0)
    assert axes[57:] == (0, 1, 2, 0, 0, 0, 0)
    assert [axes.count(axis) for axis in range(3)] == [24, 20, 20]
    assert rotary_sections((4, 2, 2), interleaved=True) == (0, 1, 2, 0, 1, 2, 0, 0)


def test_sections_that_cannot_take_turns_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(2, 3, 3\) cannot be interleaved"):
        rotary_sections((2, 3, 3), interleaved=True)
