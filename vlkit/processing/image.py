"""Images -> Packed patches, at their own sizes.

image --read_image--> RGB --target_size, resize, pad--> canvas [H, W, 3] uint8
      --patchify--> [rows * columns, 3 * T * P * P] fp32, raster order, flattened (channel, time, row, column)

A still image stands for all T frames of its patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
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


def pack_images(
    images: Sequence[Any], rule: ImageRule | None = None, reading: ReadRule | None = None, *, first: int = 0
) -> Packed:
    """Normalised patches of all images, end to end.

    Args:
        images: Whatever `read_image` takes, one entry per image.
        first: Index of the first one, for messages.

    Returns:
        Tokens [patches, 3 * frames_per_patch * patch_size ** 2] fp32; the layout has one grid (1, rows, columns) per image.

    Raises:
        EmptyBatchError: No images.
        ImageError: An image cannot be read or does not fit the rule; the message starts with "image <index>".
    """
    if not images:
        raise EmptyBatchError("no images to pack; leave patches out of the batch instead")
    rule = rule or ImageRule()
    read = [read_image(source, reading, name=f"image {index}") for index, source in enumerate(images, first)]
    plans = []
    for index, image in enumerate(read, first):
        try:
            plans.append(rule.target_size(image.height, image.width))
        except ImageError as error:
            raise ImageError(f"image {index}: {error}") from None
    layout = Layout.from_grids(plan.grid for plan in plans)
    patches = torch.empty(layout.num_tokens, rule.patch_dim)
    for image, plan, out in zip(read, plans, patches.split(list(layout.lengths)), strict=True):
        write_patches([on_canvas(image, plan, rule)], plan, rule, out)
    return Packed(patches, layout)


def on_canvas(image: Image.Image, plan: ResizePlan, rule: ImageRule) -> np.ndarray:
    """The resized image on its canvas, uint8 [H, W, 3]."""
    if plan.resized != (image.height, image.width):
        image = image.resize(plan.resized[::-1], _FILTERS[rule.resample])
    pixels = np.array(image)  # a copy: torch wants memory that it may write
    if plan.resized == plan.canvas:
        return pixels
    canvas = np.empty((*plan.canvas, 3), dtype=np.uint8)
    canvas[:] = rule.background
    (top, left), (height, width) = plan.offset, plan.resized
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def write_patches(frames: Sequence[np.ndarray], plan: ResizePlan, rule: ImageRule, out: Tensor) -> None:
    """Write the normalised patches of one time step into `out` [patches, 3 * T * P * P].

    The same reshape as `vlkit.layers.patch.patchify`, done while bytes become floats so that the pixels are moved once.

    Args:
        frames: Canvases of up to T frames; the last one stands for those that are missing.
    """
    size = rule.patch_size
    target = out.view(*plan.grid, 3, rule.frames_per_patch, size, size)
    for time, canvas in enumerate(frames):
        view = rearrange(torch.from_numpy(canvas), "(rows p) (cols q) c -> rows cols c p q", p=size, q=size)
        # In the published order (divide, subtract, divide), so that the values are theirs to the last bit.
        frame = target[:, :, :, time]
        torch.div(view, 255.0, out=frame)
        frame.sub_(_per_channel(rule.mean)).div_(_per_channel(rule.std))
    target[:, :, :, len(frames) :] = target[:, :, :, len(frames) - 1 : len(frames)]


def _per_channel(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
