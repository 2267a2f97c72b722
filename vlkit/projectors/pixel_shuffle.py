"""Pixel shuffle and a two-layer MLP: every m x m block of patches becomes one token of the decoder.

    [patches, in_dim] -> norm -> blocks [tokens, m * m * in_dim] -> linear -> GELU -> linear -> [tokens, out_dim]

Source: Kimi-VL, arXiv:2504.07491, section 2.1; with norm="none" the connector of AndesVL, arXiv:2510.11496.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import nn

from vlkit.config import Config, Positive, Size
from vlkit.errors import LayoutError
from vlkit.hub.keymap import KeyMap, rename
from vlkit.layers.merge import merge_blocks, merged_grid
from vlkit.layers.norm import LayerNorm
from vlkit.packing import Packed
from vlkit.registry import register_component


class PixelShuffleConfig(Config):
    """Sizes of a pixel-shuffle projector; the defaults are Kimi-VL's.

    Attributes:
        in_dim: Width of the tower's features.
        out_dim: Width of the decoder.
        merge_size: Side of the block of patches that becomes one token.
        hidden_dim: Width between the two linear layers; None means in_dim * merge_size ** 2.
        norm: "pre" normalises each patch before merging; "none" does not.
        norm_eps: Added to the variance in the norm.
    """

    in_dim: Size = 1152
    out_dim: Size = 2048
    merge_size: Size = 2
    hidden_dim: Size | None = None
    norm: Literal["pre", "none"] = "pre"
    norm_eps: Positive = 1e-5

    @property
    def merged_dim(self) -> int:
        return self.in_dim * self.merge_size**2

    def out_grid(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The grid of tokens, (time, rows, columns), that a grid of patches becomes."""
        return merged_grid(grid, self.merge_size)


class PixelShuffleProjector(nn.Module):
    """linear_2(GELU(linear_1(blocks of norm(features)))), with the exact GELU."""

    def __init__(self, config: PixelShuffleConfig) -> None:
        super().__init__()
        self.config = config
        hidden_dim = config.merged_dim if config.hidden_dim is None else config.hidden_dim
        self.norm = LayerNorm(config.in_dim, eps=config.norm_eps) if config.norm == "pre" else None
        self.fc1 = nn.Linear(config.merged_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, config.out_dim)

    def forward(self, features: Packed) -> Packed:
        """[patches, in_dim] -> [tokens, out_dim], with the layout merged.

        Raises:
            LayoutError: No grids, an image whose grid does not divide into blocks, or features of another width.
        """
        if features.tokens.shape[1:] != (self.config.in_dim,):
            raise LayoutError(
                f"features have shape {tuple(features.tokens.shape)}; expected {self.config.in_dim} channels each"
            )
        normed = features if self.norm is None else features.with_tokens(self.norm(features.tokens))
        merged = merge_blocks(normed, self.config.merge_size)
        return merged.with_tokens(self.fc2(F.gelu(self.fc1(merged.tokens))))


KEYS = KeyMap(
    rename("pre_norm.{kind}", "norm.{kind}"),
    rename("linear_1.{kind}", "fc1.{kind}"),
    rename("linear_2.{kind}", "fc2.{kind}"),
)
"""Kimi-VL's names, there under `multi_modal_projector.`."""

register_component(
    "projector",
    PixelShuffleConfig,
    PixelShuffleProjector,
    {"pixel-shuffle": PixelShuffleConfig(), "pixel-shuffle-tiny": PixelShuffleConfig(in_dim=32, out_dim=32)},
)
