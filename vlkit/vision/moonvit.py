"""MoonViT: a native-resolution vision transformer, the tower of Kimi-VL.

    patches -> linear + interpolated table -> blocks(norm, attention with 2-D rotary, norm, MLP) -> norm -> features

Every image keeps its own grid; images are packed end to end and attend to themselves alone.

Source: Kimi-VL, arXiv:2504.07491, section 2.1; constants from the published code of moonshotai/Kimi-VL-A3B-Instruct.
Matches: the tower of transformers' kimi_k25 with the same weights, to 1e-5 relative in fp32.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.config import Config, Depth, Positive, Size
from vlkit.hub.keymap import KeyMap, rename, reshape, split
from vlkit.layers.attention import Backend
from vlkit.layers.mlp import MLP
from vlkit.layers.norm import LayerNorm
from vlkit.layers.patch import PatchEmbed, conv_to_linear, linear_to_conv
from vlkit.layers.position import PositionTable
from vlkit.layers.rope import Rotary
from vlkit.layers.self_attention import SelfAttention
from vlkit.packing import Layout, Packed, Segments
from vlkit.registry import register_component
from vlkit.vision.tower import TowerBlock, check_heads, check_patches, grid_rotary, run_blocks


class MoonViTConfig(Config):
    """Sizes of a MoonViT tower; the defaults are those of MoonViT-SO-400M.

    Attributes:
        dim: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads; a head must be a multiple of 4 channels wide.
        mlp_dim: Hidden width of the MLP.
        patch_size: Side of a square patch, in pixels.
        in_channels: Colour channels of a patch.
        position_grid: Rows and columns of the learned position table, in patches.
        theta: Base of the rotary wavelengths.
        use_rope: Whether queries and keys are turned by row and column.
        max_grid_side: Longest side of an image, in patches.
        norm_eps: Added to the variance in every norm.
    """

    dim: Size = 1152
    num_layers: Depth = 27
    num_heads: Size = 16
    mlp_dim: Size = 4304
    patch_size: Depth = 14
    in_channels: Size = 3
    position_grid: tuple[Size, Size] = (64, 64)
    theta: Positive = 10000.0
    use_rope: bool = True
    max_grid_side: Size = 512
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


class MoonViT(nn.Module):
    """The tower.

    Attributes:
        gradient_checkpointing: Recompute each block's activations in the backward instead of keeping them.
        attention_backend: See vlkit.layers.attention.
    """

    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention_backend: Backend = "auto"
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, config.dim)
        self.positions = PositionTable(*config.position_grid, config.dim)
        self.blocks = nn.ModuleList(
            TowerBlock(
                LayerNorm(config.dim, eps=config.norm_eps),
                SelfAttention(config.dim, config.num_heads, pairing="interleaved"),
                LayerNorm(config.dim, eps=config.norm_eps),
                MLP(config.dim, config.mlp_dim, activation="gelu_tanh"),
            )
            for _ in range(config.num_layers)
        )
        self.norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """MLPs start as the published code starts them: truncated normal of variance 2 / fan-in, no bias."""
        for module in self.modules():
            for linear in (module.fc1, module.fc2) if isinstance(module, MLP) else ():
                nn.init.trunc_normal_(linear.weight, std=math.sqrt(2 / linear.in_features))
                nn.init.zeros_(linear.bias)

    def forward(self, patches: Packed) -> Packed:
        """Features of every patch.

        Args:
            patches: [patches, patch_dim], each flattened as (channel, row, column); the layout has grids. Cast to the
                dtype of the tower.

        Returns:
            [patches, dim] with the same layout.

        Raises:
            LayoutError: No grids, a side of more than max_grid_side patches, or patches of another size.
        """
        check_patches(self.config, patches, max_grid_side=self.config.max_grid_side)
        tokens, layout = patches.tokens, patches.layout
        dtype = self.patch_embed.proj.weight.dtype
        x = self.patch_embed(tokens.to(dtype)) + self.positions(layout).to(dtype)
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
        """Cosines and sines of all patches; pairs 2i and 2i + 1 turn by column and row times theta^(-4i / head_dim)."""
        if not self.config.use_rope:
            return None
        return grid_rotary(
            layout,
            self.config.head_dim,
            self.config.theta,
            arrangement="alternating",
            dtype=self.patch_embed.proj.weight.dtype,
            device=device,
        )


KEYS = KeyMap(
    reshape("patch_embed.proj.weight", "patch_embed.proj.weight", conv_to_linear, linear_to_conv),
    rename("patch_embed.proj.bias", "patch_embed.proj.bias"),
    rename("patch_embed.pos_emb.weight", "positions.table"),
    rename("encoder.blocks.{layer}.norm0.{kind}", "blocks.{layer}.norm1.{kind}"),
    rename("encoder.blocks.{layer}.norm1.{kind}", "blocks.{layer}.norm2.{kind}"),
    split("encoder.blocks.{layer}.wqkv.{kind}", "blocks.{layer}.attn.{part}.{kind}", part=("q", "k", "v")),
    rename("encoder.blocks.{layer}.wo.{kind}", "blocks.{layer}.attn.out.{kind}"),
    rename("encoder.blocks.{layer}.mlp.fc0.{kind}", "blocks.{layer}.mlp.fc1.{kind}"),
    rename("encoder.blocks.{layer}.mlp.fc1.{kind}", "blocks.{layer}.mlp.fc2.{kind}"),
    rename("encoder.final_layernorm.{kind}", "norm.{kind}"),
)
"""Names of moonshotai/MoonViT-SO-400M; in Kimi-VL the same under `vision_tower.`."""

register_component(
    "vision",
    MoonViTConfig,
    MoonViT,
    {
        "moonvit": MoonViTConfig(),
        "moonvit-tiny": MoonViTConfig(
            dim=32, num_layers=2, num_heads=4, mlp_dim=48, patch_size=4, position_grid=(6, 6)
        ),
    },
)
