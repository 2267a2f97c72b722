"""Qwen's patch merger: every m x m block of patches becomes one token of the decoder, for each level of a tower.

    first level        norm of every patch -> blocks [tokens, m * m * dim] -> linear -> GELU -> linear -> [tokens, out_dim]
    further (DeepStack)        blocks [tokens, m * m * dim] -> norm of the block -> linear -> GELU -> linear -> [tokens, out_dim]

Levels come and go side by side.

Sources: Qwen2-VL, arXiv:2409.12191; Qwen2.5-VL, arXiv:2502.13923; Qwen3-VL, arXiv:2511.21631.
Matches: transformers' mergers of the three families with the same weights, to 1e-5 relative in fp32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from vlkit.config import Config, Positive, Size
from vlkit.errors import ConfigError, LayoutError
from vlkit.hub.keymap import KeyMap, rename
from vlkit.layers.merge import merge_blocks, merged_grid
from vlkit.layers.mlp import MLP
from vlkit.layers.norm import LayerNorm, RMSNorm
from vlkit.packing import Packed
from vlkit.registry import register_component


class PatchMergerConfig(Config):
    """Sizes of a patch merger; the defaults are those of Qwen2-VL-7B.

    Attributes:
        in_dim: Width of the tower's features, all levels together.
        out_dim: Width of the decoder.
        merge_size: Side of the block of patches that becomes one token.
        norm: "layer" (Qwen2-VL, Qwen3-VL) or "rms" (Qwen2.5-VL).
        norm_eps: Added to the variance, or the mean square, in every norm.
        num_levels: Depths of the tower whose features come side by side; each has a merger of its own.
    """

    in_dim: Size = 1280
    out_dim: Size = 3584
    merge_size: Size = 2
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: Positive = 1e-6
    num_levels: Size = 1

    def check(self) -> None:
        if self.in_dim % self.num_levels:
            raise ConfigError(
                f"PatchMergerConfig: in_dim={self.in_dim} is not a multiple of num_levels={self.num_levels}; "
                "it is the width of all levels together"
            )

    @property
    def level_dim(self) -> int:
        """Width of one level."""
        return self.in_dim // self.num_levels

    @property
    def merged_dim(self) -> int:
        """Width of a block of one level, and of the hidden layer."""
        return self.level_dim * self.merge_size**2

    def out_grid(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The grid of tokens, (time, rows, columns), that a grid of patches becomes."""
        return merged_grid(grid, self.merge_size)


class LevelMerger(nn.Module):
    """The merger of one level: mlp(blocks(norm(x))), or mlp(norm(blocks(x))) where the norm spans a block."""

    def __init__(self, config: PatchMergerConfig, *, norm_of_block: bool) -> None:
        super().__init__()
        make_norm = LayerNorm if config.norm == "layer" else RMSNorm
        self.merge_size, self.norm_of_block = config.merge_size, norm_of_block
        self.norm = make_norm(config.merged_dim if norm_of_block else config.level_dim, eps=config.norm_eps)
        self.mlp = MLP(config.merged_dim, config.merged_dim, out_dim=config.out_dim, activation="gelu")

    def forward(self, features: Packed) -> Packed:
        """[patches, level_dim] -> [tokens, out_dim]."""
        if not self.norm_of_block:
            features = features.with_tokens(self.norm(features.tokens))
        merged = merge_blocks(features, self.merge_size)
        return merged.with_tokens(self.mlp(self.norm(merged.tokens) if self.norm_of_block else merged.tokens))


class PatchMerger(nn.Module):
    """One merger for the last features of a tower, and one for every level beyond."""

    def __init__(self, config: PatchMergerConfig) -> None:
        super().__init__()
        self.config = config
        self.main = LevelMerger(config, norm_of_block=False)
        self.deep = nn.ModuleList(LevelMerger(config, norm_of_block=True) for _ in range(config.num_levels - 1))

    def forward(self, features: Packed) -> Packed:
        """[patches, num_levels * level_dim] -> [tokens, num_levels * out_dim], with the layout merged.

        Raises:
            LayoutError: No grids, an image whose grid does not divide into blocks, or features of another width.
        """
        if features.tokens.shape[1:] != (self.config.in_dim,):
            raise LayoutError(
                f"features have shape {tuple(features.tokens.shape)}; expected {self.config.in_dim} channels each"
            )
        levels = features.tokens.split(self.config.level_dim, dim=-1)
        tokens = [
            merger(features.with_tokens(level)).tokens
            for merger, level in zip((self.main, *self.deep), levels, strict=True)
        ]
        layout = features.layout.merged(self.config.merge_size)
        return Packed(tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=-1), layout)


KEYS = KeyMap(
    rename("merger.ln_q.{kind}", "main.norm.{kind}"),
    rename("merger.mlp.{linear}.{kind}", "main.mlp.{linear}.{kind}", linear={"0": "fc1", "2": "fc2"}),
)
"""Names of Qwen2-VL and Qwen2.5-VL, there under `visual.`."""

_LINEAR = {"linear_fc1": "fc1", "linear_fc2": "fc2"}
QWEN3_KEYS = KeyMap(
    rename("merger.norm.{kind}", "main.norm.{kind}"),
    rename("merger.{linear}.{kind}", "main.mlp.{linear}.{kind}", linear=_LINEAR),
    rename("deepstack_merger_list.{layer}.norm.{kind}", "deep.{layer}.norm.{kind}"),
    rename("deepstack_merger_list.{layer}.{linear}.{kind}", "deep.{layer}.mlp.{linear}.{kind}", linear=_LINEAR),
)
"""Names of Qwen3-VL, there under `model.visual.`."""

register_component(
    "projector",
    PatchMergerConfig,
    PatchMerger,
    {"patch-merger": PatchMergerConfig(), "patch-merger-tiny": PatchMergerConfig(in_dim=32, out_dim=32)},
)
