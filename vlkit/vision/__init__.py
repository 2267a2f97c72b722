"""Vision towers: `Tower(config)(patches: Packed) -> Packed`, one file each."""

from vlkit.vision.aimv2 import AIMv2, AIMv2Config
from vlkit.vision.moonvit import MoonViT, MoonViTConfig
from vlkit.vision.openclip_vit import OpenCLIPViT, OpenCLIPViTConfig
from vlkit.vision.qwen2_5_vit import Qwen25ViT, Qwen25ViTConfig
from vlkit.vision.qwen2_vit import Qwen2ViT, Qwen2ViTConfig
from vlkit.vision.qwen3_vit import Qwen3ViT, Qwen3ViTConfig
from vlkit.vision.siglip2 import SigLIP2, SigLIP2Config
from vlkit.vision.starting_points import StartingPoint, load_starting_point
from vlkit.vision.timm_vit import TimmViT, TimmViTConfig

__all__ = [
    "AIMv2",
    "AIMv2Config",
    "MoonViT",
    "MoonViTConfig",
    "OpenCLIPViT",
    "OpenCLIPViTConfig",
    "Qwen2ViT",
    "Qwen2ViTConfig",
    "Qwen3ViT",
    "Qwen3ViTConfig",
    "Qwen25ViT",
    "Qwen25ViTConfig",
    "SigLIP2",
    "SigLIP2Config",
    "StartingPoint",
    "TimmViT",
    "TimmViTConfig",
    "load_starting_point",
]
