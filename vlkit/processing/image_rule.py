"""ImageRule: which size an image gets, before any pixel is touched.

    (height, width) --target_size--> ResizePlan: resized size, canvas size, grid of patches

The longer an image is in patches, the more tokens it costs; a rule bounds that and leaves the aspect ratio as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from vlkit.config import AtLeast, Config, Positive, Size
from vlkit.errors import ConfigError, ImageError


class ResizePlan(NamedTuple):
    """What happens to one image. All pairs are (height, width) or (rows, columns).

    Attributes:
        resized: Size after resampling, in pixels.
        canvas: Size after padding, in pixels; a multiple of patch_size * merge_size each way.
        offset: Where the resized image lies on the canvas, from the top and from the left, in pixels.
        grid: Rows and columns of patches on the canvas.
    """

    resized: tuple[int, int]
    canvas: tuple[int, int]
    offset: tuple[int, int]
    grid: tuple[int, int]


class ImageRule(Config):
    """Sizes and statistics by which images become patches. The defaults are Kimi-VL's.

    Attributes:
        patch_size: Side of a square patch, in pixels.
        merge_size: Patches per side of the square that becomes one token; both sides of a grid are multiples of it.
        fit: How a size becomes a multiple of patch_size * merge_size. "pad" keeps the pixels and adds black on the
            right and at the bottom (Kimi-VL); "resize" rounds each side and resamples (Qwen2-VL).
        max_patches: Images of more whole patches are shrunk to about this many. A soft bound: whole patches are counted
            before padding, so the grid can end up a little larger (4356 for 4096).
        min_pixels: Smaller images are enlarged to at least this canvas, in pixels.
        max_pixels: No canvas is larger, in pixels. A hard bound; it wins over min_pixels.
        max_side: Most patches along one side, or None. A tower whose position table ends there needs it.
        max_aspect: Longest side over shortest, or None for any.
        mean: Per channel, subtracted from values in 0..1.
        std: Per channel, divided by afterwards.
        resample: Filter of the resize, antialiased.
    """

    patch_size: Size = 14
    merge_size: Size = 2
    fit: Literal["pad", "resize"] = "pad"
    max_patches: Size | None = 4096
    min_pixels: Size | None = None
    max_pixels: Size | None = None
    max_side: Size | None = 511
    max_aspect: Annotated[float, AtLeast(1)] | None = 200.0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"

    def check(self) -> None:
        if self.max_pixels is not None and self.max_pixels < self.multiple**2:
            raise ConfigError(
                f"ImageRule: max_pixels={self.max_pixels} is below one token of {self.multiple}x{self.multiple} pixels"
            )
        if self.max_pixels is not None and self.min_pixels is not None and self.max_pixels < self.min_pixels:
            raise ConfigError(f"ImageRule: max_pixels={self.max_pixels} is below min_pixels={self.min_pixels}")

    @property
    def multiple(self) -> int:
        """Pixels along one side of what becomes one token."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Values of one flattened RGB patch."""
        return 3 * self.patch_size**2

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Tokens that a grid of patches becomes after merging."""
        rows, columns = grid
        return rows * columns // self.merge_size**2

    def target_size(self, height: int, width: int) -> ResizePlan:
        """What happens to an image of this size, in pixels.

        Raises:
            ImageError: No pixels, an aspect ratio beyond max_aspect, or a side beyond max_side.

        Matches: Kimi-VL's rule ("pad") and Qwen2-VL's smart_resize ("resize") on the tables in tests. Where a thin
            image makes smart_resize overshoot max_pixels, its long side is cut back here so that the bound holds.
        """
        if height < 1 or width < 1:
            raise ImageError(f"an image of {width}x{height} pixels (width x height) has nothing to see")
        aspect = max(height, width) / min(height, width)
        if self.max_aspect is not None and aspect > self.max_aspect:
            raise ImageError(
                f"an image of {width}x{height} pixels (width x height) has aspect ratio {aspect:.6g}; the limit is "
                f"{self.max_aspect:.6g}. Crop it, or raise ImageRule.max_aspect"
            )
        height, width = self._soft_limit(height, width)
        canvas = self._rounded(height, width) if self.fit == "resize" else self._padded(height, width)
        bounded = self._within_budget(height, width, canvas)
        if self.fit == "resize":
            resized = bounded
        elif bounded != canvas:
            scale = min(bounded[0] / height, bounded[1] / width)
            resized = max(int(height * scale), 1), max(int(width * scale), 1)
        else:
            resized = height, width
        grid = bounded[0] // self.patch_size, bounded[1] // self.patch_size
        if self.max_side is not None and max(grid) > self.max_side:
            raise ImageError(
                f"an image of {width}x{height} pixels (width x height) needs a grid of {grid[0]}x{grid[1]} patches; "
                f"a side may have {self.max_side}. Crop it, or lower max_patches or max_pixels"
            )
        return ResizePlan(resized, bounded, (0, 0), grid)

    def _soft_limit(self, height: int, width: int) -> tuple[int, int]:
        whole = (height // self.patch_size) * (width // self.patch_size)
        if self.max_patches is None or whole <= self.max_patches:
            return height, width
        scale = math.sqrt(self.max_patches / whole)
        return max(int(height * scale), 1), max(int(width * scale), 1)

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        return self._multiples(height, width, math.ceil)

    def _rounded(self, height: int, width: int) -> tuple[int, int]:
        # Python's round: halves go to the even multiple. A side below half a multiple becomes 0 here: with min_pixels
        # the whole image is then enlarged, and only without it this side alone is raised.
        return self._multiples(height, width, round)

    def _within_budget(self, height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
        """The canvas, shrunk or enlarged at the image's aspect ratio to between min_pixels and max_pixels."""
        rows, columns = canvas
        # Multiply there and divide here, as published: at whole multiples the last bit decides.
        if self.min_pixels is not None and rows * columns < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            rows, columns = self._multiples(height * scale, width * scale, math.ceil)
        if self.max_pixels is not None and rows * columns > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            rows, columns = self._multiples(height / scale, width / scale, math.floor)
        rows, columns = max(rows, self.multiple), max(columns, self.multiple)
        if self.max_pixels is not None and rows * columns > self.max_pixels:  # thin: one side is a single multiple now
            long = self.max_pixels // self.multiple**2 * self.multiple
            rows, columns = min(rows, long), min(columns, long)
        return rows, columns

    def _multiples(self, height: float, width: float, rounded: Callable[[float], int]) -> tuple[int, int]:
        return rounded(height / self.multiple) * self.multiple, rounded(width / self.multiple) * self.multiple
