"""Qwen's three towers with their projectors, in the names that their checkpoints share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vlkit.hub.keymap import KeyMap
from vlkit.packing import Layout, Packed
from vlkit.projectors import patch_merger
from vlkit.projectors.patch_merger import PatchMerger, PatchMergerConfig
from vlkit.vision import qwen2_5_vit, qwen2_vit, qwen3_vit
from vlkit.vision.qwen2_5_vit import Qwen25ViT, Qwen25ViTConfig
from vlkit.vision.qwen2_vit import Qwen2ViT, Qwen2ViTConfig
from vlkit.vision.qwen3_vit import Qwen3ViT, Qwen3ViTConfig

TowerConfig = Qwen2ViTConfig | Qwen25ViTConfig | Qwen3ViTConfig


@dataclass(frozen=True)
class Visual:
    """What is called `visual` in a checkpoint: a tower, its merger, and their published names."""

    parts: nn.ModuleDict
    keys: KeyMap

    @property
    def tower(self) -> Any:
        return self.parts["vision"]

    @property
    def merger(self) -> Any:
        return self.parts["projector"]

    def load(self, published: dict[str, Tensor]) -> None:
        self.parts.load_state_dict(self.keys.to_ours(published))

    def published(self) -> dict[str, Tensor]:
        return self.keys.to_theirs(self.parts.state_dict())


def visual(config: TowerConfig, *, out_dim: int) -> Visual:
    """A tower and the merger that belongs to it."""
    tower: nn.Module
    norm = "layer"
    if isinstance(config, Qwen2ViTConfig):
        tower, keys, merger_keys = Qwen2ViT(config), qwen2_vit.keys(config), patch_merger.KEYS
    elif isinstance(config, Qwen25ViTConfig):
        tower, keys, merger_keys, norm = Qwen25ViT(config), qwen2_5_vit.keys(config), patch_merger.KEYS, "rms"
    else:
        tower, keys, merger_keys = Qwen3ViT(config), qwen3_vit.keys(config), patch_merger.QWEN3_KEYS
    merger = PatchMerger(
        PatchMergerConfig(
            in_dim=config.out_dim,
            out_dim=out_dim,
            norm=norm,
            num_levels=getattr(config, "num_levels", 1),  # type: ignore[arg-type]
        )
    )
    parts = nn.ModuleDict({"vision": tower, "projector": merger})
    return Visual(parts, keys.mounted(ours="vision.") + merger_keys.mounted(ours="projector."))


def from_blocks(patches: Tensor, layout: Layout, m: int = 2) -> Packed:
    """Patches in the order of Qwen's processors, merge block after merge block, in raster order."""
    parts = [
        rearrange(item, "(t h w a b) d -> (t h a w b) d", t=t, h=h // m, w=w // m, a=m, b=m)
        for item, (t, h, w) in zip(patches.split(layout.lengths), layout.grids or (), strict=True)
    ]
    return Packed(torch.cat(parts), layout)


def to_blocks(patches: Packed, m: int = 2) -> Tensor:
    """The inverse of `from_blocks`."""
    parts = [
        rearrange(item, "(t h a w b) d -> (t h w a b) d", t=t, h=h // m, w=w // m, a=m, b=m)
        for item, (t, h, w) in zip(patches.unpack(), patches.layout.grids or (), strict=True)
    ]
    return torch.cat(parts)
