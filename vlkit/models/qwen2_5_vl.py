"""Qwen2.5-VL: a tower with attention in windows, 2x2 merging, and Qwen2.5 with positions in time, row and column; the time of
videos follows the clock.

UI-TARS 1.5 is a fine-tune in the same layout.

Sources: Qwen2.5-VL, arXiv:2502.13923; the published config.json of each checkpoint.
Matches: transformers' Qwen2_5_VLForConditionalGeneration in both directions; see docs/families/qwen2.5-vl.md. Published
weights were not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from vlkit.hub.keymap import KeyMap
from vlkit.llm import qwen2
from vlkit.llm.qwen2 import Qwen2Config
from vlkit.models import qwen_common as common
from vlkit.models.family import Family, ModelSpec
from vlkit.models.qwen2_vl import read_decoder, written_decoder
from vlkit.models.vlm import VLMConfig
from vlkit.projectors import patch_merger
from vlkit.projectors.patch_merger import PatchMergerConfig
from vlkit.registry import component, register_family, register_model
from vlkit.vision import qwen2_5_vit
from vlkit.vision.qwen2_5_vit import Qwen25ViTConfig

TICKS_PER_SECOND = 2.0
UNWRITTEN = {  # the width of the tower is always written: its class would have that of the decoder
    "depth": 32, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584,
    "tokens_per_second": 4,
}  # fmt: skip


def read_config(hub: Mapping[str, Any]) -> VLMConfig:
    """Qwen2.5-VL's config.json as a VLMConfig.

    Raises:
        ConfigError: A field is missing, or holds a value that this family's code would ignore.
    """
    fields = common.read_hub(
        hub, "qwen2_5_vl", activation="silu", inner_tie=True, interleaved=False, unwritten=UNWRITTEN
    )
    vision, decoder = fields.vision, read_decoder(fields)
    full_layers = vision.take("fullatt_block_indexes")
    tower = Qwen25ViTConfig(
        dim=vision.take("hidden_size"),
        num_layers=vision.take("depth"),
        num_heads=vision.take("num_heads"),
        mlp_dim=vision.take("intermediate_size"),
        patch_size=vision.take("patch_size"),
        frames_per_patch=vision.take("temporal_patch_size"),
        window_size=vision.take("window_size"),
        full_layers=full_layers,
        merge_size=vision.take("spatial_merge_size"),
    )
    vision.expect("out_hidden_size", decoder.dim)
    ticks, tokens = vision.take("tokens_per_second"), fields.tokens
    fields.warn_of_rest()
    return common.composed(
        "qwen2.5-vl", tower, decoder, tokens, norm="rms", merge_size=tower.merge_size, ticks_per_second=ticks
    )


def write_config(config: VLMConfig) -> dict[str, Any]:
    """The inverse of `read_config`, in the flat form, which all releases of transformers read.

    Raises:
        ConfigError: A part that Qwen2.5-VL's layout cannot express.
    """
    common.refuse_other_parts(config, Qwen25ViTConfig, PatchMergerConfig, Qwen2Config)
    vision, projector = cast(Qwen25ViTConfig, config.vision), cast(PatchMergerConfig, config.projector)
    written = {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        **written_decoder(config),
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": vision.num_layers,
            "hidden_size": vision.dim,
            "hidden_act": "silu",
            "intermediate_size": vision.mlp_dim,
            "num_heads": vision.num_heads,
            "out_hidden_size": projector.out_dim,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.full_layers),
            "tokens_per_second": common.whole(config.ticks_per_second),
            **common.written_patches(config),
        },
    }
    return common.checked(written, config, read_config)


def keys(config: VLMConfig, *, old: bool = True) -> KeyMap:
    """The names of the published checkpoints, visual.* and model.*, which transformers 5 writes too."""
    tower, decoder = cast(Qwen25ViTConfig, config.vision), cast(Qwen2Config, config.llm)
    return common.family_keys(qwen2_5_vit.keys(tower), patch_merger.KEYS, qwen2.keys(decoder), old=old)


def other_keys(config: VLMConfig) -> tuple[KeyMap, ...]:
    """The names of the modules of transformers since 4.52, which some fine-tunes were saved with."""
    return (keys(config, old=False),)


register_family(
    "qwen2.5-vl",
    Family("qwen2.5-vl", ("qwen2_5_vl",), read_config, write_config, keys, other_keys=other_keys),
)


def composed(tower: Any, decoder: Any, tokens: Mapping[str, Any]) -> VLMConfig:
    """The family's composition."""
    return common.composed("qwen2.5-vl", tower, decoder, tokens, norm="rms", ticks_per_second=TICKS_PER_SECOND)


def published(size: str, tower: str, num_parameters: int) -> ModelSpec:
    """A published size."""
    name = f"qwen2.5-vl-{size.lower()}"
    config = composed(
        component("vision", tower).configs[tower], component("llm", name).configs[name], common.PUBLISHED_TOKENS
    )
    return common.published_spec(config, f"Qwen/Qwen2.5-VL-{size}-Instruct", common.QWEN2_PROCESSOR, num_parameters)


@register_model("qwen2.5-vl-3b")
def qwen2_5_vl_3b() -> ModelSpec:
    """Qwen2.5-VL-3B-Instruct."""
    return published("3B", "qwen2.5-vit", 3_754_622_976)


@register_model("qwen2.5-vl-7b")
def qwen2_5_vl_7b() -> ModelSpec:
    """Qwen2.5-VL-7B-Instruct, which UI-TARS-1.5-7B was tuned from."""
    return published("7B", "qwen2.5-vit", 8_292_166_656)


@register_model("qwen2.5-vl-32b")
def qwen2_5_vl_32b() -> ModelSpec:
    """Qwen2.5-VL-32B-Instruct."""
    return published("32B", "qwen2.5-vit-72b", 33_452_718_336)


@register_model("qwen2.5-vl-72b")
def qwen2_5_vl_72b() -> ModelSpec:
    """Qwen2.5-VL-72B-Instruct."""
    return published("72B", "qwen2.5-vit-72b", 73_410_777_344)


@register_model("qwen2.5-vl-tiny")
def qwen2_5_vl_tiny() -> ModelSpec:
    """The same composition and layout at a size that runs in milliseconds, over bytes."""
    decoder = component("llm", "qwen2-tiny").configs["qwen2-tiny"]
    config = composed(
        component("vision", "qwen2.5-vit-tiny").configs["qwen2.5-vit-tiny"],
        decoder.replace(rope_sections=(2, 3, 3)),
        common.byte_tokens(),
    )
    return common.tiny_spec(config, common.QWEN2_PROCESSOR, 88_032)
