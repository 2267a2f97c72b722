"""Small models of parts from several families, for tests and a first look. They are saved in vlkit's own layout."""

from __future__ import annotations

from vlkit.models.family import ModelSpec
from vlkit.models.vlm import VLMConfig
from vlkit.processing import ByteTokenizer, ImageRule, ProcessorConfig
from vlkit.projectors.pixel_shuffle import PixelShuffleConfig
from vlkit.registry import component, register_model


@register_model("moonvit-qwen3-tiny")
def moonvit_qwen3_tiny() -> ModelSpec:
    """MoonViT before a dense Qwen3 decoder."""
    tower = component("vision", "moonvit-tiny").configs["moonvit-tiny"]
    decoder = component("llm", "qwen3-tiny").configs["qwen3-tiny"]
    special = ByteTokenizer().special
    return ModelSpec(
        config=VLMConfig(
            vision=tower,
            projector=PixelShuffleConfig(in_dim=tower.out_dim, out_dim=decoder.dim),  # type: ignore[attr-defined]
            llm=decoder,
            image_token_id=special["<|media_pad|>"],
            stop_ids=(special["<|im_end|>"],),
        ),
        processor=ProcessorConfig(image=ImageRule(patch_size=tower.patch_size, max_patches=256)),  # type: ignore[attr-defined]
        num_parameters=69_928,
        num_active_parameters=69_928,
    )
