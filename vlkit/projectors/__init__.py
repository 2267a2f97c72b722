"""Projectors, `Projector(config)(features: Packed) -> Packed`: a tower's patches to a decoder's tokens, one file
each."""

from vlkit.projectors.patch_merger import PatchMerger, PatchMergerConfig
from vlkit.projectors.pixel_shuffle import PixelShuffleConfig, PixelShuffleProjector

__all__ = [
    "PatchMerger",
    "PatchMergerConfig",
    "PixelShuffleConfig",
    "PixelShuffleProjector",
]
