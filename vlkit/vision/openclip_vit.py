"""OpenCLIP's vision transformer as Qwen-VL has it: ViT-bigG without a class token and without a last norm.

    patches -> linear + interpolated table -> norm -> blocks(norm, attention, norm, MLP) -> features

Qwen-VL shows it images of 448x448 pixels only; every grid works, packed end to end, and images attend to themselves
alone. The norm behind the last block belongs to the resampler that Qwen-VL puts there (vlkit/projectors/resampler.py).

Source: Qwen-VL, arXiv:2308.12966, section 2.1; constants from the published code of Qwen/Qwen-VL-Chat.
Matches: the published code's visual tower with the same weights, to 1e-4 at outputs of up to 20, and an independent
version of its equations to 1e-6 relative; fp32.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from vlkit.config import Config, Depth, Positive, Size
from vlkit.errors import ConfigError
from vlkit.hub.keymap import KeyMap, rename, reshape, split
from vlkit.layers.attention import Backend
from vlkit.layers.mlp import MLP
from vlkit.layers.norm import LayerNorm
from vlkit.layers.patch import PatchEmbed, conv_to_linear, linear_to_conv
from vlkit.layers.position import PositionTable, list_to_table, table_to_cells
from vlkit.layers.self_attention import SelfAttention
from vlkit.packing import Packed, Segments
from vlkit.registry import register_component
from vlkit.vision.tower import CLIP_PIXELS, PixelStatistics, TowerBlock, check_patches, run_blocks


class OpenCLIPViTConfig(Config):
    """Sizes of the tower; the defaults are those of Qwen-VL.

    Attributes:
        dim: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads; must divide dim.
        mlp_dim: Hidden width of the MLP.
        patch_size: Side of a square patch, in pixels.
        in_channels: Colour channels of a patch.
        position_grid: Rows and columns of the learned position table, in patches.
        norm_eps: Added to the variance in every norm.
    """

    dim: Size = 1664
    num_layers: Depth = 48
    num_heads: Size = 16
    mlp_dim: Size = 8192
    patch_size: Depth = 14
    in_channels: Size = 3
    position_grid: tuple[Size, Size] = (16, 16)
    norm_eps: Positive = 1e-6

    def check(self) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(f"OpenCLIPViTConfig: dim={self.dim} is not a multiple of num_heads={self.num_heads}")

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


class OpenCLIPViT(nn.Module):
    """The tower.

    Attributes:
        gradient_checkpointing: Recompute each block's activations in the backward instead of keeping them.
        attention_backend: See vlkit.layers.attention.
    """

    def __init__(self, config: OpenCLIPViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention_backend: Backend = "auto"
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, config.dim, bias=False)
        self.positions = PositionTable(*config.position_grid, config.dim)
        self.norm_pre = LayerNorm(config.dim, eps=config.norm_eps)
        self.blocks = nn.ModuleList(
            TowerBlock(
                LayerNorm(config.dim, eps=config.norm_eps),
                SelfAttention(config.dim, config.num_heads),
                LayerNorm(config.dim, eps=config.norm_eps),
                MLP(config.dim, config.mlp_dim, activation="gelu"),
            )
            for _ in range(config.num_layers)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The table starts as OpenCLIP starts it: normal, of variance 1 / dim."""
        nn.init.normal_(self.positions.table, std=self.config.dim**-0.5)

    def forward(self, patches: Packed) -> Packed:
        """Features of every patch.

        Args:
            patches: [patches, patch_dim], each flattened as (channel, row, column); the layout has grids. Cast to the
                dtype of the tower. The time steps of a clip are images of their own.

        Returns:
            [patches, dim] with the same layout, not normalised.

        Raises:
            LayoutError: No grids, or patches of another size.
        """
        check_patches(self.config, patches)
        tokens, layout = patches.tokens, patches.layout
        dtype = self.patch_embed.proj.weight.dtype
        x = self.norm_pre(self.patch_embed(tokens.to(dtype)) + self.positions(layout).to(dtype))
        return Packed(self.forward_blocks(x, layout.frames().segments(x.device)), layout)

    def forward_blocks(self, x: Float[Tensor, "tokens dim"], segments: Segments) -> Float[Tensor, "tokens dim"]:
        """The block stack; all that depends on the layout comes as tensors, so it compiles once for all image sizes."""
        return run_blocks(
            self.blocks, x, None, segments, recompute=self.gradient_checkpointing, backend=self.attention_backend
        )


def keys(config: OpenCLIPViTConfig) -> KeyMap:
    """Names of the published code; in Qwen-VL the same under `transformer.visual.`.

    The rows of in_proj repeat q, k and v for each head, 16 times over; the rows of a plain multi-head attention are three
    blocks, and neither arrangement can be told from the shapes.
    """
    block = "transformer.resblocks.{layer}."
    return KeyMap(
        reshape("conv1.weight", "patch_embed.proj.weight", conv_to_linear, linear_to_conv),
        reshape("positional_embedding", "positions.table", list_to_table, table_to_cells),
        rename("ln_pre.{kind}", "norm_pre.{kind}"),
        rename(block + "ln_1.{kind}", "blocks.{layer}.norm1.{kind}"),
        rename(block + "ln_2.{kind}", "blocks.{layer}.norm2.{kind}"),
        split(
            block + "attn.in_proj.{kind}",
            "blocks.{layer}.attn.{part}.{kind}",
            part=("q", "k", "v"),
            groups=config.num_heads,
        ),
        rename(block + "attn.out_proj.{kind}", "blocks.{layer}.attn.out.{kind}"),
        rename(block + "mlp.c_fc.{kind}", "blocks.{layer}.mlp.fc1.{kind}"),
        rename(block + "mlp.c_proj.{kind}", "blocks.{layer}.mlp.fc2.{kind}"),
    )


register_component(
    "vision",
    OpenCLIPViTConfig,
    OpenCLIPViT,
    {
        "openclip-vit": OpenCLIPViTConfig(),
        "openclip-vit-tiny": OpenCLIPViTConfig(
            dim=36, num_layers=2, num_heads=3, mlp_dim=44, patch_size=4, position_grid=(4, 4)
        ),
    },
)
