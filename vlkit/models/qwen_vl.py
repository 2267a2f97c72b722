"""Qwen-VL and Qwen-VL-Chat: OpenCLIP ViT-bigG, a resampler of 256 queries, and the first Qwen decoder.

Sources: Qwen-VL, arXiv:2308.12966; the published config.json and remote code on the Hub. Models tuned from Qwen-VL-Chat, such
as MobileVLM (arXiv:2409.14818), keep its layout and load the same way.

Every image is <img>, 256 slots and </img>. In the published tokenizer the slots carry the path of the image, one byte each, and
then <imgpad>; here pixels come as tensors, and whatever stands in the slots makes way for the image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlkit.errors import ConfigError
from vlkit.hub.fields import HubFields
from vlkit.hub.keymap import KeyMap, drop
from vlkit.llm import qwen
from vlkit.llm.qwen import QwenConfig
from vlkit.models.family import Checkpoint, Family, ModelSpec
from vlkit.models.vlm import HubInputs, VLMConfig
from vlkit.processing import CHAT_FORMATS, ByteTokenizer, ImageRule, ProcessorConfig
from vlkit.projectors import resampler
from vlkit.projectors.resampler import ResamplerConfig
from vlkit.registry import component, register_family, register_model
from vlkit.vision import openclip_vit
from vlkit.vision.openclip_vit import OpenCLIPViTConfig
from vlkit.vision.tower import CLIP_PIXELS

IMAGE_START = 151857  # <img>; </img> and <imgpad> follow
STOPS = (151645, 151644, 151643)  # <|im_end|>, <|im_start|>, <|endoftext|>
NUM_QUERIES, QUERY_HEAD_DIM = 256, 128  # fixed in the published code, not in its config
POSITION_GRID = (16, 16)  # likewise: ViT-bigG was trained at 224 pixels
IMAGE_PATCHES = 32  # patches along one side of an image: 448 / 14
IMAGES = ImageRule(
    fit="stretch",
    patch_size=14,
    merge_size=1,
    tokens_per_image=NUM_QUERIES,
    max_patches=None,
    max_side=IMAGE_PATCHES,
    max_aspect=None,
    mean=CLIP_PIXELS.mean,
    std=CLIP_PIXELS.std,
)
"""Every image becomes a square of 448 pixels, whatever its shape."""
ENTRIES_WITHOUT_EFFECT = (  # training only, serving only, or how the published code computes
    "attn_dropout_prob", "emb_dropout_prob", "initializer_range", "bf16", "fp16", "fp32", "onnx_safe", "tokenizer_type",
    "use_cache", "use_flash_attn", "use_cache_quantization", "use_cache_kernel", "softmax_in_fp32", "bos_token_id",
    "pad_token_id", "chat_format", "max_window_size",
)  # fmt: skip


def marked(start: int) -> HubInputs:
    """Images stand between <img> (`start`) and </img>, the id behind it: everything there, be it a path or padding."""
    return HubInputs(image_span=(start, start + 1))


def read_config(hub: Mapping[str, Any]) -> VLMConfig:
    """Qwen-VL's config.json as a VLMConfig.

    Raises:
        ConfigError: A Qwen without eyes, quantised weights, a field that is missing, or a value that this family's code would
            ignore.
    """
    top = HubFields(hub, "config.json")
    if top.take("quantization_config", None):
        method = HubFields(top.values["quantization_config"], "config.json.quantization_config").take(
            "quant_method", "?"
        )
        raise ConfigError(
            f"config.json.quantization_config: the weights are quantised ({method}), which vlkit does not read; load the "
            "unquantised repository, such as Qwen/Qwen-VL-Chat"
        )
    if top.take("visual", None) is None:
        raise ConfigError(
            "config.json has no 'visual': a Qwen that reads text only, not Qwen-VL. Its decoder is the component 'qwen-7b' "
            "(vlkit.list_components('llm')); vlkit loads whole vision-language models"
        )
    visual = top.part("visual")
    decoder = qwen.read_config(top)
    width, ratio = _count(visual, "width"), visual.take("mlp_ratio")
    if not isinstance(ratio, (int, float)) or not 0 < ratio < 1e6:
        raise ConfigError(f"config.json.visual.mlp_ratio: expected a number above 0, found {ratio!r}")
    tower = OpenCLIPViTConfig(
        dim=width,
        num_layers=visual.take("layers"),
        num_heads=visual.take("heads"),
        mlp_dim=int(width * ratio),
        patch_size=visual.take("patch_size"),
        position_grid=POSITION_GRID,
    )
    out_dim = _count(visual, "output_dim")
    if out_dim % QUERY_HEAD_DIM:
        raise ConfigError(
            f"config.json.visual.output_dim: {out_dim} is not a multiple of {QUERY_HEAD_DIM}, a head's width"
        )
    projector = ResamplerConfig(
        in_dim=tower.dim,
        out_dim=out_dim,
        num_queries=visual.take("n_queries", NUM_QUERIES),
        num_heads=out_dim // QUERY_HEAD_DIM,
    )
    start = _count(visual, "image_start_id")
    visual.take("image_size", None)  # of the processor: the tower takes any size
    end = top.take("eos_token_id", None)
    top.warn_of_rest(*ENTRIES_WITHOUT_EFFECT)
    visual.warn_of_rest()
    # The published file leaves out what ends a turn; a list says all of it, and so does the file of another vocabulary.
    ends = () if end is None else tuple(end) if isinstance(end, list) else (end,)
    if start == IMAGE_START and not isinstance(end, list):
        ends = (*STOPS, *(each for each in ends if each not in STOPS))
    return VLMConfig(
        vision=tower,
        projector=projector,
        llm=decoder,
        image_token_id=start + 2,
        hub_inputs=marked(start),
        stop_ids=ends,
        family="qwen-vl",
    )


def _count(fields: HubFields, name: str) -> int:
    """A field that is computed with before a config class checks it."""
    value = fields.take(name)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{fields.where}.{name}: expected a whole number of at least 1, found {value!r}")
    return value


def write_config(config: VLMConfig) -> dict[str, Any]:
    """The inverse of `read_config`.

    Raises:
        ConfigError: A part that Qwen-VL's layout cannot express.
    """
    vision, projector, llm = config.vision, config.projector, config.llm
    if not (
        isinstance(vision, OpenCLIPViTConfig) and isinstance(projector, ResamplerConfig) and isinstance(llm, QwenConfig)
    ):
        raise ConfigError(
            "Qwen-VL's layout holds an OpenCLIP tower, a resampler and a Qwen decoder; set family=None to save in vlkit's own"
        )
    # The shortest ratio that gives the width back.
    ratio = next(
        (
            r
            for digits in range(1, 16)
            if int(vision.dim * (r := _round_up(vision.mlp_dim / vision.dim, digits))) == vision.mlp_dim
        ),
        vision.mlp_dim / vision.dim,
    )
    queries = {} if projector.num_queries == NUM_QUERIES else {"n_queries": projector.num_queries}
    written: dict[str, Any] = {
        "model_type": "qwen",
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.dim,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "kv_channels": llm.head_dim,
        "intermediate_size": 2 * llm.mlp_dim,
        "layer_norm_epsilon": llm.norm_eps,
        "rotary_emb_base": llm.theta,
        "rotary_pct": 1.0,
        "seq_length": llm.trained_length,
        "max_position_embeddings": llm.max_positions,
        "use_dynamic_ntk": llm.grow_wavelengths,
        "use_logn_attn": llm.grow_queries,
        "scale_attn_weights": True,
        "no_bias": True,
        "tie_word_embeddings": llm.tied,
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "visual": {
            "heads": vision.num_heads,
            "image_size": IMAGE_PATCHES * vision.patch_size,
            "image_start_id": config.image_token_id - 2,
            "layers": vision.num_layers,
            "mlp_ratio": ratio,
            "output_dim": projector.out_dim,
            "patch_size": vision.patch_size,
            "width": vision.dim,
            **queries,
        },
    }
    if config.stop_ids != STOPS or config.image_token_id != IMAGE_START + 2:
        written["eos_token_id"] = list(config.stop_ids)
    not_readable = config.image_token_id < 2 or llm.num_heads * llm.head_dim != llm.dim
    # How a loss is computed is not written.
    if not_readable or read_config(written).replace(loss_chunk=config.loss_chunk) != config:
        raise ConfigError(
            "Qwen-VL's layout cannot express this model (another position table, epsilon, or number of heads than the "
            "family's); set family=None to save in vlkit's own"
        )
    return written


def _round_up(value: float, digits: int) -> float:
    return math.ceil(value * 10**digits) / 10**digits


def keys(config: VLMConfig) -> KeyMap:
    """Published names of the whole model; tower and resampler lie side by side in one part of the decoder."""
    return (
        openclip_vit.keys(config.vision).mounted(theirs="transformer.visual.", ours="vision.")  # type: ignore[arg-type]
        + resampler.KEYS.mounted(theirs="transformer.visual.", ours="projector.")
        + qwen.keys(config.llm).mounted(ours="llm.")  # type: ignore[arg-type]
        + KeyMap(drop("transformer.rotary_emb.inv_freq"))
    )


register_family("qwen-vl", Family("qwen-vl", ("qwen",), read_config, write_config, keys))


def published(repo_id: str) -> ModelSpec:
    """A published variant; all share the architecture."""
    config = VLMConfig(
        vision=OpenCLIPViTConfig(),
        projector=ResamplerConfig(),
        llm=component("llm", "qwen-vl").configs["qwen-vl"],
        image_token_id=IMAGE_START + 2,
        hub_inputs=marked(IMAGE_START),
        stop_ids=STOPS,
        family="qwen-vl",
    )
    return ModelSpec(
        config=config,
        processor=ProcessorConfig(tokenizer="files", chat=CHAT_FORMATS["qwen-vl"], image=IMAGES),
        num_parameters=9_656_935_168,
        num_active_parameters=9_656_935_168,
        checkpoint=Checkpoint(repo_id),
    )


@register_model("qwen-vl-chat")
def qwen_vl_chat() -> ModelSpec:
    """Qwen-VL-Chat: 9.66 B parameters, images of 448x448 pixels as 256 tokens."""
    return published("Qwen/Qwen-VL-Chat")


@register_model("qwen-vl")
def qwen_vl() -> ModelSpec:
    """Qwen-VL: the same before it learnt to chat."""
    return published("Qwen/Qwen-VL")


@register_model("qwen-vl-tiny")
def qwen_vl_tiny() -> ModelSpec:
    """The same composition and layout at a size that runs in milliseconds, over bytes."""
    tower = component("vision", "openclip-vit-tiny").configs["openclip-vit-tiny"].replace(position_grid=POSITION_GRID)
    decoder = component("llm", "qwen-tiny").configs["qwen-tiny"].replace(dim=128, num_heads=4, head_dim=32)
    special = ByteTokenizer().special
    chat = CHAT_FORMATS["qwen-vl"]
    return ModelSpec(
        config=VLMConfig(
            vision=tower,
            projector=ResamplerConfig(in_dim=tower.out_dim, out_dim=decoder.dim, num_queries=4, num_heads=1),  # type: ignore[attr-defined]
            llm=decoder,
            image_token_id=special["<imgpad>"],
            hub_inputs=marked(special["<img>"]),
            stop_ids=tuple(special[name] for name in chat.stop),
            family="qwen-vl",
        ),
        processor=ProcessorConfig(
            chat=chat,
            image=IMAGES.replace(patch_size=tower.patch_size, tokens_per_image=4),  # type: ignore[attr-defined]
        ),
        num_parameters=374_696,
        num_active_parameters=374_696,
    )
