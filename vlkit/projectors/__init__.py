"""Projectors, `Projector(config)(features: Packed) -> Packed`: a tower's patches to a decoder's tokens, one file
each."""

from vlkit.projectors.mlp import MLPProjector, MLPProjectorConfig
from vlkit.projectors.patch_merger import PatchMerger, PatchMergerConfig
from vlkit.projectors.pixel_shuffle import PixelShuffleConfig, PixelShuffleProjector
from vlkit.projectors.resampler import Resampler, ResamplerConfig

__all__ = [
    "MLPProjector",
    "MLPProjectorConfig",
    "PatchMerger",
    "PatchMergerConfig",
    "PixelShuffleConfig",
    "PixelShuffleProjector",
    "Resampler",
    "ResamplerConfig",
]
