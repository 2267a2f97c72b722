"""Strips: one to five handwritten digits side by side, and what they say.

digits [8, 8] -> each turned, sheared and scaled to 10..16 pixels -> pasted with gaps and offsets -> pixels [rows, columns]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from vlkit.demo.digits import Digits

MAX_DIGITS = 5
MIN_SIDE, MAX_SIDE = 10, 16  # of a digit, in pixels
MAX_ROWS = 16  # of a strip: one row of tokens where four patches of 8 pixels become one
_CANVAS = MAX_SIDE + 2  # a digit may lean out of its box by a pixel


class Strip(NamedTuple):
    """One picture and its text.

    Attributes:
        pixels: uint8 [rows, columns], light ink on a dark ground.
        text: The digits, left to right.
    """

    pixels: npt.NDArray[np.uint8]
    text: str


class Variation(NamedTuple):
    """How much the handwriting is varied; each number is the largest change either way.

    Attributes:
        rotation: In degrees.
        shear: Columns per row.
        stretch: Relative change of width and height, each on its own.
        shift: In pixels of the strip.
    """

    rotation: float = 16.0
    shear: float = 0.24
    stretch: float = 0.19
    shift: float = 0.8


AS_WRITTEN = Variation(0.0, 0.0, 0.0, 0.0)


def make_strips(
    digits: Digits,
    count: int,
    *,
    seed: int | tuple[int, ...],
    variation: Variation = AS_WRITTEN,
    min_digits: int = 1,
    max_digits: int = MAX_DIGITS,
) -> list[Strip]:
    """Draw strips at random: same arguments, same bits.

    Args:
        digits: Where the handwriting comes from.
        count: Strips.
        seed: Of the drawing; several numbers count as one seed.
        variation: Changes of each digit, for training; strips to be judged by keep the digits as they were written.
        min_digits: In a strip.
        max_digits: In a strip.
    """
    random = np.random.default_rng(seed)
    lengths = random.integers(min_digits, max_digits + 1, count)
    total = int(lengths.sum())
    chosen = random.integers(0, len(digits.labels), total)
    sides = random.integers(MIN_SIDE, MAX_SIDE + 1, total)
    drawn = _draw(digits.images[chosen], sides, variation, random)
    gaps = random.integers(0, 4, total)
    offsets = random.uniform(0, 1, total)
    margins = random.integers(0, 4, (count, 2))  # left, right
    spare = random.integers(0, 4, count)  # rows above or below the largest digit
    inks = random.uniform(0.55, 1.0, count)
    grounds = random.uniform(0.0, 0.15, count)

    strips = []
    first = 0
    for item in range(count):
        last = first + int(lengths[item])
        left, right = margins[item]
        own = sides[first:last]
        rows = min(int(own.max() + spare[item]), MAX_ROWS)
        columns = left + right + int(own.sum() + gaps[first : last - 1].sum())
        ink = np.zeros((rows + 2, columns + 2), np.float32)  # one pixel more all round, cut off below
        x = left
        for index in range(first, last):
            side = int(sides[index])
            y = round(float(offsets[index]) * (rows - side))
            edge = (MAX_SIDE - side) // 2
            box = drawn[index, edge : edge + side + 2, edge : edge + side + 2]
            place = ink[y : y + side + 2, x : x + side + 2]
            np.maximum(place, box, out=place)
            x += side + int(gaps[index])
        grey = grounds[item] + (inks[item] - grounds[item]) * ink[1:-1, 1:-1]
        text = "".join(map(str, digits.labels[chosen[first:last]]))
        strips.append(Strip(np.rint(grey * 255).astype(np.uint8), text))
        first = last
    return strips


def _draw(
    images: npt.NDArray[np.float32], sides: npt.NDArray[np.int64], variation: Variation, random: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Every digit at its size, in the middle of a canvas [digits, 18, 18]: one bilinear look-up for all."""
    count = len(images)

    def vary(largest: float) -> npt.NDArray[np.float64]:
        return random.uniform(-largest, largest, count)

    angle, shear = np.deg2rad(vary(variation.rotation)), vary(variation.shear)
    down = np.stack([-np.sin(angle), np.cos(angle)], axis=-1) / (1 + vary(variation.stretch))[:, None]
    across = np.stack([np.cos(angle), np.sin(angle)], axis=-1) / (1 + vary(variation.stretch))[:, None]
    turn = np.stack(
        [across + shear[:, None] * down, down], axis=1
    )  # [digits, (x, y) of the digit, (x, y) of the canvas]
    # A digit of an odd side has its middle half a pixel up and left of the canvas's, so that boxes are cut at whole pixels.
    move = (sides % 2 / 2)[:, None] + np.stack([vary(variation.shift), vary(variation.shift)], axis=-1)
    # Both canvas and digit reach from -1 to 1.
    affine = np.concatenate([turn * _CANVAS, turn @ move[:, :, None] * 2], axis=-1) / sides[:, None, None]
    grid = F.affine_grid(torch.from_numpy(affine.astype(np.float32)), [count, 1, _CANVAS, _CANVAS], align_corners=False)
    return F.grid_sample(torch.from_numpy(images)[:, None], grid, align_corners=False)[:, 0].numpy()
