"""AndesVL: an AIMv2 or SigLIP2 tower at native resolution, 2x2 pixel shuffle and a Qwen3 decoder, with plain positions.

Sources: AndesVL, arXiv:2510.11496; the published config.json, remote code and evaluation code of its authors. Eight models are
published: four sizes, each as -Instruct and -Thinking, which share one architecture.

The names of the AIMv2 models are those by which the authors' own code loads them. No file of the 0.6B model was seen: its names
are those of the authors' SigLIP2 encoder, and the other spellings in which such encoders are written are read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any, Literal

from vlkit.config import Config
from vlkit.errors import ConfigError
from vlkit.hub.fields import HubFields
from vlkit.hub.keymap import KeyMap, rename
from vlkit.llm import qwen3
from vlkit.llm.qwen3 import Qwen3Config
from vlkit.models.family import Checkpoint, Family, ModelSpec
from vlkit.models.qwen_common import (
    END_OF_TEXT,
    END_OF_TURN,
    TEXT_WITHOUT_EFFECT,
    checked,
    refuse_other_parts,
    written_text,
)
from vlkit.models.vlm import HubInputs, VLMConfig
from vlkit.processing import CHAT_FORMATS, ByteTokenizer, ImageRule, ProcessorConfig
from vlkit.projectors.pixel_shuffle import PixelShuffleConfig
from vlkit.registry import component, register_family, register_model
from vlkit.vision import aimv2, siglip2
from vlkit.vision.aimv2 import AIMv2Config
from vlkit.vision.siglip2 import SigLIP2Config
from vlkit.vision.tower import CLIP_PIXELS

IMAGE_TOKEN = 151654  # <|vision_pad|>; the published config.json does not name it
AIMV2_TYPE, SIGLIP2_TYPE = "andesvl-aimv2-qwen3", "andesvl-siglip2-qwen3"
ACTIVATIONS: dict[str, Literal["gelu_tanh", "gelu"]] = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
VISION_WITHOUT_EFFECT = ("attention_dropout", "projection_dropout", "window_size", "min_pixels", "max_pixels")
LONGEST_SIDE, LARGEST_SQUARE = 4172, 1792  # pixels; the settings behind the reported scores


def read_config(hub: Mapping[str, Any]) -> VLMConfig:
    """AndesVL's config.json as a VLMConfig.

    Fields that the published class fills with defaults of its own (no table, another way to resample it) are never guessed:
    an AIMv2 model must say them. Only what the 0.6B model leaves to its encoder's code has a default.

    Raises:
        ConfigError: A field is missing, or holds a value that this family's code would ignore.
    """
    top = HubFields(hub, "config.json")
    vision, text = top.part("vision_config"), top.part("text_config")
    tower = (
        _read_aimv2(vision)
        if top.expect("model_type", AIMV2_TYPE, SIGLIP2_TYPE) == AIMV2_TYPE
        else _read_siglip2(vision)
    )
    text.expect("model_type", "qwen3")
    stated = "tie_word_embeddings" in text.values
    decoder = qwen3.read_config(text, tied=stated or top.take("tie_word_embeddings"))
    end = text.take("eos_token_id", top.take("eos_token_id", END_OF_TURN))
    ids = end if isinstance(end, list) else [end]
    if ids == [END_OF_TURN]:  # as published; generation_config.json adds the other
        ids = [END_OF_TURN, END_OF_TEXT]
    image_token = top.take("image_token_id", IMAGE_TOKEN)
    merge_size = vision.take("hidden_stride", 2)
    top.warn_of_rest("bos_token_id", "pad_token_id", "use_cache", "tie_word_embeddings", "eos_token_id")
    vision.warn_of_rest(*VISION_WITHOUT_EFFECT)
    text.warn_of_rest(*TEXT_WITHOUT_EFFECT)
    return composed(tower, decoder, merge_size=merge_size, image_token_id=image_token, stop_ids=tuple(ids))


def composed(
    tower: Config, decoder: Config, *, image_token_id: int, stop_ids: tuple[int, ...], merge_size: int = 2
) -> VLMConfig:
    """A tower and a decoder with the projector that joins them."""
    in_dim, out_dim = tower.out_dim, decoder.dim  # type: ignore[attr-defined]
    return VLMConfig(
        vision=tower,
        projector=PixelShuffleConfig(in_dim=in_dim, out_dim=out_dim, merge_size=merge_size, norm="none"),
        llm=decoder,
        image_token_id=image_token_id,
        stop_ids=stop_ids,
        hub_inputs=HubInputs(patch_blocks=merge_size),
        family="andesvl",
    )


def _read_aimv2(vision: HubFields) -> AIMv2Config:
    for name, supported in (
        ("num_channels", 3),
        ("qkv_bias", False),
        ("use_bias", False),
        ("temporal_patch_size", 1),
        ("fullatt_block_indexes", None),  # None: every block sees the whole image
    ):
        vision.expect(name, supported)
    use_positions = vision.take("preserve_original_pe")
    method = vision.take("interpolate_pe_method")
    if use_positions and method != "two_dim":
        raise ConfigError(f"{vision.where}.interpolate_pe_method: {method!r} is not supported, only 'two_dim'")
    patch_size = vision.take("patch_size")
    return AIMv2Config(
        dim=vision.take("hidden_size"),
        num_layers=vision.take("num_hidden_layers"),
        num_heads=vision.take("num_attention_heads"),
        mlp_dim=vision.take("intermediate_size"),
        patch_size=patch_size,
        position_grid=_square(vision, "image_size", vision.take("image_size"), patch_size),
        use_positions=use_positions,
        use_rope=not vision.expect("disable_rope", False, True),
        norm_eps=vision.take("rms_norm_eps"),
    )


def _read_siglip2(vision: HubFields) -> SigLIP2Config:
    vision.expect("num_channels", 3)
    activation = vision.expect("hidden_act", *ACTIVATIONS)
    patch_size, count = vision.take("patch_size"), vision.take("num_patches", 1024)
    image_size = vision.take("image_size", None)
    if isinstance(count, int) and count < 1:  # then the size of the image says it
        grid = _square(vision, "image_size", image_size, patch_size)
    else:
        grid = _square(vision, "num_patches", count, None)
    return SigLIP2Config(
        dim=vision.take("hidden_size"),
        num_layers=vision.take("num_hidden_layers"),
        num_heads=vision.take("num_attention_heads"),
        mlp_dim=vision.take("intermediate_size"),
        activation=ACTIVATIONS[activation],
        patch_size=patch_size,
        position_grid=grid,
        use_positions=vision.take("preserve_original_pe", True),
        theta=vision.take("rope_theta", 10000.0),
        use_rope=not vision.expect("disable_rope", False, True),
        norm_eps=vision.take("layer_norm_eps", 1e-6),
    )


def _square(vision: HubFields, name: str, value: Any, patch_size: Any) -> tuple[int, int]:
    """Rows and columns of the table: of an image of so many pixels a side, or (without patch_size) of so many cells."""
    known = (
        isinstance(value, int)
        and value > 0
        and (patch_size is None or (isinstance(patch_size, int) and patch_size > 0))
    )
    side = 0 if not known else value // patch_size if patch_size is not None else round(value**0.5)
    if side < 1 or value != (side * patch_size if patch_size is not None else side**2):
        raise ConfigError(
            f"{vision.where}.{name}: {value!r} makes no square table"
            + ("" if patch_size is None else f" of patches of {patch_size} pixels")
        )
    return side, side


def write_config(config: VLMConfig) -> dict[str, Any]:
    """The inverse of `read_config`.

    Raises:
        ConfigError: A part that AndesVL's layout cannot express.
    """
    vision, llm = config.vision, config.llm
    tower: type[Config] = SigLIP2Config if isinstance(vision, SigLIP2Config) else AIMv2Config
    refuse_other_parts(config, tower, PixelShuffleConfig, Qwen3Config)
    assert isinstance(vision, (AIMv2Config, SigLIP2Config))
    assert isinstance(llm, Qwen3Config)
    assert isinstance(config.projector, PixelShuffleConfig)
    published = (END_OF_TURN, END_OF_TEXT)
    sizes: dict[str, Any] = {
        "hidden_size": vision.dim,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.mlp_dim,
        "num_channels": vision.in_channels,
        "patch_size": vision.patch_size,
        "image_size": vision.position_grid[0] * vision.patch_size,
        "preserve_original_pe": vision.use_positions,
        "disable_rope": not vision.use_rope,
        "hidden_stride": config.projector.merge_size,
    }
    if isinstance(vision, AIMv2Config):
        sizes |= {
            "model_type": "aimv2",
            "interpolate_pe_method": "two_dim",
            "rms_norm_eps": vision.norm_eps,
            "qkv_bias": False,
            "use_bias": False,
            "temporal_patch_size": 1,
            "fullatt_block_indexes": None,
        }
    else:
        sizes |= {
            "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[vision.activation],
            "num_patches": vision.position_grid[0] * vision.position_grid[1],
            "layer_norm_eps": vision.norm_eps,
            "rope_theta": vision.theta,
        }
    written = {
        "model_type": AIMV2_TYPE if isinstance(vision, AIMv2Config) else SIGLIP2_TYPE,
        "architectures": ["AndesVLForConditionalGeneration"],
        **({} if config.image_token_id == IMAGE_TOKEN else {"image_token_id": config.image_token_id}),
        "vision_config": sizes,
        "text_config": {
            "model_type": "qwen3",
            **written_text(config),
            "head_dim": llm.head_dim,
            "rope_scaling": None,
            "attention_bias": False,
            "use_sliding_window": False,
            "tie_word_embeddings": llm.tied,
            "eos_token_id": END_OF_TURN if config.stop_ids == published else list(config.stop_ids),
        },
    }
    return checked(written, config, read_config)


PROJECTOR = KeyMap(rename("mlp.0.{kind}", "fc1.{kind}"), rename("mlp.2.{kind}", "fc2.{kind}"))


def keys(config: VLMConfig) -> KeyMap:
    """Published names of the whole model."""
    if isinstance(config.vision, SigLIP2Config):
        return _mounted(siglip2.KEYS.mounted(theirs="vision_model."), config)
    return _mounted(aimv2.KEYS, config)


def other_keys(config: VLMConfig) -> tuple[KeyMap, ...]:
    """Other spellings of the SigLIP2 tower: by where it stands, how its two embeddings are called, and as a convolution."""
    if not isinstance(config.vision, SigLIP2Config):
        return ()
    embeddings = (("proj", False), ("patch_embedding", False), ("patch_embedding", True))
    maps = [
        siglip2.keys(patches, positions, convolution=convolution).mounted(theirs=prefix)
        for prefix, (patches, convolution), positions in product(
            ("vision_model.", ""), embeddings, ("pos_embed", "position_embedding")
        )
    ]
    return tuple(_mounted(tower, config) for tower in maps[1:])  # the first is what `keys` gives


def _mounted(tower: KeyMap, config: VLMConfig) -> KeyMap:
    return (
        tower.mounted(theirs="vision_encoder.", ours="vision.")
        + PROJECTOR.mounted(ours="projector.")
        + qwen3.keys(config.llm).mounted(theirs="language_model.", ours="llm.")  # type: ignore[arg-type]
    )


register_family(
    "andesvl",
    Family(
        "andesvl",
        (AIMV2_TYPE, SIGLIP2_TYPE),
        read_config,
        write_config,
        keys,
        other_keys=other_keys,
    ),
)


def image_rule(tower: AIMv2Config | SigLIP2Config) -> ImageRule:
    """Letterboxed images of at least 4 tokens and at most 1792 x 1792 pixels, before the canvas is rounded up.

    `fit="letterbox-chat"` with max_pixels=733**2 gives the sizes of the `chat` method in the published repositories instead.
    """
    clip = isinstance(tower, AIMv2Config)
    return ImageRule(
        patch_size=tower.patch_size,
        fit="letterbox",
        max_patches=None,
        min_pixels=4 * (2 * tower.patch_size) ** 2,
        max_pixels=LARGEST_SQUARE**2,
        longest=LONGEST_SIDE,
        max_side=None,
        max_aspect=None,
        mean=CLIP_PIXELS.mean if clip else (0.5, 0.5, 0.5),
        std=CLIP_PIXELS.std if clip else (0.5, 0.5, 0.5),
    )


PUBLISHED = {  # size: tower, decoder, parameters
    "0.6b": ("siglip2", "qwen3-0.6b", 695_069_952),
    "1b": ("aimv2", "qwen3-0.6b", 927_010_816),
    "2b": ("aimv2", "qwen3-1.7b", 2_055_731_200),
    "4b": ("aimv2", "qwen3-4b", 4_359_721_984),
}


def published(size: str, variant: str) -> ModelSpec:
    """A published model; Instruct and Thinking differ in their weights alone.

    Args:
        size: "0.6b", "1b", "2b" or "4b".
        variant: "Instruct" or "Thinking".
    """
    tower_name, decoder_name, num_parameters = PUBLISHED[size]
    tower: Any = component("vision", tower_name).configs[tower_name]
    decoder: Any = component("llm", decoder_name).configs[decoder_name]
    return ModelSpec(
        config=composed(tower, decoder, image_token_id=IMAGE_TOKEN, stop_ids=(END_OF_TURN, END_OF_TEXT)),
        processor=ProcessorConfig(tokenizer="files", chat=CHAT_FORMATS["andesvl"], image=image_rule(tower)),
        num_parameters=num_parameters,
        num_active_parameters=num_parameters,
        checkpoint=Checkpoint(f"OPPOer/AndesVL-{size.replace('.', '_').upper()}-{variant}"),
    )


def tiny(tower_name: str, num_parameters: int) -> ModelSpec:
    """The same composition and layout at a size that runs in milliseconds, over bytes."""
    tower: Any = component("vision", tower_name).configs[tower_name]
    decoder: Any = component("llm", "qwen3-tiny").configs["qwen3-tiny"]
    special = ByteTokenizer().special
    token = (2 * tower.patch_size) ** 2
    return ModelSpec(
        config=composed(
            tower,
            decoder,
            image_token_id=special["<|vision_pad|>"],
            stop_ids=(special["<|im_end|>"], special["<|endoftext|>"]),
        ),
        processor=ProcessorConfig(
            chat=CHAT_FORMATS["andesvl"],
            image=image_rule(tower).replace(max_pixels=64 * token, longest=16 * tower.patch_size),
        ),
        num_parameters=num_parameters,
        num_active_parameters=num_parameters,
    )


@register_model("andesvl-tiny")
def andesvl_tiny() -> ModelSpec:
    """AIMv2 and Qwen3 in AndesVL's layout, at a size that runs in milliseconds."""
    return tiny("aimv2-tiny", 71_624)


@register_model("andesvl-siglip2-tiny")
def andesvl_siglip2_tiny() -> ModelSpec:
    """The same with SigLIP2, as in AndesVL-0.6B."""
    return tiny("siglip2-tiny", 69_864)


for _size in PUBLISHED:
    register_model(f"andesvl-{_size}")(partial(published, _size, "Instruct"))
    for _variant in ("Instruct", "Thinking"):
        register_model(f"andesvl-{_size}-{_variant.lower()}")(partial(published, _size, _variant))
