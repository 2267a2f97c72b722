"""Qwen2-VL: a tower of native resolution, 2x2 merging, and Qwen2 with positions in time, row and column. Images and videos.

UI-TARS 1.0 and Aguvis are fine-tunes in the same layout.

Sources: Qwen2-VL, arXiv:2409.12191; the published config.json of each checkpoint.
Matches: transformers' Qwen2VLForConditionalGeneration in both directions; see docs/families/qwen2-vl.md. Published weights
were not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from vlkit.errors import ConfigError
from vlkit.hub.keymap import KeyMap
from vlkit.llm import qwen2
from vlkit.llm.qwen2 import Qwen2Config
from vlkit.models import qwen_common as common
from vlkit.models.family import Family, ModelSpec
from vlkit.models.vlm import VLMConfig
from vlkit.projectors import patch_merger
from vlkit.projectors.patch_merger import PatchMergerConfig
from vlkit.registry import component, register_family, register_model
from vlkit.vision import qwen2_vit
from vlkit.vision.qwen2_vit import Qwen2ViTConfig

UNWRITTEN = {
    "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


def read_config(hub: Mapping[str, Any]) -> VLMConfig:
    """Qwen2-VL's config.json as a VLMConfig.

    Raises:
        ConfigError: A field is missing, or holds a value that this family's code would ignore.
    """
    fields = common.read_hub(
        hub, "qwen2_vl", activation="quick_gelu", inner_tie=True, interleaved=False, unwritten=UNWRITTEN
    )
    vision, decoder = fields.vision, read_decoder(fields)
    dim, ratio = vision.take("embed_dim"), vision.take("mlp_ratio")
    if not isinstance(ratio, (int, float)) or not isinstance(dim, int):
        raise ConfigError(f"{vision.where}: embed_dim {dim!r} times mlp_ratio {ratio!r} is no width")
    tower = Qwen2ViTConfig(
        dim=dim,
        num_layers=vision.take("depth"),
        num_heads=vision.take("num_heads"),
        mlp_dim=common.whole(dim * ratio),
        patch_size=vision.take("patch_size"),
        frames_per_patch=vision.take("temporal_patch_size"),
    )
    vision.expect("hidden_size", decoder.dim)  # in this family it is the width after merging
    merge_size, tokens = vision.take("spatial_merge_size"), fields.tokens
    fields.warn_of_rest()
    return common.composed("qwen2-vl", tower, decoder, tokens, merge_size=merge_size)


def read_decoder(fields: common.HubConfig) -> Qwen2Config:
    """The decoder of Qwen2-VL and Qwen2.5-VL."""
    text = fields.text
    return Qwen2Config(
        vocab_size=text.take("vocab_size"),
        dim=text.take("hidden_size"),
        num_layers=text.take("num_hidden_layers"),
        num_heads=text.take("num_attention_heads"),
        num_kv_heads=text.take("num_key_value_heads"),
        mlp_dim=text.take("intermediate_size"),
        theta=fields.theta,
        rope_sections=fields.sections,
        max_positions=text.take("max_position_embeddings"),
        norm_eps=text.take("rms_norm_eps"),
        tied=fields.tied,
    )


def write_config(config: VLMConfig) -> dict[str, Any]:
    """The inverse of `read_config`, in the flat form, which all releases of transformers read.

    Raises:
        ConfigError: A part that Qwen2-VL's layout cannot express.
    """
    common.refuse_other_parts(config, Qwen2ViTConfig, PatchMergerConfig, Qwen2Config)
    vision, projector = cast(Qwen2ViTConfig, config.vision), cast(PatchMergerConfig, config.projector)
    written = {
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        **written_decoder(config),
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": vision.num_layers,
            "embed_dim": vision.dim,
            "hidden_size": projector.out_dim,
            "mlp_ratio": common.whole(vision.mlp_dim / vision.dim),
            "num_heads": vision.num_heads,
            **common.written_patches(config),
        },
    }
    return common.checked(written, config, read_config)


def written_decoder(config: VLMConfig) -> dict[str, Any]:
    """What Qwen2-VL and Qwen2.5-VL write at the top."""
    llm = cast(Qwen2Config, config.llm)
    return {
        **common.written_tokens(config),
        **common.written_text(config),
        "rope_scaling": {"type": "mrope", "mrope_section": list(llm.rope_sections or ())},
        "use_sliding_window": False,
        "tie_word_embeddings": llm.tied,
    }


def keys(config: VLMConfig, *, old: bool = True) -> KeyMap:
    """The names of the published checkpoints, visual.* and model.*, which transformers 5 writes too."""
    tower, decoder = cast(Qwen2ViTConfig, config.vision), cast(Qwen2Config, config.llm)
    return common.family_keys(qwen2_vit.keys(tower), patch_merger.KEYS, qwen2.keys(decoder), old=old)


def other_keys(config: VLMConfig) -> tuple[KeyMap, ...]:
    """The names of the modules of transformers since 4.52, which some fine-tunes were saved with."""
    return (keys(config, old=False),)


register_family(
    "qwen2-vl",
    Family("qwen2-vl", ("qwen2_vl",), read_config, write_config, keys, other_keys=other_keys),
)


def published(size: str, num_parameters: int) -> ModelSpec:
    """A published size; all share the tower."""
    name = f"qwen2-vl-{size.lower()}"
    decoder = component("llm", name).configs[name]
    return common.published_spec(
        common.composed("qwen2-vl", Qwen2ViTConfig(), decoder, common.PUBLISHED_TOKENS),
        f"Qwen/Qwen2-VL-{size}-Instruct",
        common.QWEN2_PROCESSOR,
        num_parameters,
    )


@register_model("qwen2-vl-2b")
def qwen2_vl_2b() -> ModelSpec:
    """Qwen2-VL-2B-Instruct, which UI-TARS-2B was tuned from."""
    return published("2B", 2_208_985_600)


@register_model("qwen2-vl-7b")
def qwen2_vl_7b() -> ModelSpec:
    """Qwen2-VL-7B-Instruct, which UI-TARS-7B and Aguvis-7B were tuned from."""
    return published("7B", 8_291_375_616)


@register_model("qwen2-vl-72b")
def qwen2_vl_72b() -> ModelSpec:
    """Qwen2-VL-72B-Instruct, which UI-TARS-72B and Aguvis-72B were tuned from."""
    return published("72B", 73_405_560_320)


@register_model("qwen2-vl-tiny")
def qwen2_vl_tiny() -> ModelSpec:
    """The same composition and layout at a size that runs in milliseconds, over bytes."""
    tower = component("vision", "qwen2-vit-tiny").configs["qwen2-vit-tiny"]
    decoder = component("llm", "qwen2-tiny").configs["qwen2-tiny"]
    return common.tiny_spec(
        # The layout's mlp_ratio is a whole number in transformers.
        common.composed(
            "qwen2-vl", tower.replace(mlp_dim=64), decoder.replace(rope_sections=(2, 3, 3)), common.byte_tokens()
        ),
        common.QWEN2_PROCESSOR,
        87_104,
    )
