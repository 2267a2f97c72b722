"""ResolutionSchedule: how large images may be as a run goes on.

progress of the run in [0, 1] --points--> most pixels --cap, or draw below it--> max_pixels of a sample
                                                        --the processor's rule--> sides that patches cover
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import numpy as np

from vlkit.config import Config, Size
from vlkit.errors import ConfigError


class ResolutionSchedule(Config):
    """Most pixels of an image, over the progress of a run.

    Small images stay as they are: what comes out is a bound, given to the processor as max_pixels, whose rule makes the sides
    multiples of what patches cover.

    Attributes:
        points: (progress, most pixels) from which on a bound holds; the first is at 0, progress rises.
        between: "steps" holds each bound until the next point, "linear" goes to the next in a straight line.
        mode: "cap" takes the bound; "sample" draws an area log-uniformly between min_pixels and the bound, per sample.
        min_pixels: Least area drawn, for "sample".

    Source: Kimi-VL, arXiv:2504.07491, grows the size of images over the training of its tower, without numbers; AndesVL,
    arXiv:2510.11496, trains up to 896 x 896 pixels first and up to 1792 x 1792 then; drawn sizes are those of NaViT,
    arXiv:2307.06304.
    """

    points: tuple[tuple[float, Size], ...]
    between: Literal["steps", "linear"] = "steps"
    mode: Literal["cap", "sample"] = "cap"
    min_pixels: Size | None = None

    def check(self) -> None:
        if not self.points or self.points[0][0] != 0:
            raise ConfigError(f"ResolutionSchedule.points: the first is at progress 0, found {self.points[:1]}")
        if any(not a < b <= 1 for (a, _), (b, _) in pairwise(self.points)):
            raise ConfigError(f"ResolutionSchedule.points: progress rises from 0 to at most 1, found {self.points}")
        if (self.mode == "sample") != (self.min_pixels is not None):
            raise ConfigError("ResolutionSchedule: mode 'sample' and min_pixels belong together")
        least = min(pixels for _, pixels in self.points)
        if self.min_pixels is not None and self.min_pixels > least:
            raise ConfigError(f"ResolutionSchedule: min_pixels={self.min_pixels} is above the bound {least}")

    def bound(self, progress: float) -> int:
        """Most pixels at a point of the run.

        Args:
            progress: In [0, 1].

        Raises:
            ValueError: It is not.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress {progress} of a run; expected 0 to 1")
        index = max(i for i, (start, _) in enumerate(self.points) if start <= progress)
        (start, pixels), behind = self.points[index], self.points[index + 1 : index + 2]
        if self.between == "steps" or not behind:
            return pixels
        [(end, next_pixels)] = behind
        return round(pixels + (next_pixels - pixels) * (progress - start) / (end - start))

    def pixels(self, progress: float, rng: np.random.Generator, native: int | None = None) -> int:
        """Most pixels of a sample's images.

        Args:
            progress: In [0, 1].
            rng: Of the sample; "sample" takes one number of it, "cap" none.
            native: Pixels of the sample's largest image. Then the area is drawn below that, so that small images are shrunk as
                often as large ones; without, an area above it leaves the image as it is.
        """
        most = self.bound(progress)
        if self.mode == "cap":
            return most
        assert self.min_pixels is not None
        least = self.min_pixels
        if native is not None:
            most = max(min(most, native), least)
        drawn = math.exp(math.log(least) + rng.random() * (math.log(most) - math.log(least)))
        return min(max(round(drawn), least), most)
