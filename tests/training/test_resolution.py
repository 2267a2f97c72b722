"""Bounds on image sizes over a run, and the sizes that come of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlkit.errors import ConfigError
from vlkit.processing import ImageRule, Processor, ProcessorConfig
from vlkit.training.resolution import ResolutionSchedule

POINTS = ((0.0, 896**2), (0.25, 1000**2), (0.75, 1792**2))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def test_bounds_hold_until_the_next_point_or_go_there_in_a_line() -> None:
    steps = ResolutionSchedule(points=POINTS)
    assert [steps.bound(at) for at in (0, 0.2499, 0.25, 0.7499, 0.75, 1)] == [
        896**2, 896**2, 1000**2, 1000**2, 1792**2, 1792**2,
    ]  # fmt: skip
    lines = ResolutionSchedule(points=POINTS, between="linear")
    assert [lines.bound(at) for at in (0, 0.25, 0.5, 0.75, 1)] == [
        896**2, 1000**2, (1000**2 + 1792**2) // 2, 1792**2, 1792**2,
    ]  # fmt: skip
    bounds = [lines.bound(at / 100) for at in range(101)]
    assert bounds == sorted(bounds)
    generator = rng()
    assert steps.pixels(0.5, generator) == 1000**2
    assert generator.random() == rng().random()  # a cap draws nothing


def test_areas_are_drawn_evenly_over_their_logarithm() -> None:
    schedule = ResolutionSchedule(points=((0, 10**6),), mode="sample", min_pixels=10**4)
    generator = rng()
    drawn = np.log10([schedule.pixels(0.5, generator) for _ in range(4000)])
    assert 4 <= drawn.min() < drawn.max() <= 6
    counts, _ = np.histogram(drawn, bins=8, range=(4, 6))
    assert abs(counts - 500).max() < 4 * math.sqrt(500 * 7 / 8)
    small = [schedule.pixels(0.5, generator, native=40_000) for _ in range(200)]
    assert 10**4 <= min(small) < max(small) <= 40_000
    assert schedule.pixels(0, generator, native=9) == 10**4
    assert [schedule.pixels(0.1, rng(3)) for _ in range(2)] == [schedule.pixels(0.9, rng(3))] * 2


@pytest.mark.parametrize("fit", ["pad", "resize"])
def test_sizes_keep_the_bound_the_aspect_and_the_patches(fit: str) -> None:
    processor = Processor(ProcessorConfig(image=ImageRule(fit=fit, max_patches=None)))  # type: ignore[arg-type]
    schedule = ResolutionSchedule(
        points=((0, 50_000), (1, 400_000)), between="linear", mode="sample", min_pixels=20_000
    )
    generator = rng()
    for _ in range(40):
        height, width = (int(side) for side in generator.integers(200, 700, 2))
        most = schedule.pixels(generator.random(), generator)
        picture = np.broadcast_to(np.uint8(0), (height, width, 3))
        batch = processor([{"role": "user", "content": [{"type": "image", "image": picture}]}], max_pixels=most)
        assert batch.patches is not None
        [(_, rows, columns)] = batch.patches.layout.grids or ()
        assert rows % 2 == columns % 2 == 0
        assert rows * columns * 14**2 <= most
        step = math.log((rows + 2) / rows) + math.log((columns + 2) / columns)
        assert abs(math.log(rows / columns) - math.log(height / width)) <= step


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"points": ()}, "the first is at progress 0"),
        ({"points": ((0.1, 5),)}, "the first is at progress 0"),
        ({"points": ((0, 5), (0.5, 6), (0.5, 7))}, "progress rises"),
        ({"points": ((0, 5), (1.5, 6))}, "progress rises"),
        ({"points": ((0, 5),), "mode": "sample"}, "belong together"),
        ({"points": ((0, 5),), "min_pixels": 3}, "belong together"),
        ({"points": ((0, 5), (1, 2)), "mode": "sample", "min_pixels": 3}, "min_pixels=3 is above the bound 2"),
    ],
)
def test_schedules_that_contradict_themselves_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ResolutionSchedule.from_dict(values)


def test_progress_is_a_share_of_the_run() -> None:
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            ResolutionSchedule(points=POINTS).bound(progress)
