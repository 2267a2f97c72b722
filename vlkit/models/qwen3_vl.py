"""Qwen3-VL, dense and with experts: a tower that gives features of several depths to as many layers of the decoder (DeepStack),
2x2 merging, and Qwen3 with interleaved positions in time, row and column. A video is its frames, each behind its time as text.

Sources: Qwen3-VL, arXiv:2511.21631; the published config.json of each checkpoint.
Matches: transformers' Qwen3VLForConditionalGeneration and Qwen3VLMoeForConditionalGeneration in both directions; see
docs/families/qwen3-vl.md. Published weights were not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import isqrt
from typing import Any, cast

from vlkit.errors import ConfigError
from vlkit.hub.keymap import KeyMap, rename, reshape, split
from vlkit.llm.grouped_query import LAYER, llama_keys
from vlkit.llm.qwen3 import Qwen3Config
from vlkit.models import qwen_common as common
from vlkit.models.family import Family, ModelSpec
from vlkit.models.vlm import VLMConfig
from vlkit.projectors import patch_merger
from vlkit.projectors.patch_merger import PatchMergerConfig
from vlkit.registry import component, register_family, register_model
from vlkit.vision import qwen3_vit
from vlkit.vision.qwen3_vit import Qwen3ViTConfig

DENSE, SPARSE = "qwen3-vl", "qwen3-vl-moe"
MODEL_TYPES = {DENSE: "qwen3_vl", SPARSE: "qwen3_vl_moe"}
CLASSES = {DENSE: "Qwen3VLForConditionalGeneration", SPARSE: "Qwen3VLMoeForConditionalGeneration"}


_composed = partial(common.composed, frames_apart=True)  # text stands between the time steps of a video


def read_config(hub: Mapping[str, Any], family: str = DENSE) -> VLMConfig:
    """The config.json of Qwen3-VL, dense or with experts, as a VLMConfig.

    Raises:
        ConfigError: A field is missing, or holds a value that this family's code would ignore.
    """
    fields = common.read_hub(
        hub, MODEL_TYPES[family], activation="gelu_pytorch_tanh", inner_tie=False, interleaved=True
    )
    vision, text = fields.vision, fields.text
    cells = vision.take("num_position_embeddings")
    if not isinstance(cells, int) or cells < 1 or isqrt(cells) ** 2 != cells:
        raise ConfigError(f"{vision.where}.num_position_embeddings: {cells!r} cells make no square table")
    tower = Qwen3ViTConfig(
        dim=vision.take("hidden_size"),
        num_layers=vision.take("depth"),
        num_heads=vision.take("num_heads"),
        mlp_dim=vision.take("intermediate_size"),
        patch_size=vision.take("patch_size"),
        frames_per_patch=vision.take("temporal_patch_size"),
        position_grid=(isqrt(cells), isqrt(cells)),
        taps=vision.take("deepstack_visual_indexes"),
    )
    decoder = Qwen3Config(
        vocab_size=text.take("vocab_size"),
        dim=text.take("hidden_size"),
        num_layers=text.take("num_hidden_layers"),
        num_heads=text.take("num_attention_heads"),
        num_kv_heads=text.take("num_key_value_heads"),
        head_dim=text.take("head_dim"),
        mlp_dim=text.take("intermediate_size"),
        theta=fields.theta,
        rope_sections=fields.sections,
        rope_interleaved=True,
        max_positions=text.take("max_position_embeddings"),
        norm_eps=text.take("rms_norm_eps"),
        tied=fields.tied,
    )
    if family == SPARSE:
        text.expect("decoder_sparse_step", 1)
        text.expect("mlp_only_layers", [], None)
        text.expect("norm_topk_prob", True)
        # transformers 5 names them num_local_experts when it writes.
        experts = text.take("num_local_experts") if "num_local_experts" in text.values else text.take("num_experts")
        text.take("num_experts", None)
        decoder = decoder.replace(
            num_experts=experts, top_k=text.take("num_experts_per_tok"), expert_dim=text.take("moe_intermediate_size")
        )
        if not decoder.num_experts:
            raise ConfigError(f"{text.where}: {experts!r} experts; a decoder without any is a {MODEL_TYPES[DENSE]}")
    vision.expect("out_hidden_size", decoder.dim)
    merge_size, tokens = vision.take("spatial_merge_size"), fields.tokens
    fields.warn_of_rest()
    return _composed(family, tower, decoder, tokens, merge_size=merge_size)


def write_config(config: VLMConfig) -> dict[str, Any]:
    """The inverse of `read_config`, in the form of the published files, which all releases of transformers that know the
    family read.

    Raises:
        ConfigError: A part that Qwen3-VL's layout cannot express.
    """
    common.refuse_other_parts(config, Qwen3ViTConfig, PatchMergerConfig, Qwen3Config)
    family = cast(str, config.family)
    vision, llm = cast(Qwen3ViTConfig, config.vision), cast(Qwen3Config, config.llm)
    if (family == SPARSE) != bool(llm.num_experts):
        raise ConfigError(
            f"the layout of {family} holds a decoder {'with' if family == SPARSE else 'without'} experts, found "
            f"{llm.num_experts} of them; set family={(DENSE if family == SPARSE else SPARSE)!r}"
        )
    rows, columns = vision.position_grid
    text: dict[str, Any] = {
        "model_type": f"{MODEL_TYPES[family]}_text",
        **common.written_text(config),
        "head_dim": llm.head_dim,
        "attention_bias": False,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": list(llm.rope_sections or ()),
            "mrope_interleaved": llm.rope_interleaved,
        },
    }
    if family == SPARSE:
        text |= {
            "num_experts": llm.num_experts,
            "num_experts_per_tok": llm.top_k,
            "moe_intermediate_size": llm.expert_dim,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
    written = {
        "model_type": MODEL_TYPES[family],
        "architectures": [CLASSES[family]],
        **common.written_tokens(config),
        "tie_word_embeddings": llm.tied,
        "text_config": text,
        "vision_config": {
            "model_type": MODEL_TYPES[family],
            "depth": vision.num_layers,
            "hidden_size": vision.dim,
            "hidden_act": "gelu_pytorch_tanh",
            "intermediate_size": vision.mlp_dim,
            "num_heads": vision.num_heads,
            "num_position_embeddings": rows * columns,
            "deepstack_visual_indexes": list(vision.taps),
            "out_hidden_size": llm.dim,
            **common.written_patches(config),
        },
    }
    return common.checked(written, config, partial(read_config, family=family))


def keys(config: VLMConfig, *, turned: bool | None = None) -> KeyMap:
    """The names of the published checkpoints, model.visual.* and model.language_model.*.

    Args:
        config: The model.
        turned: Experts as [experts, in, out] instead of [experts, out, in]. None is what is written: turned, as the published
            files are, except at sizes of which transformers, which looks at each tensor alone, could not tell.
    """
    tower, decoder = cast(Qwen3ViTConfig, config.vision), cast(Qwen3Config, config.llm)
    text = llama_keys(tied=decoder.tied)
    if decoder.num_experts:
        text += expert_keys(turned=tells_orientation(decoder) if turned is None else turned)
    return common.family_keys(qwen3_vit.keys(tower), patch_merger.QWEN3_KEYS, text, old=False)


def tells_orientation(decoder: Qwen3Config) -> bool:
    """Whether the shape of either tensor of the experts tells how it is turned; of the two together one always does."""
    return decoder.dim not in (decoder.expert_dim, 2 * decoder.expert_dim)


def other_keys(config: VLMConfig) -> tuple[KeyMap, ...]:
    """The names with the experts turned the other way; transformers 5 writes [experts, out, in].

    Names do not tell the two apart, shapes do: gate_up_proj looks the same both ways only if dim is twice expert_dim, and
    down_proj only if they are equal.
    """
    decoder = cast(Qwen3Config, config.llm)
    return (keys(config, turned=not tells_orientation(decoder)),)


def expert_keys(*, turned: bool) -> KeyMap:
    """The router, and all experts of a layer in two tensors: gate above up, and down."""
    theirs, ours = LAYER + "mlp.experts.", "blocks.{layer}.mlp.experts."
    turn = _turned if turned else _same
    return KeyMap(
        rename(LAYER + "mlp.gate.weight", "blocks.{layer}.mlp.router.weight"),
        split(
            theirs + "gate_up_proj",
            ours + "{part}",
            part=("gate", "up"),
            dim=2 if turned else 1,
            to_ours=turn,
            to_theirs=turn,
        ),
        reshape(theirs + "down_proj", ours + "down", turn, turn),
    )


def _turned(experts: Any) -> Any:
    return experts.transpose(1, 2)


def _same(experts: Any) -> Any:
    return experts


register_family(
    DENSE,
    Family(DENSE, (MODEL_TYPES[DENSE],), read_config, write_config, keys),
)
register_family(
    SPARSE,
    Family(
        SPARSE,
        (MODEL_TYPES[SPARSE],),
        partial(read_config, family=SPARSE),
        write_config,
        keys,
        other_keys=other_keys,
    ),
)


def published(size: str, tower: str, num_parameters: int, active: int | None = None) -> ModelSpec:
    """A published size."""
    name = f"qwen3-vl-{size.lower()}"
    config = _composed(
        DENSE if active is None else SPARSE,
        component("vision", tower).configs[tower],
        component("llm", name).configs[name],
        common.PUBLISHED_TOKENS,
    )
    return common.published_spec(
        config, f"Qwen/Qwen3-VL-{size}-Instruct", common.QWEN3_PROCESSOR, num_parameters, active
    )


@register_model("qwen3-vl-2b")
def qwen3_vl_2b() -> ModelSpec:
    """Qwen3-VL-2B-Instruct."""
    return published("2B", "qwen3-vit-small", 2_127_532_032)


@register_model("qwen3-vl-4b")
def qwen3_vl_4b() -> ModelSpec:
    """Qwen3-VL-4B-Instruct."""
    return published("4B", "qwen3-vit-small", 4_437_815_808)


@register_model("qwen3-vl-8b")
def qwen3_vl_8b() -> ModelSpec:
    """Qwen3-VL-8B-Instruct."""
    return published("8B", "qwen3-vit", 8_767_123_696)


@register_model("qwen3-vl-32b")
def qwen3_vl_32b() -> ModelSpec:
    """Qwen3-VL-32B-Instruct."""
    return published("32B", "qwen3-vit", 33_357_390_064)


@register_model("qwen3-vl-30b-a3b")
def qwen3_vl_30b_a3b() -> ModelSpec:
    """Qwen3-VL-30B-A3B-Instruct: 128 experts, 8 of them for each token."""
    return published("30B-A3B", "qwen3-vit", 31_070_754_032, 3_891_664_112)


@register_model("qwen3-vl-235b-a22b")
def qwen3_vl_235b_a22b() -> ModelSpec:
    """Qwen3-VL-235B-A22B-Instruct: 128 experts, 8 of them for each token."""
    return published("235B-A22B", "qwen3-vit", 235_670_022_896, 22_767_151_856)


def tiny(family: str, decoder: str, num_parameters: int, active: int | None = None) -> ModelSpec:
    """The same composition and layout at a size that runs in milliseconds, over bytes."""
    llm = component("llm", decoder).configs[decoder]
    config = _composed(
        family,
        component("vision", "qwen3-vit-tiny").configs["qwen3-vit-tiny"],
        llm.replace(rope_sections=(3, 1, 1), rope_interleaved=True),
        common.byte_tokens(),
    )
    return common.tiny_spec(config, common.QWEN3_PROCESSOR, num_parameters, active)


@register_model("qwen3-vl-tiny")
def qwen3_vl_tiny() -> ModelSpec:
    """Qwen3-VL at a size that runs in milliseconds, over bytes."""
    return tiny(DENSE, "qwen3-tiny", 120_696)


@register_model("qwen3-vl-moe-tiny")
def qwen3_vl_moe_tiny() -> ModelSpec:
    """Qwen3-VL with experts at a size that runs in milliseconds, over bytes."""
    return tiny(SPARSE, "qwen3-moe-tiny", 143_544, 129_720)
