"""The vision tower of Qwen2.5-VL: attention inside windows of 112 pixels, and inside whole frames in a few layers.

    patches of 2 frames -> window order -> linear -> blocks(RMSNorm, attention with 2-D rotary, RMSNorm, SwiGLU MLP)
        -> raster order -> features

Windows begin at the top left corner of every frame and are cut off at its right and lower edge. Patches are sorted by
window once before the blocks, so that a window is an item of a layout; a frame stays in one piece, so the layers with
whole frames need no other order.

Source: Qwen2.5-VL, arXiv:2502.13923, section 2.1.1; constants from the published config of Qwen/Qwen2.5-VL-7B-Instruct.
Matches: transformers' Qwen2.5-VL tower with the same weights, to 1e-5 relative in fp32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlkit.config import Config, Count, Depth, Positive, Size
from vlkit.errors import ConfigError, LayoutError
from vlkit.hub.keymap import KeyMap
from vlkit.layers.attention import Backend
from vlkit.layers.mlp import GatedMLP
from vlkit.layers.norm import RMSNorm
from vlkit.layers.patch import PatchEmbed
from vlkit.layers.rope import Rotary
from vlkit.layers.self_attention import SelfAttention
from vlkit.packing import Layout, Packed, Segments
from vlkit.registry import register_component
from vlkit.vision.qwen2_vit import tower_keys
from vlkit.vision.tower import (
    CLIP_PIXELS,
    PixelStatistics,
    TowerBlock,
    check_heads,
    check_layers,
    check_patches,
    grid_rotary,
    run_block,
)


class Qwen25ViTConfig(Config):
    """Sizes of a Qwen2.5-VL tower; the defaults are those of the 3B and 7B models.

    Attributes:
        dim: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads; a head must be a multiple of 4 channels wide.
        mlp_dim: Hidden width of the gated MLP.
        patch_size: Side of a square patch, in pixels.
        in_channels: Colour channels of a patch.
        frames_per_patch: Frames that one patch covers.
        window_size: Side of a window, in pixels; rounded down to whole blocks of merge_size x merge_size patches.
        full_layers: Layers, counted from 0, whose attention spans the whole frame.
        merge_size: Side of the block of patches that the projector will merge, in patches.
        theta: Base of the rotary wavelengths.
        norm_eps: Added to the mean square in every norm.
    """

    dim: Size = 1280
    num_layers: Depth = 32
    num_heads: Size = 16
    mlp_dim: Size = 3420
    patch_size: Depth = 14
    in_channels: Size = 3
    frames_per_patch: Size = 2
    window_size: Size = 112
    full_layers: tuple[Count, ...] = (7, 15, 23, 31)
    merge_size: Size = 2
    theta: Positive = 10000.0
    norm_eps: Positive = 1e-6

    def check(self) -> None:
        check_heads(self)
        check_layers(self, "full_layers", self.full_layers)
        if self.window_side < 1:
            raise ConfigError(
                f"Qwen25ViTConfig: a window of {self.window_size} pixels holds no block of {self.merge_size}x"
                f"{self.merge_size} patches; window_size must be at least {self.merge_size * self.patch_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch, as (channel, time, row, column)."""
        return self.in_channels * self.frames_per_patch * self.patch_size**2

    @property
    def out_dim(self) -> int:
        """Width of the features."""
        return self.dim

    @property
    def pixel_statistics(self) -> PixelStatistics:
        """Mean and spread by which pixels were normalised when the published weights were trained."""
        return CLIP_PIXELS

    @property
    def window_side(self) -> int:
        """Side of a window, in patches."""
        return self.window_size // (self.merge_size * self.patch_size) * self.merge_size


class Qwen25ViT(nn.Module):
    """The tower.

    Attributes:
        gradient_checkpointing: Recompute each block's activations in the backward instead of keeping them.
        attention_backend: See vlkit.layers.attention.
    """

    def __init__(self, config: Qwen25ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention_backend: Backend = "auto"
        self.patch_embed = PatchEmbed(
            config.in_channels, config.patch_size, config.dim, frames=config.frames_per_patch, bias=False
        )
        self.blocks = nn.ModuleList(
            TowerBlock(
                RMSNorm(config.dim, eps=config.norm_eps),
                SelfAttention(config.dim, config.num_heads),
                RMSNorm(config.dim, eps=config.norm_eps),
                GatedMLP(config.dim, config.mlp_dim, bias=True),
            )
            for _ in range(config.num_layers)
        )

    def forward(self, patches: Packed) -> Packed:
        """Features of every patch.

        Args:
            patches: [patches, patch_dim], each flattened as (channel, time, row, column), in raster order; the layout
                has grids, whose time counts groups of `frames_per_patch` frames. Cast to the dtype of the tower.

        Returns:
            [patches, dim] with the same layout, in raster order again.

        Raises:
            LayoutError: No grids, or patches of another size.
        """
        check_patches(self.config, patches)
        layout, config = patches.layout, self.config
        weight = self.patch_embed.proj.weight
        order, windows = window_order(layout, config.window_side)
        rotary = grid_rotary(layout, config.head_dim, config.theta, arrangement="blocked", dtype=weight.dtype)
        rotary = Rotary(cos=rotary.cos[order].to(weight.device), sin=rotary.sin[order].to(weight.device))
        order = order.to(weight.device)
        x = self.patch_embed(patches.tokens.to(weight.dtype)[order])
        x = self.forward_blocks(x, rotary, windows.segments(x.device), layout.frames().segments(x.device))
        return Packed(torch.empty_like(x).index_copy(0, order, x), layout)

    def forward_blocks(
        self, x: Float[Tensor, "tokens dim"], rotary: Rotary, windows: Segments, frames: Segments
    ) -> Float[Tensor, "tokens dim"]:
        """The block stack; all that depends on the layout comes as tensors, so it compiles once for all image sizes."""
        for layer, block in enumerate(self.blocks):
            segments = frames if layer in self.config.full_layers else windows
            x = run_block(
                block, x, rotary, segments, recompute=self.gradient_checkpointing, backend=self.attention_backend
            )
        return x


def window_order(layout: Layout, side: int) -> tuple[Int[Tensor, " tokens"], Layout]:
    """Patches sorted by window, and the windows.

    Args:
        layout: Grids are (time, rows, columns) in patches, raster order.
        side: Side of a window, in patches; at the right and lower edge of a frame windows are smaller.

    Returns:
        (order, windows): row i of the sorted tokens is row order[i] of the layout, int64 on the host; item j of
        `windows` is window j. Windows and the patches in them are in raster order, frame after frame.

    Raises:
        LayoutError: No grids.
    """
    if layout.grids is None:
        raise LayoutError("windows need a layout with grids; make it with Layout.from_grids")
    frames = layout.frames()
    parts, lengths = [torch.empty(0, dtype=torch.int64)], list[int]()
    for start, (_, rows, columns) in zip(frames.offsets, frames.grids or (), strict=False):
        order, sizes = _windows_of_frame(rows, columns, side)
        parts.append(order + start)
        lengths += sizes
    return torch.cat(parts), Layout(tuple(lengths))


@lru_cache(maxsize=1024)
def _windows_of_frame(rows: int, columns: int, side: int) -> tuple[Tensor, tuple[int, ...]]:
    frame = torch.arange(rows * columns, device="cpu").view(rows, columns)
    windows = [window for band in frame.split(side) for window in band.split(side, dim=1)]
    return torch.cat([window.flatten() for window in windows]), tuple(window.numel() for window in windows)


def keys(config: Qwen25ViTConfig) -> KeyMap:
    """Published names, there under `visual.` beside the `merger.` of the projector."""
    return tower_keys(
        frames_per_patch=config.frames_per_patch,
        patch_size=config.patch_size,
        mlp={"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    )


register_component(
    "vision",
    Qwen25ViTConfig,
    Qwen25ViT,
    {
        "qwen2.5-vit": Qwen25ViTConfig(),
        "qwen2.5-vit-72b": Qwen25ViTConfig(mlp_dim=3456),  # and 32B
        "qwen2.5-vit-tiny": Qwen25ViTConfig(
            dim=32, num_layers=2, num_heads=4, mlp_dim=48, patch_size=4, window_size=16, full_layers=(1,)
        ),
    },
)
