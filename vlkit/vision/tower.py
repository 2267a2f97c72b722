"""What vision towers share: a check of the patches, the pre-norm block, the stack of blocks, and rotary angles of grids.

    check_patches(config, patches) -> embed -> run_blocks(blocks, x, rotary, segments, ...) -> norm

A tower's own file gives its config, how patches are embedded, which blocks it has, and its published names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlkit.errors import ConfigError, LayoutError
from vlkit.layers.attention import Backend
from vlkit.layers.rope import Arrangement, Rotary, grid_positions, make_rotary, rotary_angles, rotary_frequencies_2d
from vlkit.packing import Layout, Packed, Segments


@runtime_checkable
class PatchConfig(Protocol):
    """The fields of a tower's config that say what a patch is."""

    @property
    def patch_size(self) -> int: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def patch_dim(self) -> int: ...


@runtime_checkable
class StackConfig(Protocol):
    """The fields of a tower's config that size its blocks."""

    @property
    def dim(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...


def check_heads(config: StackConfig) -> None:
    """Refuse a width that 2-D rotary embedding cannot share among heads.

    Raises:
        ConfigError: Heads that are not a multiple of 4 channels wide.
    """
    if config.dim % (4 * config.num_heads):
        raise ConfigError(
            f"{type(config).__name__}: dim={config.dim} is not a multiple of 4 * num_heads={4 * config.num_heads}; "
            "a head shares its channel pairs equally between rows and columns"
        )


def check_layers(config: StackConfig, name: str, layers: tuple[int, ...]) -> None:
    """Refuse a list of layers that names one twice, in falling order, or beyond the last.

    Raises:
        ConfigError: Such a list.
    """
    if list(layers) != sorted(set(layers)) or any(layer >= config.num_layers for layer in layers):
        raise ConfigError(
            f"{type(config).__name__}.{name}: {layers} must rise and stay below num_layers={config.num_layers}; "
            "layers are counted from 0"
        )


class PixelStatistics(NamedTuple):
    """Per colour channel, of values in 0..1: (value - mean) / std is what a tower sees."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CLIP_PIXELS = PixelStatistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""CLIP's, arXiv:2103.00020; towers that say nothing take 0.5 and 0.5."""


def check_patches(config: PatchConfig, patches: Packed, *, max_grid_side: int | None = None) -> None:
    """Refuse patches that a tower would misread.

    Args:
        config: Says how many values a patch has.
        patches: [patches, patch_dim] with grids.
        max_grid_side: Longest side of an image, in patches.

    Raises:
        LayoutError: No grids, a side of more than max_grid_side patches, or patches of another size.
    """
    tokens, grids = patches.tokens, patches.layout.grids
    if grids is None:
        raise LayoutError("a vision tower needs the grid of every image; make the layout with Layout.from_grids")
    if tokens.ndim != 2 or tokens.shape[1] != config.patch_dim:
        frames = getattr(config, "frames_per_patch", 1)
        raise LayoutError(
            f"patches have shape {tuple(tokens.shape)}; expected {config.patch_dim} values each: "
            f"{config.in_channels} channels of {f'{frames} frames of ' if frames > 1 else ''}"
            f"{config.patch_size}x{config.patch_size} pixels"
        )
    if max_grid_side is None:
        return
    for image, (_, rows, columns) in enumerate(grids):
        if max(rows, columns) > max_grid_side:
            raise LayoutError(
                f"image {image}: a grid of {rows}x{columns} patches is longer than {max_grid_side} on a side; "
                f"resize it to at most {max_grid_side * config.patch_size} pixels per side"
            )


class TowerBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)).

    Args:
        attn: `(x, rotary, segments, backend=) -> x`, such as SelfAttention.
        mlp: `x -> x`.
    """

    def __init__(self, norm1: nn.Module, attn: nn.Module, norm2: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp

    def forward(
        self, x: Float[Tensor, "tokens dim"], rotary: Rotary | None, segments: Segments, *, backend: Backend = "auto"
    ) -> Float[Tensor, "tokens dim"]:
        x = x + self.attn(self.norm1(x), rotary, segments, backend=backend)
        return x + self.mlp(self.norm2(x))


def run_block(block: Callable[..., Any], x: Tensor, *context: Any, recompute: bool, backend: Backend) -> Any:
    """One block; with `recompute`, while gradients are recorded, its activations are made again in the backward.

    Args:
        context: What the block takes after x, such as rotary and segments.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, *context, backend=backend, use_reentrant=False)
    return block(x, *context, backend=backend)


def run_blocks(
    blocks: Iterable[Callable[..., Any]], x: Tensor, *context: Any, recompute: bool, backend: Backend
) -> Tensor:
    """Blocks one after another, all with the same context. See `run_block`."""
    for block in blocks:
        x = run_block(block, x, *context, recompute=recompute, backend=backend)
    return x


def grid_rotary(
    layout: Layout,
    head_dim: int,
    theta: float,
    *,
    arrangement: Arrangement,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Rotary:
    """Cosines and sines of all patches by row and column; see `rotary_frequencies_2d` for the arrangements.

    Args:
        dtype: Of the tower: angles are fp64 where it is, else fp32.
        device: Where they go; they are computed on the host.
    """
    frequencies, axes = rotary_frequencies_2d(head_dim, theta, arrangement=arrangement)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = rotary_angles(grid_positions(layout).to(wide), frequencies, axes)
    rotary = make_rotary(angles)
    return Rotary(rotary.cos.to(device), rotary.sin.to(device))
