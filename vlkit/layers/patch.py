"""Images to patches and back, and the linear layer over a flattened patch.

    image [channels, height, width] -> patchify -> [patches, channels * P * P] -> PatchEmbed -> [patches, dim]

Patches are in raster order over the whole image; a patch is flattened as (channel, row, column), which is how a
convolution kernel of size and stride P flattens, so its weight reshaped is the linear layer's.
"""

from __future__ import annotations

import math

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.errors import ConfigError, ImageError


def patchify(image: Tensor, patch_size: int) -> Float[Tensor, "patches patch_dim"]:
    """Cut an image [channels, height, width], or a clip [time, channels, height, width], into flattened patches.

    Raises:
        ImageError: A side that is not a multiple of patch_size, or another number of axes.
    """
    if image.ndim not in (3, 4):
        raise ImageError(
            f"expected an image [channels, height, width] or a clip [time, channels, height, width], "
            f"found shape {tuple(image.shape)}"
        )
    height, width = image.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ImageError(
            f"an image of {height}x{width} pixels does not divide into patches of {patch_size}; "
            f"resize or pad its sides to multiples of {patch_size}"
        )
    clip = image if image.ndim == 4 else image[None]
    return rearrange(clip, "t c (h p) (w q) -> (t h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(
    patches: Float[Tensor, "patches patch_dim"], grid: tuple[int, int, int], patch_size: int
) -> Float[Tensor, "time channels height width"]:
    """The inverse of `patchify`: the clip of a grid (time, rows, columns)."""
    t, h, w = grid
    return rearrange(patches, "(t h w) (c p q) -> t c (h p) (w q)", t=t, h=h, w=w, p=patch_size, q=patch_size)


class PatchEmbed(nn.Module):
    """A linear layer over the flattened patch: the function of a convolution with kernel and stride P.

    Args:
        frames: Time steps of a patch; it is then flattened as (channel, time, row, column).
    """

    def __init__(self, in_channels: int, patch_size: int, dim: int, *, frames: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels * frames * patch_size**2, dim, bias=bias)

    def forward(self, patches: Float[Tensor, "patches patch_dim"]) -> Float[Tensor, "patches dim"]:
        return self.proj(patches)


def conv_to_linear(weight: Float[Tensor, "dim channels *kernel"]) -> Float[Tensor, "dim patch_dim"]:
    """The weight of a patch convolution, over images or clips, as that of `PatchEmbed.proj`.

    Raises:
        ConfigError: A matrix, which is no kernel: how it flattens a patch cannot be known.
    """
    if weight.ndim not in (4, 5):
        raise ConfigError(f"expected a convolution's kernel of 4 or 5 axes, found {list(weight.shape)}")
    return weight.flatten(1)


def linear_to_conv(weight: Float[Tensor, "dim patch_dim"]) -> Float[Tensor, "dim 3 P P"]:
    """The inverse of `conv_to_linear`, for colour images: published patch embeddings have three channels.

    Raises:
        ConfigError: The width is not 3 * P * P.
    """
    side = math.isqrt(weight.shape[1] // 3)
    if 3 * side * side != weight.shape[1]:
        raise ConfigError(
            f"a patch of {weight.shape[1]} values is not 3 channels of a square; published towers take RGB"
        )
    return rearrange(weight, "dim (c p q) -> dim c p q", c=3, p=side, q=side)


def linear_to_conv3d(
    weight: Float[Tensor, "dim patch_dim"], *, frames: int, patch_size: int
) -> Float[Tensor, "dim channels frames P P"]:
    """The inverse of `conv_to_linear` for a convolution over clips."""
    return rearrange(weight, "dim (c t p q) -> dim c t p q", t=frames, p=patch_size, q=patch_size)
