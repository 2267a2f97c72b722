"""The vision tower of Qwen3-VL: a learned position table and 2-D rotary, with features of several depths (DeepStack).

    patches of 2 frames -> linear + bilinear table -> blocks(LayerNorm, attention with 2-D rotary, LayerNorm, tanh-GELU MLP)
        -> [features of the last block | features after block taps[0] | taps[1] | ...]

There is no norm after the last block: the projector has one for every level.

Source: Qwen3-VL, arXiv:2511.21631, section 2; DeepStack, arXiv:2406.04334; constants from the published configs of
Qwen/Qwen3-VL-8B-Instruct and Qwen/Qwen3-VL-4B-Instruct.
Matches: transformers' Qwen3-VL tower with the same weights, to 1e-5 relative in fp32.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.config import Config, Count, Depth, Positive, Size
from vlkit.hub.keymap import KeyMap, rename, reshape
from vlkit.layers.attention import Backend
from vlkit.layers.mlp import MLP
from vlkit.layers.norm import LayerNorm
from vlkit.layers.patch import PatchEmbed
from vlkit.layers.position import PositionTable
from vlkit.layers.rope import Rotary
from vlkit.layers.self_attention import SelfAttention
from vlkit.packing import Packed, Segments
from vlkit.registry import register_component
from vlkit.vision.qwen2_vit import tower_keys
from vlkit.vision.tower import TowerBlock, check_heads, check_layers, check_patches, grid_rotary, run_block


class Qwen3ViTConfig(Config):
    """Sizes of a Qwen3-VL tower; the defaults are those of the 8B, 32B, 30B-A3B and 235B-A22B models.

    Attributes:
        dim: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads; a head must be a multiple of 4 channels wide.
        mlp_dim: Hidden width of the MLP.
        patch_size: Side of a square patch, in pixels.
        in_channels: Colour channels of a patch.
        frames_per_patch: Frames that one patch covers.
        position_grid: Rows and columns of the learned position table, in patches.
        taps: Layers, counted from 0, after which features are also taken, in rising order.
        theta: Base of the rotary wavelengths.
        norm_eps: Added to the variance in every norm.
    """

    dim: Size = 1152
    num_layers: Depth = 27
    num_heads: Size = 16
    mlp_dim: Size = 4304
    patch_size: Depth = 16
    in_channels: Size = 3
    frames_per_patch: Size = 2
    position_grid: tuple[Size, Size] = (48, 48)
    taps: tuple[Count, ...] = (8, 16, 24)
    theta: Positive = 10000.0
    norm_eps: Positive = 1e-6

    def check(self) -> None:
        check_heads(self)
        check_layers(self, "taps", self.taps)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch, as (channel, time, row, column)."""
        return self.in_channels * self.frames_per_patch * self.patch_size**2

    @property
    def num_levels(self) -> int:
        """Depths whose features are given: the last, and every tap."""
        return 1 + len(self.taps)

    @property
    def out_dim(self) -> int:
        """Width of the features, all levels side by side."""
        return self.num_levels * self.dim


class Qwen3ViT(nn.Module):
    """The tower.

    Attributes:
        gradient_checkpointing: Recompute each block's activations in the backward instead of keeping them.
        attention_backend: See vlkit.layers.attention.
    """

    def __init__(self, config: Qwen3ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention_backend: Backend = "auto"
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, config.dim, frames=config.frames_per_patch)
        self.positions = PositionTable(*config.position_grid, config.dim)
        self.blocks = nn.ModuleList(
            TowerBlock(
                LayerNorm(config.dim, eps=config.norm_eps),
                SelfAttention(config.dim, config.num_heads),
                LayerNorm(config.dim, eps=config.norm_eps),
                MLP(config.dim, config.mlp_dim, activation="gelu_tanh"),
            )
            for _ in range(config.num_layers)
        )

    def forward(self, patches: Packed) -> Packed:
        """Features of every patch.

        Args:
            patches: [patches, patch_dim], each flattened as (channel, time, row, column), in raster order; the layout
                has grids, whose time counts groups of `frames_per_patch` frames. Cast to the dtype of the tower.

        Returns:
            [patches, num_levels * dim] with the same layout: the last block's features, then those of the taps.

        Raises:
            LayoutError: No grids, or patches of another size.
        """
        check_patches(self.config, patches)
        layout, config = patches.layout, self.config
        dtype = self.patch_embed.proj.weight.dtype
        positions = self.positions(layout, mode="bilinear", align_corners=True)
        x = self.patch_embed(patches.tokens.to(dtype)) + positions.to(dtype)
        rotary = grid_rotary(layout, config.head_dim, config.theta, arrangement="blocked", dtype=dtype, device=x.device)
        return Packed(self.forward_blocks(x, rotary, layout.frames().segments(x.device)), layout)

    def forward_blocks(
        self, x: Float[Tensor, "tokens dim"], rotary: Rotary, segments: Segments
    ) -> Float[Tensor, "tokens levels_dim"]:
        """The block stack; all that depends on the layout comes as tensors, so it compiles once for all image sizes."""
        taken = []
        for layer, block in enumerate(self.blocks):
            x = run_block(
                block, x, rotary, segments, recompute=self.gradient_checkpointing, backend=self.attention_backend
            )
            if layer in self.config.taps:
                taken.append(x)
        return torch.cat([x, *taken], dim=-1) if taken else x


def keys(config: Qwen3ViTConfig) -> KeyMap:
    """Published names, there under `model.visual.` beside the `merger.` and `deepstack_merger_list.` of the projector."""
    shared = tower_keys(
        frames_per_patch=config.frames_per_patch,
        patch_size=config.patch_size,
        mlp={"linear_fc1": "fc1", "linear_fc2": "fc2"},
    )
    return shared + KeyMap(
        rename("patch_embed.proj.bias", "patch_embed.proj.bias"),
        reshape("pos_embed.weight", "positions.table", partial(_as_grid, grid=config.position_grid), _as_rows),
    )


def _as_grid(table: Float[Tensor, "cells dim"], *, grid: tuple[int, int]) -> Float[Tensor, "rows cols dim"]:
    return table.unflatten(0, grid)


def _as_rows(table: Float[Tensor, "rows cols dim"]) -> Float[Tensor, "cells dim"]:
    return table.flatten(0, 1)


register_component(
    "vision",
    Qwen3ViTConfig,
    Qwen3ViT,
    {
        "qwen3-vit": Qwen3ViTConfig(),
        "qwen3-vit-small": Qwen3ViTConfig(dim=1024, num_layers=24, mlp_dim=4096, taps=(5, 11, 17)),
        "qwen3-vit-tiny": Qwen3ViTConfig(
            dim=32, num_layers=3, num_heads=4, mlp_dim=48, patch_size=4, position_grid=(6, 6), taps=(0, 1)
        ),
    },
)
