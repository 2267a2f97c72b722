"""The vision tower of Qwen2-VL: native resolution, images and videos alike, attention inside each frame.

    patches of 2 frames -> linear -> blocks(LayerNorm, attention with 2-D rotary, LayerNorm, quick-GELU MLP) -> features

There is no norm after the last block: the projector begins with one. A patch holds `frames_per_patch` frames; a still
image repeats itself over them.

Source: Qwen2-VL, arXiv:2409.12191, section 2.1; constants from the published config of Qwen/Qwen2-VL-7B-Instruct.
Matches: transformers' Qwen2-VL tower with the same weights, to 1e-5 relative in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from vlkit.config import Config, Depth, Positive, Size
from vlkit.hub.keymap import KeyMap, rename, reshape, split
from vlkit.layers.attention import Backend
from vlkit.layers.mlp import MLP
from vlkit.layers.norm import LayerNorm
from vlkit.layers.patch import PatchEmbed, conv_to_linear, linear_to_conv3d
from vlkit.layers.rope import Rotary
from vlkit.layers.self_attention import SelfAttention
from vlkit.packing import Packed, Segments
from vlkit.registry import register_component
from vlkit.vision.tower import (
    CLIP_PIXELS,
    PixelStatistics,
    TowerBlock,
    check_heads,
    check_patches,
    grid_rotary,
    run_blocks,
)


class Qwen2ViTConfig(Config):
    """Sizes of a Qwen2-VL tower; the defaults are those of all published sizes of the family.

    Attributes:
        dim: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads; a head must be a multiple of 4 channels wide.
        mlp_dim: Hidden width of the MLP.
        patch_size: Side of a square patch, in pixels.
        in_channels: Colour channels of a patch.
        frames_per_patch: Frames that one patch covers.
        theta: Base of the rotary wavelengths.
        norm_eps: Added to the variance in every norm.
    """

    dim: Size = 1280
    num_layers: Depth = 32
    num_heads: Size = 16
    mlp_dim: Size = 5120
    patch_size: Depth = 14
    in_channels: Size = 3
    frames_per_patch: Size = 2
    theta: Positive = 10000.0
    norm_eps: Positive = 1e-6

    def check(self) -> None:
        check_heads(self)

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


class Qwen2ViT(nn.Module):
    """The tower.

    Attributes:
        gradient_checkpointing: Recompute each block's activations in the backward instead of keeping them.
        attention_backend: See vlkit.layers.attention.
    """

    def __init__(self, config: Qwen2ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention_backend: Backend = "auto"
        self.patch_embed = PatchEmbed(
            config.in_channels, config.patch_size, config.dim, frames=config.frames_per_patch, bias=False
        )
        self.blocks = nn.ModuleList(
            TowerBlock(
                LayerNorm(config.dim, eps=config.norm_eps),
                SelfAttention(config.dim, config.num_heads),
                LayerNorm(config.dim, eps=config.norm_eps),
                MLP(config.dim, config.mlp_dim, activation="quick_gelu"),
            )
            for _ in range(config.num_layers)
        )

    def forward(self, patches: Packed) -> Packed:
        """Features of every patch.

        Args:
            patches: [patches, patch_dim], each flattened as (channel, time, row, column), in raster order; the layout
                has grids, whose time counts groups of `frames_per_patch` frames. Cast to the dtype of the tower.

        Returns:
            [patches, dim] with the same layout.

        Raises:
            LayoutError: No grids, or patches of another size.
        """
        check_patches(self.config, patches)
        layout, config = patches.layout, self.config
        dtype = self.patch_embed.proj.weight.dtype
        x = self.patch_embed(patches.tokens.to(dtype))
        rotary = grid_rotary(layout, config.head_dim, config.theta, arrangement="blocked", dtype=dtype, device=x.device)
        return Packed(self.forward_blocks(x, rotary, layout.frames().segments(x.device)), layout)

    def forward_blocks(
        self, x: Float[Tensor, "tokens dim"], rotary: Rotary, segments: Segments
    ) -> Float[Tensor, "tokens dim"]:
        """The block stack; all that depends on the layout comes as tensors, so it compiles once for all image sizes."""
        return run_blocks(
            self.blocks, x, rotary, segments, recompute=self.gradient_checkpointing, backend=self.attention_backend
        )


def tower_keys(*, frames_per_patch: int, patch_size: int, mlp: Mapping[str, str]) -> KeyMap:
    """The names that the towers of Qwen2-VL and its successors share.

    Args:
        frames_per_patch: Frames that one patch covers.
        patch_size: Side of a patch, in pixels.
        mlp: Published names of the MLP's linear layers -> ours.
    """
    kernel = partial(linear_to_conv3d, frames=frames_per_patch, patch_size=patch_size)
    return KeyMap(
        reshape("patch_embed.proj.weight", "patch_embed.proj.weight", conv_to_linear, kernel),
        rename("blocks.{layer}.{norm}.{kind}", "blocks.{layer}.{norm}.{kind}", norm=("norm1", "norm2")),
        split("blocks.{layer}.attn.qkv.{kind}", "blocks.{layer}.attn.{part}.{kind}", part=("q", "k", "v")),
        rename("blocks.{layer}.attn.proj.{kind}", "blocks.{layer}.attn.out.{kind}"),
        rename("blocks.{layer}.mlp.{linear}.{kind}", "blocks.{layer}.mlp.{linear}.{kind}", linear=mlp),
    )


def keys(config: Qwen2ViTConfig) -> KeyMap:
    """Published names, there under `visual.` beside the `merger.` of the projector."""
    return tower_keys(
        frames_per_patch=config.frames_per_patch, patch_size=config.patch_size, mlp={"fc1": "fc1", "fc2": "fc2"}
    )


register_component(
    "vision",
    Qwen2ViTConfig,
    Qwen2ViT,
    {
        "qwen2-vit": Qwen2ViTConfig(),
        "qwen2-vit-tiny": Qwen2ViTConfig(dim=32, num_layers=2, num_heads=4, mlp_dim=48, patch_size=4),
    },
)
