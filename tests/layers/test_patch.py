"""Patches: order of the cuts, the inverse, and the linear layer as the convolution that checkpoints hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vlkit.errors import ConfigError, ImageError
from vlkit.layers.patch import PatchEmbed, conv_to_linear, linear_to_conv, patchify, unpatchify


def test_patches_are_raster_and_flatten_as_channel_row_column() -> None:
    image = torch.randn(3, 4, 6)
    patches = patchify(image, 2)
    assert patches.shape == (6, 12)
    for index in range(6):
        row, column = divmod(index, 3)
        want = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(patches[index], want.flatten())


def test_a_clip_is_frame_after_frame() -> None:
    clip = torch.randn(2, 3, 4, 6)
    assert torch.equal(patchify(clip, 2), torch.cat([patchify(frame, 2) for frame in clip]))


def test_unpatchify_is_the_inverse() -> None:
    clip = torch.randn(2, 3, 10, 15)
    assert torch.equal(unpatchify(patchify(clip, 5), (2, 2, 3), 5), clip)


def test_the_linear_layer_is_a_convolution() -> None:
    """fp64; in fp32 the two differ by rounding, 1e-6."""
    embed = PatchEmbed(3, 7, 11).double()
    image = torch.randn(3, 14, 21, dtype=torch.float64)
    weight = linear_to_conv(embed.proj.weight.detach())
    assert weight.shape == (11, 3, 7, 7)
    theirs = F.conv2d(image[None], weight, embed.proj.bias.detach(), stride=7)[0].flatten(1).T
    torch.testing.assert_close(embed(patchify(image, 7)).detach(), theirs)
    assert torch.equal(conv_to_linear(weight), embed.proj.weight)


def test_mistakes_are_named() -> None:
    with pytest.raises(ImageError, match="13x14 pixels does not divide into patches of 7"):
        patchify(torch.zeros(3, 13, 14), 7)
    with pytest.raises(ImageError, match=r"found shape \(14, 14\)"):
        patchify(torch.zeros(14, 14), 7)
    with pytest.raises(ConfigError, match="50 values"):
        linear_to_conv(torch.zeros(4, 50))
