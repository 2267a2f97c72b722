"""Write a new vision tower in one file, register it, and put it through the contract that every registered part keeps.

    python examples/new_tower.py [--small]

The tower mixes the patches of an image with a learned average instead of attention: cheap, and any grid is welcome.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vlkit
from vlkit.config import Config, Size
from vlkit.layers.mlp import MLP
from vlkit.layers.patch import PatchEmbed
from vlkit.packing import Packed, Segments
from vlkit.registry import register_component
from vlkit.testing import contract


class MeanMixerConfig(Config):
    """Sizes of a MeanMixer.

    Attributes:
        dim: Width of the residual stream.
        num_layers: Blocks.
        mlp_dim: Hidden width of the MLP.
        patch_size: Side of a patch, in pixels.
        in_channels: Channels of an image.
    """

    dim: Size = 192
    num_layers: Size = 6
    mlp_dim: Size = 384
    patch_size: Size = 14
    in_channels: Size = 3

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.patch_size**2

    @property
    def out_dim(self) -> int:
        return self.dim


class MixerBlock(nn.Module):
    """x + w * (mean of the image), then x + mlp(norm(x))."""

    def __init__(self, config: MeanMixerConfig) -> None:
        super().__init__()
        self.mix = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.mlp = MLP(config.dim, config.mlp_dim)

    def forward(self, x: Tensor, item: Tensor, segments: Segments) -> Tensor:
        counts = segments.device_offsets.diff().unsqueeze(1)
        sums = x.new_zeros(counts.shape[0], x.shape[1]).index_add(0, item, x)
        x = x + self.mix(sums / counts)[item]
        return x + self.mlp(self.norm(x))


class MeanMixer(nn.Module):
    """The tower: patches [patches, patch_dim] to features [patches, dim]."""

    def __init__(self, config: MeanMixerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, config.dim)
        self.blocks = nn.ModuleList(MixerBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, patches: Packed) -> Packed:
        x, layout = self.patch_embed(patches.tokens), patches.layout
        x = self.forward_blocks(x, layout.item_ids(x.device).long(), layout.segments(x.device))
        return Packed(self.norm(x), layout)

    def forward_blocks(self, x: Tensor, item: Tensor, segments: Segments) -> Tensor:
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, item, segments, use_reentrant=False)
            else:
                x = block(x, item, segments)
        return x


register_component(
    "vision",
    MeanMixerConfig,
    MeanMixer,
    {
        "mean-mixer": MeanMixerConfig(),
        "mean-mixer-tiny": MeanMixerConfig(dim=16, num_layers=2, mlp_dim=24, patch_size=4),
    },
)


def main(small: bool) -> None:
    size = "mean-mixer-tiny" if small else "mean-mixer"
    model = vlkit.compose(vision=size, projector="pixel-shuffle", llm="qwen3-tiny", dtype=torch.float64)
    print(f"{size} with pixel shuffle and qwen3-tiny: {model.num_parameters():,} parameters")
    for check in (
        contract.packed_equals_alone,
        contract.items_are_isolated,
        contract.cache_equals_full,
        contract.checkpointing_changes_no_bit,
        contract.gradients_reach_everything,
        contract.bad_input_is_named,
    ):
        check(model)
        print("holds:", check.__name__.replace("_", " "))


if __name__ == "__main__":
    main(small="--small" in sys.argv[1:])
