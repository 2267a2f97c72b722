"""Vision towers: `Tower(config)(patches: Packed) -> Packed`, one file each."""

from vlkit.vision.moonvit import MoonViT, MoonViTConfig

__all__ = ["MoonViT", "MoonViTConfig"]
