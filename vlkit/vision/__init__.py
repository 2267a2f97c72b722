"""Vision towers: `Tower(config)(patches: Packed) -> Packed`, one file each."""

from vlkit.vision.aimv2 import AIMv2, AIMv2Config
from vlkit.vision.moonvit import MoonViT, MoonViTConfig
from vlkit.vision.siglip2 import SigLIP2, SigLIP2Config

__all__ = ["AIMv2", "AIMv2Config", "MoonViT", "MoonViTConfig", "SigLIP2", "SigLIP2Config"]
