"""AIMv2 at native resolution: the tower of AndesVL 1B, 2B and 4B.

    patches -> linear -> RMSNorm + resampled table -> blocks(RMSNorm, attention with 2-D rotary, RMSNorm, SwiGLU) -> RMSNorm

AIMv2 was published for square images of one size, without rotary embedding. Native-resolution towers keep its table, which
is resampled to the grid of every image, and turn queries and keys by row and column. With `use_rope=False`, on the grid of
the table, the features are those of the published encoder.

Source: AIMv2, arXiv:2411.14402; AndesVL, arXiv:2510.11496, section 2.
Matches: transformers' aimv2 and timm's aimv2 with the same weights, without rotary, to 1e-5 relative in fp32; golden numbers
of the encoder that AndesVL's authors published in their evaluation code, to 1e-4. Published weights were not run.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.config import Config, Depth, Positive, Size
from vlkit.hub.keymap import KeyMap, rename, reshape, split
from vlkit.layers.attention import Backend
from vlkit.layers.mlp import GatedMLP
from vlkit.layers.norm import RMSNorm
from vlkit.layers.patch import PatchEmbed, conv_to_linear, linear_to_conv
from vlkit.layers.position import PositionTable, list_to_table, table_to_list
from vlkit.layers.rope import Rotary
from vlkit.layers.self_attention import SelfAttention
from vlkit.packing import Layout, Packed, Segments
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


class AIMv2Config(Config):
    """Sizes of an AIMv2 tower; the defaults are those of AIMv2-Large for 448 x 448 pixels.

    Attributes:
        dim: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads; a head must be a multiple of 4 channels wide.
        mlp_dim: Hidden width of the gated MLP.
        patch_size: Side of a square patch, in pixels.
        in_channels: Colour channels of a patch.
        position_grid: Rows and columns of the learned position table, in patches.
        use_positions: Whether there is a table.
        theta: Base of the rotary wavelengths.
        use_rope: Whether queries and keys are turned by row and column.
        norm_eps: Added to the mean square in every norm.
    """

    dim: Size = 1024
    num_layers: Depth = 24
    num_heads: Size = 8
    mlp_dim: Size = 2816
    patch_size: Depth = 14
    in_channels: Size = 3
    position_grid: tuple[Size, Size] = (32, 32)
    use_positions: bool = True
    theta: Positive = 10000.0
    use_rope: bool = True
    norm_eps: Positive = 1e-5

    def check(self) -> None:
        check_heads(self)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch."""
        return self.in_channels * self.patch_size**2

    @property
    def out_dim(self) -> int:
        """Width of the features."""
        return self.dim

    @property
    def pixel_statistics(self) -> PixelStatistics:
        """Mean and spread by which pixels were normalised when the published weights were trained."""
        return CLIP_PIXELS


class AIMv2(nn.Module):
    """The tower.

    Attributes:
        gradient_checkpointing: Recompute each block's activations in the backward instead of keeping them.
        attention_backend: See vlkit.layers.attention.
    """

    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention_backend: Backend = "auto"
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, config.dim)
        self.patch_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.positions = PositionTable(*config.position_grid, config.dim, std=0.02) if config.use_positions else None
        self.blocks = nn.ModuleList(
            TowerBlock(
                RMSNorm(config.dim, eps=config.norm_eps),
                SelfAttention(config.dim, config.num_heads, bias=False),
                RMSNorm(config.dim, eps=config.norm_eps),
                GatedMLP(config.dim, config.mlp_dim),
            )
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, patches: Packed) -> Packed:
        """Features of every patch.

        Args:
            patches: [patches, patch_dim], each flattened as (channel, row, column); the layout has grids. Cast to the
                dtype of the tower.

        Returns:
            [patches, dim] with the same layout.

        Raises:
            LayoutError: No grids, or patches of another size.
        """
        check_patches(self.config, patches)
        layout, dtype = patches.layout, self.patch_embed.proj.weight.dtype
        x = self.patch_norm(self.patch_embed(patches.tokens.to(dtype)))
        if self.positions is not None:
            x = x + self.positions(layout).to(dtype)
        x = self.forward_blocks(x, self.rotary(layout, device=x.device), layout.segments(x.device))
        return Packed(self.norm(x), layout)

    def forward_blocks(
        self, x: Float[Tensor, "tokens dim"], rotary: Rotary | None, segments: Segments
    ) -> Float[Tensor, "tokens dim"]:
        """The block stack; all that depends on the layout comes as tensors, so it compiles once for all image sizes."""
        return run_blocks(
            self.blocks, x, rotary, segments, recompute=self.gradient_checkpointing, backend=self.attention_backend
        )

    def rotary(self, layout: Layout, *, device: torch.device | str | None = None) -> Rotary | None:
        """Cosines and sines of all patches: the first half of a head's pairs turns by row, the second by column."""
        if not self.config.use_rope:
            return None
        return grid_rotary(
            layout,
            self.config.head_dim,
            self.config.theta,
            arrangement="blocked",
            dtype=self.patch_embed.proj.weight.dtype,
            device=device,
        )


KEYS = KeyMap(
    reshape("preprocessor.patchifier.proj.weight", "patch_embed.proj.weight", conv_to_linear, linear_to_conv),
    rename("preprocessor.patchifier.proj.bias", "patch_embed.proj.bias"),
    rename("preprocessor.patchifier.norm.weight", "patch_norm.weight"),
    reshape("preprocessor.pos_embed", "positions.table", list_to_table, table_to_list),
    rename("trunk.blocks.{layer}.norm_1.weight", "blocks.{layer}.norm1.weight"),
    rename("trunk.blocks.{layer}.norm_2.weight", "blocks.{layer}.norm2.weight"),
    split("trunk.blocks.{layer}.attn.qkv.weight", "blocks.{layer}.attn.{part}.weight", part=("q", "k", "v")),
    rename("trunk.blocks.{layer}.attn.proj.weight", "blocks.{layer}.attn.out.weight"),
    rename(
        "trunk.blocks.{layer}.mlp.{name}.weight",
        "blocks.{layer}.mlp.{name}.weight",
        name={"fc1": "gate", "fc3": "up", "fc2": "down"},
    ),
    rename("trunk.post_trunk_norm.weight", "norm.weight"),
)
"""Names of the encoder in AndesVL, there under `vision_encoder.`, and of the first layout of apple/aimv2-*."""

register_component(
    "vision",
    AIMv2Config,
    AIMv2,
    {
        "aimv2": AIMv2Config(),
        "aimv2-large": AIMv2Config(),
        "aimv2-huge": AIMv2Config(dim=1536, num_heads=12, mlp_dim=4096),
        "aimv2-1b": AIMv2Config(dim=2048, num_heads=16, mlp_dim=5632),
        "aimv2-3b": AIMv2Config(dim=3072, num_heads=24, mlp_dim=8192),
        "aimv2-tiny": AIMv2Config(dim=32, num_layers=2, num_heads=4, mlp_dim=44, patch_size=4, position_grid=(6, 6)),
    },
)
