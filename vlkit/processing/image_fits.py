"""Fits: how the published families turn the size of an image into one that patches cover. Pure functions, by name.

    (height, width), rule --fit--> resized size, canvas, offset     [pixels]

All pairs are (height, width). A canvas is a multiple of patch_size * merge_size each way, called b below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vlkit.processing.image_rule import ImageRule

Size2 = tuple[int, int]


class ResizePlan(NamedTuple):
    """What happens to one image. All pairs are (height, width) or (rows, columns).

    Attributes:
        resized: Size after resampling, in pixels.
        canvas: Size after padding, in pixels; a multiple of patch_size * merge_size each way.
        offset: Where the resized image lies on the canvas, from the top and from the left, in pixels.
        grid: Rows and columns of patches on the canvas.
    """

    resized: Size2
    canvas: Size2
    offset: Size2
    grid: Size2


class Fitted(NamedTuple):
    """A plan without its grid."""

    resized: Size2
    canvas: Size2
    offset: Size2 = (0, 0)


def pad(height: int, width: int, rule: ImageRule) -> Fitted:
    """Keep the pixels, shrink what has too many patches, fill up on the right and at the bottom.

    Source: Kimi-VL, arXiv:2504.07491.
    """
    height, width = _soft_limit(height, width, rule.max_patches, rule.patch_size)
    canvas = _multiples(height, width, rule.multiple, math.ceil)
    bounded = _within_budget(height, width, canvas, rule)
    if bounded == canvas:
        return Fitted((height, width), canvas)
    return Fitted(_scaled(height, width, min(bounded[0] / height, bounded[1] / width)), bounded)


def resize(height: int, width: int, rule: ImageRule) -> Fitted:
    """Round each side to a multiple of b and resample; the aspect ratio moves by the rounding.

    Where a thin image makes the published function overshoot max_pixels, its long side is cut back so that the bound holds.

    Source: Qwen2-VL, arXiv:2409.12191 ("smart resize").
    """
    height, width = _soft_limit(height, width, rule.max_patches, rule.patch_size)
    # Python's round: halves go to the even multiple. A side below half a multiple becomes 0 here: with min_pixels
    # the whole image is then enlarged, and only without it this side alone is raised.
    canvas = _within_budget(height, width, _multiples(height, width, rule.multiple, round), rule)
    return Fitted(canvas, canvas)


def stretch(height: int, width: int, rule: ImageRule) -> Fitted:
    """A square of max_side patches, whatever the aspect ratio was.

    Source: Qwen-VL, arXiv:2308.12966.
    """
    side = (rule.max_side or 1) * rule.patch_size
    return Fitted((side, side), (side, side))


def letterbox(height: int, width: int, rule: ImageRule) -> Fitted:
    """Scale into the limits, round the canvas up, centre the image on it. Aligned images are left as they are.

    max_pixels is kept before rounding up, so a canvas can be a little larger.

    Source: AndesVL, arXiv:2510.11496, as its authors evaluate it.
    """
    rows, columns = float(height), float(width)
    if rule.longest is not None and max(rows, columns) > rule.longest:
        scale = rule.longest / max(rows, columns)
        rows, columns = rows * scale, columns * scale
    if rule.min_pixels is not None and rows * columns < rule.min_pixels:
        scale = math.sqrt(rule.min_pixels / (rows * columns))
        rows, columns = rows * scale, columns * scale
    if rule.max_pixels is not None and rows * columns > rule.max_pixels:
        scale = math.sqrt(rule.max_pixels / (rows * columns))
        rows, columns = rows * scale, columns * scale
    canvas = _multiples(rows, columns, rule.multiple, math.ceil)
    if canvas == (height, width):
        return Fitted(canvas, canvas)
    scale = min(canvas[0] / height, canvas[1] / width)
    offset = int((canvas[0] - height * scale) / 2), int((canvas[1] - width * scale) / 2)
    return Fitted(_scaled(height, width, scale), canvas, offset)


def letterbox_chat(height: int, width: int, rule: ImageRule) -> Fitted:
    """The other rule of AndesVL: that of the code published with its weights, for what has to agree with it.

    The canvas always grows, an aligned side by a full b. Images beyond `longest` are resampled once here, twice there.

    Source: AndesVL, arXiv:2510.11496, the `chat` method of its Hub repositories.
    """
    if rule.longest is not None and max(height, width) > rule.longest:
        height, width = _scaled(height, width, rule.longest / max(height, width))
    area = None
    if rule.max_pixels is not None and height * width > rule.max_pixels:
        area = rule.max_pixels
    elif rule.min_pixels is not None and height * width < rule.min_pixels:
        area = rule.min_pixels
    if area is None:
        canvas = _next_multiple(height, rule.multiple), _next_multiple(width, rule.multiple)
        resized = _scaled(height, width, min(canvas[0] / height, canvas[1] / width))
    else:
        aspect = width / height
        # A cap that is no multiple of b would give a canvas that patches do not cover.
        cap = 2**40 if rule.longest is None else rule.longest // rule.multiple * rule.multiple
        rows, columns = (
            min(_next_multiple(max(min(math.floor(side), cap), rule.multiple), rule.multiple), cap)
            for side in (math.sqrt(area / aspect), math.sqrt(area * aspect))
        )
        canvas = rows, columns
        scale = min(rows / height, columns / width)
        resized = max(round(height * scale), 1), max(round(width * scale), 1)
    return Fitted(resized, canvas, ((canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2))


FITS: dict[str, Callable[[int, int, ImageRule], Fitted]] = {
    "pad": pad,
    "resize": resize,
    "stretch": stretch,
    "letterbox": letterbox,
    "letterbox-chat": letterbox_chat,
}
"""The fits that a rule can name."""


def _scaled(height: int, width: int, scale: float) -> Size2:
    """Truncated, as published; no side vanishes."""
    return max(int(height * scale), 1), max(int(width * scale), 1)


def _next_multiple(side: int, multiple: int) -> int:
    return side + multiple - side % multiple


def _multiples(height: float, width: float, multiple: int, rounded: Callable[[float], int]) -> Size2:
    return rounded(height / multiple) * multiple, rounded(width / multiple) * multiple


def _soft_limit(height: int, width: int, max_patches: int | None, patch_size: int) -> Size2:
    whole = (height // patch_size) * (width // patch_size)
    if max_patches is None or whole <= max_patches:
        return height, width
    return _scaled(height, width, math.sqrt(max_patches / whole))


def _within_budget(height: int, width: int, canvas: Size2, rule: ImageRule) -> Size2:
    """The canvas, shrunk or enlarged at the image's aspect ratio to between min_pixels and max_pixels."""
    rows, columns = canvas
    # Multiply there and divide here, as published: at whole multiples the last bit decides.
    if rule.min_pixels is not None and rows * columns < rule.min_pixels:
        scale = math.sqrt(rule.min_pixels / (height * width))
        rows, columns = _multiples(height * scale, width * scale, rule.multiple, math.ceil)
    if rule.max_pixels is not None and rows * columns > rule.max_pixels:
        scale = math.sqrt(height * width / rule.max_pixels)
        rows, columns = _multiples(height / scale, width / scale, rule.multiple, math.floor)
    rows, columns = max(rows, rule.multiple), max(columns, rule.multiple)
    if rule.max_pixels is not None and rows * columns > rule.max_pixels:  # thin: one side is a single multiple now
        long = rule.max_pixels // rule.multiple**2 * rule.multiple
        rows, columns = min(rows, long), min(columns, long)
    return rows, columns
