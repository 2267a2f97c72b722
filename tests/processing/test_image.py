from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlkit.errors import EmptyBatchError, ImageError
from vlkit.processing import ImageRule, pack_images

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def slow_patches(image: Image.Image, rule: ImageRule) -> Tensor:
    """The rule as one reads it: pad, scale to 0..1, normalise, cut patch after patch."""
    plan = rule.target_size(image.height, image.width)
    image = image.resize(plan.resized[::-1], Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", plan.canvas[::-1], rule.background)
    canvas.paste(image, plan.offset[::-1])
    pixels = torch.tensor(np.array(canvas)).permute(2, 0, 1).float() / 255
    pixels = (pixels - torch.tensor(rule.mean)[:, None, None]) / torch.tensor(rule.std)[:, None, None]
    size = rule.patch_size
    return torch.stack(
        [
            pixels[:, None, row * size : (row + 1) * size, column * size : (column + 1) * size]
            .repeat(1, rule.frames_per_patch, 1, 1)
            .flatten()
            for row in range(plan.grid[0])
            for column in range(plan.grid[1])
        ]
    )


@pytest.mark.parametrize(
    "rule",
    [
        ImageRule(),
        ImageRule(patch_size=5, merge_size=3, max_patches=20, **CLIP),
        ImageRule(
            patch_size=4, fit="resize", max_patches=None, min_pixels=1000, max_pixels=2000, frames_per_patch=2, **CLIP
        ),
        ImageRule(patch_size=4, fit="letterbox", max_side=None, min_pixels=256, max_pixels=2000, longest=50, **CLIP),
        ImageRule(
            patch_size=4, fit="letterbox-chat", max_side=None, min_pixels=256, max_pixels=2000, longest=50, **CLIP
        ),
        ImageRule(patch_size=4, fit="stretch", merge_size=1, max_side=5, frames_per_patch=3, **CLIP),
    ],
    ids=["kimi", "shrunk", "qwen", "andes", "andes-chat", "qwen-vl"],
)
def test_patches_are_those_of_the_slow_way(rule: ImageRule) -> None:
    """Bit for bit, so that features can be compared with a published processor's."""
    images = [noise(29, 61), noise(3, 1, seed=1), noise(40, 40, seed=2)]

    packed = pack_images(images, rule)

    for image, patches in zip(images, packed.unpack(), strict=True):
        assert torch.equal(patches, slow_patches(image, rule))
    assert packed.layout.grids == tuple((1, *rule.target_size(i.height, i.width).grid) for i in images)


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 5, 8, 12, 16, 20])
def test_patches_of_any_size_are_cut_right(patch_size: int) -> None:
    """Bytes are moved eight, four, two or one at a time."""
    rule = ImageRule(patch_size=patch_size, merge_size=1, **CLIP)
    for rows, columns in ((5, 3), (1, 1)):
        image = noise(rows * patch_size, columns * patch_size)
        assert torch.equal(pack_images([image], rule).tokens, slow_patches(image, rule))


def test_torch_resamples_like_pillow_but_for_a_grey_level() -> None:
    rule = ImageRule(patch_size=4, fit="resize", max_patches=None, max_pixels=5000)
    image = noise(333, 77)

    pillow, torchs = (pack_images([image], rule.replace(resampler=name)).tokens for name in ("pillow", "torch"))

    steps = (torchs - pillow).abs() * 127.5
    assert 0 < steps.max() < 4.01  # pure noise is the worst case
    assert (steps > 1.01).float().mean() < 1e-3


def test_padding_is_black_before_normalisation() -> None:
    packed = pack_images([Image.new("RGB", (1, 1), (255, 255, 255))])

    assert packed.tokens.unique(return_counts=True)[1].tolist() == [4 * 588 - 3, 3]
    assert packed.tokens.min() == -1
    assert packed.tokens.max() == 1


def test_the_inputs_are_not_written_to() -> None:
    array = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    before = array.copy()

    packed = pack_images([array])
    packed.tokens.zero_()

    np.testing.assert_array_equal(array, before)


def test_errors_name_the_image() -> None:
    with pytest.raises(ImageError, match="image 1: an image of 201x1 pixels"):
        pack_images([noise(3, 3), noise(1, 201)])
    with pytest.raises(ImageError, match="image 2: 0x0 pixels"):
        pack_images([noise(3, 3), noise(3, 3), Image.new("RGB", (0, 0))])


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(EmptyBatchError):
        pack_images([])
