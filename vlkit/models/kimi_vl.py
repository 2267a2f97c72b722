"""Kimi-VL: MoonViT, 2x2 pixel shuffle and the Moonlight MoE decoder, with plain positions.

Sources: Kimi-VL, arXiv:2504.07491; Moonlight, arXiv:2502.16982; the published config.json and remote code on the Hub.
The three published variants share one architecture; they differ in weights and in the image budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlkit.errors import ConfigError
from vlkit.hub.fields import HubFields
from vlkit.hub.keymap import KeyMap
from vlkit.llm import moonlight
from vlkit.llm.moonlight import MoonlightConfig
from vlkit.models.family import Checkpoint, Family, ModelSpec
from vlkit.models.vlm import VLMConfig
from vlkit.processing import CHAT_FORMATS, ByteTokenizer, ImageRule, ProcessorConfig
from vlkit.projectors import pixel_shuffle
from vlkit.projectors.pixel_shuffle import PixelShuffleConfig
from vlkit.registry import component, register_family, register_model
from vlkit.vision import moonvit
from vlkit.vision.moonvit import MoonViTConfig

IMAGE_TOKEN = 163605  # <|media_pad|>
END_OF_TURN, END_OF_TEXT = 163586, 163585  # <|im_end|>, [EOS]
ENTRIES_WITHOUT_EFFECT = (  # of text_config: training only, serving only, or fixed by the architecture
    "attention_dropout", "aux_loss_alpha", "seq_aux", "bos_token_id", "pad_token_id", "initializer_range", "pretraining_tp",
    "use_cache", "ep_size", "num_nextn_predict_layers",
)  # fmt: skip


def read_config(hub: Mapping[str, Any]) -> VLMConfig:
    """Kimi-VL's config.json as a VLMConfig.

    Raises:
        ConfigError: A field is missing, or holds a value that this family's code would ignore.
    """
    top = HubFields(hub, "config.json")
    vision, text = top.part("vision_config"), top.part("text_config")
    merge = vision.take("merge_kernel_size")
    if not isinstance(merge, list) or len(merge) != 2 or merge[0] != merge[1]:
        raise ConfigError(f"{vision.where}.merge_kernel_size: {merge!r} is not square: expected two equal numbers")
    vision.expect("model_type", "moonvit")
    text.expect("model_type", "deepseek_v3")
    tower = MoonViTConfig(
        dim=vision.take("hidden_size"),
        num_layers=vision.take("num_hidden_layers"),
        num_heads=vision.take("num_attention_heads"),
        mlp_dim=vision.take("intermediate_size"),
        patch_size=vision.take("patch_size"),
        position_grid=(vision.take("init_pos_emb_height"), vision.take("init_pos_emb_width")),
    )
    decoder = moonlight.read_config(text, tied=top.take("tie_word_embeddings", False))
    end = text.take("eos_token_id", top.take("eos_token_id", END_OF_TEXT))
    image_token = top.take("media_placeholder_token_id")
    for fields, known in (
        (top, ("ignore_index", "pad_token_id", "bos_token_id", "use_cache")),
        (vision, ()),
        (text, ENTRIES_WITHOUT_EFFECT),
    ):
        fields.warn_of_rest(*known)
    # One id in the file means the published vocabulary, whose turns end with <|im_end|>; a list says all of them.
    stops = tuple(end) if isinstance(end, list) else (END_OF_TURN, end)
    return VLMConfig(
        vision=tower,
        projector=PixelShuffleConfig(in_dim=tower.dim, out_dim=decoder.dim, merge_size=merge[0]),
        llm=decoder,
        image_token_id=image_token,
        stop_ids=stops,
        family="kimi-vl",
    )


def write_config(config: VLMConfig) -> dict[str, Any]:
    """The inverse of `read_config`.

    Raises:
        ConfigError: A part that Kimi-VL's layout cannot express.
    """
    vision, projector, llm = config.vision, config.projector, config.llm
    if not (
        isinstance(vision, MoonViTConfig)
        and isinstance(projector, PixelShuffleConfig)
        and isinstance(llm, MoonlightConfig)
    ):
        raise ConfigError(
            "Kimi-VL's layout holds MoonViT, a pixel-shuffle projector and Moonlight; set family=None to save in vlkit's own"
        )
    written = {
        "model_type": "kimi_vl",
        "architectures": ["KimiVLForConditionalGeneration"],
        "media_placeholder_token_id": config.image_token_id,
        "ignore_index": -100,
        "vision_config": {
            "model_type": "moonvit",
            "patch_size": vision.patch_size,
            "hidden_size": vision.dim,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.mlp_dim,
            "init_pos_emb_height": vision.position_grid[0],
            "init_pos_emb_width": vision.position_grid[1],
            "merge_kernel_size": [projector.merge_size, projector.merge_size],
        },
        "text_config": {
            "model_type": "deepseek_v3",
            "vocab_size": llm.vocab_size,
            "hidden_size": llm.dim,
            "num_hidden_layers": llm.num_layers,
            "num_attention_heads": llm.num_heads,
            "num_key_value_heads": llm.num_heads,
            "q_lora_rank": None,
            "kv_lora_rank": llm.kv_rank,
            "qk_nope_head_dim": llm.nope_dim,
            "qk_rope_head_dim": llm.rope_dim,
            "v_head_dim": llm.value_dim,
            "intermediate_size": llm.mlp_dim,
            "first_k_dense_replace": llm.num_dense_layers,
            "moe_layer_freq": 1,
            "n_routed_experts": llm.num_experts,
            "num_experts_per_tok": llm.top_k,
            "n_shared_experts": llm.num_shared_experts,
            "moe_intermediate_size": llm.expert_dim,
            "n_group": llm.num_groups,
            "topk_group": llm.top_groups,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": llm.normalize,
            "routed_scaling_factor": llm.routed_scale,
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_theta": llm.theta,
            "rope_scaling": None,
            "max_position_embeddings": llm.max_positions,
            "rms_norm_eps": llm.norm_eps,
            "tie_word_embeddings": llm.tied,
            "eos_token_id": END_OF_TEXT if config.stop_ids == (END_OF_TURN, END_OF_TEXT) else list(config.stop_ids),
        },
    }
    again = read_config(written).replace(loss_chunk=config.loss_chunk)  # how a loss is computed is not written
    if again != config:
        raise ConfigError(
            "Kimi-VL's layout cannot express this model (another projector, epsilon, or stop ids than the family's); "
            "set family=None to save in vlkit's own"
        )
    return written


def keys(config: VLMConfig) -> KeyMap:
    """Published names of the whole model."""
    return (
        moonvit.KEYS.mounted(theirs="vision_tower.", ours="vision.")
        + pixel_shuffle.KEYS.mounted(theirs="multi_modal_projector.", ours="projector.")
        + moonlight.keys(config.llm).mounted(theirs="language_model.", ours="llm.")  # type: ignore[arg-type]
    )


register_family("kimi-vl", Family("kimi-vl", ("kimi_vl",), read_config, write_config, keys))


def published(repo_id: str, *, max_patches: int) -> ModelSpec:
    """A published variant; all share the architecture."""
    config = VLMConfig(
        vision=MoonViTConfig(),
        projector=PixelShuffleConfig(in_dim=1152, out_dim=2048),
        llm=component("llm", "moonlight-kimi-vl").configs["moonlight-kimi-vl"],
        image_token_id=IMAGE_TOKEN,
        stop_ids=(END_OF_TURN, END_OF_TEXT),
        family="kimi-vl",
    )
    return ModelSpec(
        config=config,
        processor=ProcessorConfig(
            tokenizer="files",
            chat=CHAT_FORMATS["kimi"],
            image=ImageRule(patch_size=14, merge_size=2, max_patches=max_patches, max_aspect=None),
        ),
        # The figures of the checkpoint less the 26 x 64 selection biases of the routers, which are buffers here.
        num_parameters=16_407_656_048 - 1664,
        num_active_parameters=416_866_032 + 30_679_808 + 2_914_776_192 - 1664,
        checkpoint=Checkpoint(repo_id),
    )


@register_model("kimi-vl-a3b")
def kimi_vl_a3b() -> ModelSpec:
    """Kimi-VL-A3B-Instruct: 16.4 B parameters, images of up to 4,096 patches."""
    return published("moonshotai/Kimi-VL-A3B-Instruct", max_patches=4096)


@register_model("kimi-vl-a3b-thinking")
def kimi_vl_a3b_thinking() -> ModelSpec:
    """Kimi-VL-A3B-Thinking: the same with long chains of thought."""
    return published("moonshotai/Kimi-VL-A3B-Thinking", max_patches=4096)


@register_model("kimi-vl-a3b-thinking-2506")
def kimi_vl_a3b_thinking_2506() -> ModelSpec:
    """Kimi-VL-A3B-Thinking-2506: images of up to 16,384 patches."""
    return published("moonshotai/Kimi-VL-A3B-Thinking-2506", max_patches=16384)


@register_model("kimi-vl-tiny")
def kimi_vl_tiny() -> ModelSpec:
    """The same composition and layout at a size that runs in milliseconds, over bytes."""
    tower = component("vision", "moonvit-tiny").configs["moonvit-tiny"]
    decoder = component("llm", "moonlight-tiny").configs["moonlight-tiny"]
    special = ByteTokenizer().special
    return ModelSpec(
        config=VLMConfig(
            vision=tower,
            projector=PixelShuffleConfig(in_dim=tower.out_dim, out_dim=decoder.dim),  # type: ignore[attr-defined]
            llm=decoder,
            image_token_id=special["<|media_pad|>"],
            stop_ids=(special["<|im_end|>"], special["<|eos|>"]),
            family="kimi-vl",
        ),
        processor=ProcessorConfig(
            chat=CHAT_FORMATS["kimi"].replace(stop=("<|im_end|>", "<|eos|>")),
            image=ImageRule(patch_size=tower.patch_size, max_patches=256),  # type: ignore[attr-defined]
        ),
        num_parameters=85_832,
        num_active_parameters=78_920,
    )
