"""Strips: reproducible, of the promised sizes, and saying what they show."""

from __future__ import annotations

import numpy as np
import pytest

from vlkit.demo.digits import Digits, load_digits
from vlkit.demo.strips import AS_WRITTEN, MAX_DIGITS, MAX_ROWS, MIN_SIDE, Variation, _draw, make_strips


def test_the_same_seed_draws_the_same_strips() -> None:
    digits = load_digits("seen")
    first, again, other = (make_strips(digits, 20, seed=seed, variation=Variation()) for seed in (3, 3, 4))
    assert all(np.array_equal(a.pixels, b.pixels) and a.text == b.text for a, b in zip(first, again, strict=True))
    assert [strip.text for strip in first] != [strip.text for strip in other]


def test_sizes_and_lengths_cover_what_is_promised() -> None:
    strips = make_strips(load_digits("unseen"), 500, seed=0)
    assert {len(strip.text) for strip in strips} == set(range(1, MAX_DIGITS + 1))
    rows = {strip.pixels.shape[0] for strip in strips}
    assert min(rows) >= MIN_SIDE
    assert max(rows) == MAX_ROWS
    assert len({strip.pixels.shape for strip in strips}) > 100
    assert all(len(s.text) <= 2 for s in make_strips(load_digits("seen"), 50, seed=0, max_digits=2))


def test_the_text_names_the_digits_from_left_to_right() -> None:
    """Ten flat digits, each as bright as its number: the brightness from left to right is the text."""
    flat = np.broadcast_to(((1 + np.arange(10)) / 10)[:, None, None], (10, 8, 8)).astype(np.float32)
    for strip in make_strips(Digits(flat, np.arange(10)), 50, seed=1):
        brightness = strip.pixels.max(axis=0).astype(float) - strip.pixels.min()
        wanted = np.array([int(digit) + 1 for digit in strip.text], float)
        assert _is_subsequence(wanted / wanted.max(), brightness / brightness.max())


def _is_subsequence(wanted: np.ndarray, found: np.ndarray) -> bool:
    rest = iter(found)
    return all(any(abs(value - candidate) < 0.03 for candidate in rest) for value in wanted)


@pytest.mark.parametrize("side", [8, 16])
def test_a_digit_as_written_keeps_its_pixels(side: int) -> None:
    """At its own size bit for bit; at twice the size, averaged two by two, close to it."""
    images = load_digits("seen").images[:5]
    drawn = _draw(images, np.full(5, side), AS_WRITTEN, np.random.default_rng(0))
    edge = (drawn.shape[1] - side) // 2
    inner = drawn[:, edge : edge + side, edge : edge + side]
    scale = side // 8
    found = inner.reshape(5, 8, scale, 8, scale).mean((2, 4))
    if side == 8:
        np.testing.assert_allclose(found, images, atol=1e-5)
    else:
        assert np.corrcoef(found.ravel(), images.ravel())[0, 1] > 0.97


def test_variation_changes_the_digits_and_their_absence_does_not() -> None:
    images, sides = load_digits("seen").images[:8], np.full(8, 12)
    plain, again = (_draw(images, sides, AS_WRITTEN, np.random.default_rng(seed)) for seed in (0, 1))
    varied = _draw(images, sides, Variation(), np.random.default_rng(0))
    np.testing.assert_allclose(plain, again, atol=1e-6)
    assert np.abs(varied - plain).max() > 0.2
    assert np.corrcoef(varied.ravel(), plain.ravel())[0, 1] > 0.7
