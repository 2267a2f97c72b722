"""Projectors, `Projector(config)(features: Packed) -> Packed`: a tower's patches to a decoder's tokens, one file
each."""

from vlkit.projectors.pixel_shuffle import PixelShuffleConfig, PixelShuffleProjector

__all__ = ["PixelShuffleConfig", "PixelShuffleProjector"]
