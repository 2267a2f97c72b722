"""Images -> Packed patches, at their own sizes.

image --read_image--> RGB --target_size, resize, pad--> canvas [H, W, 3] uint8
      --patchify--> [rows * columns, 3 * T * P * P] fp32, raster order, flattened (channel, time, row, column)

A still image stands for all T frames of its patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlkit.errors import EmptyBatchError, ImageError
from vlkit.packing import Layout, Packed
from vlkit.processing.image_reading import ReadRule, read_image
from vlkit.processing.image_rule import ImageRule, ResizePlan

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


class Canvases(NamedTuple):
    """Images that are to become one item: one image, or the frames of a video.

    Attributes:
        frames: uint8 [H, W, 3] each.
        plan: How they came to their size.
        rule: Says their mean and std.
    """

    frames: list[np.ndarray]
    plan: ResizePlan
    rule: ImageRule


def prepare_image(source: Any, rule: ImageRule, reading: ReadRule | None = None, *, name: str = "image") -> Canvases:
    """The image at its size, before it becomes floats.

    Raises:
        ImageError: It cannot be read or does not fit the rule; the message starts with the name.
    """
    image = read_image(source, reading, name=name)
    try:
        plan = rule.target_size(image.height, image.width)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    return Canvases([on_canvas(image, plan, rule)], plan, rule)


def pack_images(images: Sequence[Any], rule: ImageRule | None = None, reading: ReadRule | None = None) -> Packed:
    """Normalised patches of all images, end to end.

    Args:
        images: Whatever `read_image` takes, one entry per image.

    Returns:
        Tokens [patches, 3 * frames_per_patch * patch_size ** 2] fp32; the layout has one grid (1, rows, columns) per image.

    Raises:
        EmptyBatchError: No images.
        ImageError: An image cannot be read or does not fit the rule; the message starts with "image <index>".
    """
    if not images:
        raise EmptyBatchError("no images to pack; leave patches out of the batch instead")
    rule = rule or ImageRule()
    prepared = [prepare_image(source, rule, reading, name=f"image {index}") for index, source in enumerate(images)]
    return pack_canvases(prepared, rule)


def pack_canvases(items: Sequence[Canvases], rule: ImageRule) -> Packed:
    """Normalised patches of all items, end to end; a last time step that lacks frames repeats its last one."""
    size = rule.frames_per_patch
    layout = Layout.from_grids((-(-len(item.frames) // size), *item.plan.grid) for item in items)
    # NumPy's memory comes in large pages, which are several times as fast to touch first as torch's small ones.
    patches = torch.from_numpy(np.empty((layout.num_tokens, rule.patch_dim), dtype=np.float32))
    for item, out in zip(items, patches.split(list(layout.lengths)), strict=True):
        for step, place in enumerate(out.split(item.plan.grid[0] * item.plan.grid[1])):
            _write_step(item.frames[step * size : (step + 1) * size], item.plan.grid, item.rule, place)
    return Packed(patches, layout)


def on_canvas(image: Image.Image, plan: ResizePlan, rule: ImageRule) -> np.ndarray:
    """The resized image on its canvas, uint8 [H, W, 3]."""
    if plan.resized == (image.height, image.width):
        pixels = np.asarray(image)
    elif rule.resampler == "pillow":
        pixels = np.asarray(image.resize(plan.resized[::-1], _FILTERS[rule.resample]))
    else:
        planes = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
        pixels = F.interpolate(planes, plan.resized, mode=rule.resample, antialias=True)[0].permute(1, 2, 0).numpy()
    if plan.resized == plan.canvas:
        return pixels
    canvas = np.empty((*plan.canvas, 3), dtype=np.uint8)
    canvas[:] = rule.background
    (top, left), (height, width) = plan.offset, plan.resized
    canvas[top : top + height, left : left + width] = pixels
    return canvas


_BLOCK = 2**16  # values normalised at a time: they stay in the cache from the first operation to the last


def _write_step(frames: Sequence[np.ndarray], grid: tuple[int, int], rule: ImageRule, out: Tensor) -> None:
    """Write the normalised patches of one time step into `out` [patches, 3 * T * P * P].

    The same reshape as `vlkit.layers.patch.patchify`, done on bytes: a quarter of the memory of the floats that they become.

    Args:
        frames: Canvases of up to T frames; the last one stands for those that are missing.
    """
    size = rule.patch_size
    target = out.view(-1, 3, rule.frames_per_patch, size * size)
    step = max(_BLOCK // (3 * size * size), 1)
    mean, std = _per_channel(rule.mean), _per_channel(rule.std)
    for time, canvas in enumerate(frames):
        last = time == len(frames) - 1
        places = target[:, :, time:] if last else target[:, :, time : time + 1]
        values = torch.from_numpy(_byte_patches(canvas, grid, size))
        for begin in range(0, len(values), step):
            # In the published order (divide, subtract, divide), so that the values are theirs to the last bit.
            block = values[begin : begin + step].float().div_(255.0).sub_(mean).div_(std)
            places[begin : begin + step] = block.unsqueeze(2)


def _byte_patches(canvas: np.ndarray, grid: tuple[int, int], size: int) -> np.ndarray:
    """The patches of a canvas as bytes, [patches, 3, P * P]. NumPy moves small runs of bytes faster than torch does."""
    planes = np.ascontiguousarray(canvas.transpose(2, 0, 1))
    word = next(word for word in (8, 4, 2, 1) if size % word == 0)  # bytes moved as one
    words = planes.view(f"u{word}").reshape(3, grid[0], size, grid[1], size // word)
    patches = np.require(words.transpose(1, 3, 0, 2, 4), requirements=("C", "W"))  # torch wants memory it may write
    return patches.view(np.uint8).reshape(grid[0] * grid[1], 3, size * size)


@cache
def _per_channel(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1)
