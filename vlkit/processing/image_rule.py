"""ImageRule: which size an image gets, before any pixel is touched.

    (height, width) --target_size--> ResizePlan: resized size, canvas size, grid of patches

The longer an image is in patches, the more tokens it costs; a rule bounds that. How, is one of a few named fits.
"""

from __future__ import annotations

from typing import Annotated, Literal

from vlkit.config import AtLeast, Config, Positive, Size
from vlkit.errors import ConfigError, ImageError
from vlkit.processing.image_fits import FITS
from vlkit.processing.image_fits import ResizePlan as ResizePlan


class ImageRule(Config):
    """Sizes and statistics by which images become patches. The defaults are Kimi-VL's.

    Attributes:
        patch_size: Side of a square patch, in pixels.
        merge_size: Patches per side of the square that becomes one token; both sides of a grid are multiples of it.
        frames_per_patch: Frames of a video that share a patch; a still image is repeated that often.
        tokens_per_image: Tokens of any image, where a resampler makes always as many; None where merging decides.
        fit: How a size becomes a multiple of patch_size * merge_size. "pad" keeps the pixels and adds black on the
            right and at the bottom (Kimi-VL); "resize" rounds each side and resamples (Qwen2-VL and later); "stretch"
            makes a square of max_side patches (Qwen-VL); "letterbox" centres the image on its mean colour (AndesVL),
            and so does "letterbox-chat", by the sizes of the code published beside its weights.
        max_patches: "pad", "resize": images of more whole patches are shrunk to about this many. A soft bound: whole
            patches are counted before padding, so the grid can end up a little larger (4356 for 4096).
        min_pixels: Smaller images are enlarged to at least this canvas, in pixels.
        max_pixels: No canvas is larger, in pixels. A hard bound for "pad" and "resize", and wins over min_pixels; the
            letterboxes round up after it.
        longest: The letterboxes shrink longer sides to this, in pixels.
        max_side: Most patches along one side, or None. A tower whose position table ends there needs it.
        max_aspect: Longest side over shortest, or None for any.
        mean: Per channel, subtracted from values in 0..1.
        std: Per channel, divided by afterwards.
        resample: Filter of the resize, antialiased.
        resampler: What resizes: "pillow", as Kimi-VL and AndesVL were published, or "torch", which transformers uses for Qwen2-VL
            and later. It is several times faster, and differs by one grey level, seldom by more.
    """

    patch_size: Size = 14
    merge_size: Size = 2
    frames_per_patch: Size = 1
    tokens_per_image: Size | None = None
    fit: Literal["pad", "resize", "stretch", "letterbox", "letterbox-chat"] = "pad"
    max_patches: Size | None = 4096
    min_pixels: Size | None = None
    max_pixels: Size | None = None
    longest: Size | None = None
    max_side: Size | None = 511
    max_aspect: Annotated[float, AtLeast(1)] | None = 200.0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    resampler: Literal["pillow", "torch"] = "pillow"

    def check(self) -> None:
        if self.max_pixels is not None and self.max_pixels < self.multiple**2:
            raise ConfigError(
                f"ImageRule: max_pixels={self.max_pixels} is below one token of {self.multiple}x{self.multiple} pixels"
            )
        if self.max_pixels is not None and self.min_pixels is not None and self.max_pixels < self.min_pixels:
            raise ConfigError(f"ImageRule: max_pixels={self.max_pixels} is below min_pixels={self.min_pixels}")
        if self.longest is not None and self.longest < self.multiple:
            raise ConfigError(f"ImageRule: longest={self.longest} is below one token of {self.multiple} pixels")
        if self.resampler == "torch" and self.resample == "lanczos":
            raise ConfigError("ImageRule: the resampler 'torch' has no filter 'lanczos'; use 'pillow'")
        if self.fit == "stretch" and (self.max_side is None or self.max_side % self.merge_size):
            raise ConfigError(
                f"ImageRule: fit 'stretch' makes squares of max_side patches, a multiple of merge_size="
                f"{self.merge_size}; found max_side={self.max_side}"
            )

    @property
    def multiple(self) -> int:
        """Pixels along one side of what becomes one token."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Values of one flattened RGB patch, over all its frames."""
        return 3 * self.frames_per_patch * self.patch_size**2

    @property
    def background(self) -> tuple[int, int, int]:
        """What fills the canvas beside the image: black, or the mean colour in a letterbox. RGB, 0 to 255."""
        if not self.fit.startswith("letterbox"):
            return 0, 0, 0
        red, green, blue = (max(0, min(255, int(255 * level))) for level in self.mean)
        return red, green, blue

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Tokens that an image with this grid of patches becomes."""
        rows, columns = grid
        return self.tokens_per_image or rows * columns // self.merge_size**2

    def target_size(self, height: int, width: int) -> ResizePlan:
        """What happens to an image of this size, in pixels.

        Raises:
            ImageError: No pixels, an aspect ratio beyond max_aspect, or a side beyond max_side.

        Matches: the published rules of Kimi-VL, Qwen2-VL and AndesVL on the tables in tests.
        """
        if height < 1 or width < 1:
            raise ImageError(f"an image of {width}x{height} pixels (width x height) has nothing to see")
        aspect = max(height, width) / min(height, width)
        if self.max_aspect is not None and aspect > self.max_aspect:
            raise ImageError(
                f"an image of {width}x{height} pixels (width x height) has aspect ratio {aspect:.6g}; the limit is "
                f"{self.max_aspect:.6g}. Crop it, or raise ImageRule.max_aspect"
            )
        fitted = FITS[self.fit](height, width, self)
        grid = fitted.canvas[0] // self.patch_size, fitted.canvas[1] // self.patch_size
        if self.max_side is not None and max(grid) > self.max_side:
            raise ImageError(
                f"an image of {width}x{height} pixels (width x height) needs a grid of {grid[0]}x{grid[1]} patches; "
                f"a side may have {self.max_side}. Crop it, or lower max_patches or max_pixels"
            )
        return ResizePlan(*fitted, grid)
