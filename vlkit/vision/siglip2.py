"""SigLIP2 at native resolution: the tower of AndesVL 0.6B.

    patches -> linear + resampled table -> blocks(LayerNorm, attention with 2-D rotary, LayerNorm, MLP) -> LayerNorm

SigLIP2 was published without rotary embedding, for square images of one size and, as NaFlex, for several. Native-resolution
towers keep its table, which is resampled to the grid of every image, and turn queries and keys by row and column. The pooling
head is not part of them. With `use_rope=False`, on the grid of the table, the features are those of the published encoder.

Source: SigLIP 2, arXiv:2502.14786; AndesVL, arXiv:2510.11496, section 2.
Matches: transformers' siglip and siglip2, and timm's SigLIP towers with the same weights, without rotary, to 1e-5 relative in
fp32; golden numbers of the encoder that AndesVL's authors published in their evaluation code, to 1e-4. Published weights were
not run.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.config import Config, Depth, Positive, Size
from vlkit.hub.keymap import KeyMap, rename, reshape
from vlkit.layers.attention import Backend
from vlkit.layers.mlp import MLP
from vlkit.layers.norm import LayerNorm
from vlkit.layers.patch import PatchEmbed, conv_to_linear, linear_to_conv
from vlkit.layers.position import PositionTable, list_to_table, table_to_list
from vlkit.layers.rope import Rotary
from vlkit.layers.self_attention import SelfAttention
from vlkit.packing import Layout, Packed, Segments
from vlkit.registry import register_component
from vlkit.vision.tower import TowerBlock, check_heads, check_patches, grid_rotary, run_blocks


class SigLIP2Config(Config):
    """Sizes of a SigLIP2 tower; the defaults are those of SigLIP2-Base with patches of 16 pixels for 512 x 512.

    Attributes:
        dim: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads; a head must be a multiple of 4 channels wide.
        mlp_dim: Hidden width of the MLP.
        activation: Of the MLP. The published weights were trained with "gelu_tanh"; some ports compute the exact "gelu".
        patch_size: Side of a square patch, in pixels.
        in_channels: Colour channels of a patch.
        position_grid: Rows and columns of the learned position table, in patches.
        use_positions: Whether there is a table.
        theta: Base of the rotary wavelengths.
        use_rope: Whether queries and keys are turned by row and column.
        norm_eps: Added to the variance in every norm.
    """

    dim: Size = 768
    num_layers: Depth = 12
    num_heads: Size = 12
    mlp_dim: Size = 3072
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    patch_size: Depth = 16
    in_channels: Size = 3
    position_grid: tuple[Size, Size] = (32, 32)
    use_positions: bool = True
    theta: Positive = 10000.0
    use_rope: bool = True
    norm_eps: Positive = 1e-6

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


class SigLIP2(nn.Module):
    """The tower.

    Attributes:
        gradient_checkpointing: Recompute each block's activations in the backward instead of keeping them.
        attention_backend: See vlkit.layers.attention.
    """

    def __init__(self, config: SigLIP2Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention_backend: Backend = "auto"
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, config.dim)
        self.positions = PositionTable(*config.position_grid, config.dim, std=0.02) if config.use_positions else None
        self.blocks = nn.ModuleList(
            TowerBlock(
                LayerNorm(config.dim, eps=config.norm_eps),
                SelfAttention(config.dim, config.num_heads),
                LayerNorm(config.dim, eps=config.norm_eps),
                MLP(config.dim, config.mlp_dim, activation=config.activation),
            )
            for _ in range(config.num_layers)
        )
        self.norm = LayerNorm(config.dim, eps=config.norm_eps)

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
        x = self.patch_embed(patches.tokens.to(dtype))
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


def keys(patches: str = "proj", positions: str = "pos_embed", *, convolution: bool = False) -> KeyMap:
    """Names of the tower; those of AndesVL by default, where they stand under `vision_encoder.vision_model.`

    Args:
        patches: What the patch embedding is called under `embeddings.`: other code says "patch_embedding".
        positions: What the table is called there: other code says "position_embedding".
        convolution: Whether the patch embedding is written as a kernel [dim, channels, rows, columns].
    """
    projections = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out"}
    return KeyMap(
        reshape(f"embeddings.{patches}.weight", "patch_embed.proj.weight", conv_to_linear, linear_to_conv)
        if convolution
        else rename(f"embeddings.{patches}.weight", "patch_embed.proj.weight"),
        rename(f"embeddings.{patches}.bias", "patch_embed.proj.bias"),
        reshape(f"embeddings.{positions}.weight", "positions.table", list_to_table, lambda t: table_to_list(t)[0]),
        rename("encoder.layers.{layer}.layer_norm1.{kind}", "blocks.{layer}.norm1.{kind}"),
        rename("encoder.layers.{layer}.layer_norm2.{kind}", "blocks.{layer}.norm2.{kind}"),
        rename("encoder.layers.{layer}.self_attn.{name}.{kind}", "blocks.{layer}.attn.{name}.{kind}", name=projections),
        rename("encoder.layers.{layer}.mlp.{name}.{kind}", "blocks.{layer}.mlp.{name}.{kind}"),
        rename("post_layernorm.{kind}", "norm.{kind}"),
    )


KEYS = keys()

register_component(
    "vision",
    SigLIP2Config,
    SigLIP2,
    {
        "siglip2": SigLIP2Config(),
        "siglip2-base": SigLIP2Config(),
        "siglip2-large": SigLIP2Config(dim=1024, num_layers=24, num_heads=16, mlp_dim=4096),
        "siglip2-so400m": SigLIP2Config(dim=1152, num_layers=27, num_heads=16, mlp_dim=4304),
        "siglip2-so400m-patch14": SigLIP2Config(
            dim=1152, num_layers=27, num_heads=16, mlp_dim=4304, patch_size=14, position_grid=(27, 27)
        ),
        "siglip2-giant": SigLIP2Config(dim=1536, num_layers=40, num_heads=16, mlp_dim=6144, position_grid=(24, 24)),
        "siglip2-tiny": SigLIP2Config(
            dim=32, num_layers=2, num_heads=4, mlp_dim=48, patch_size=4, position_grid=(6, 6)
        ),
    },
)
