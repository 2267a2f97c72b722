"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: how config.json is laid out, which flag ties the head, the decoder's names.

config.json has come in three forms, all of which are read:

    flat      text fields at the top, rope_scaling {"type": "mrope", ...}      the published Qwen2-VL and Qwen2.5-VL
    nested    text_config, rope_theta and rope_scaling inside it               the published Qwen3-VL
    nested    text_config, rope_parameters inside it                           what transformers 5 writes

Between the two, late releases of transformers 4 wrote text_config and left copies of its fields at the top: text_config counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from vlkit.config import Config
from vlkit.errors import ConfigError
from vlkit.hub.fields import HubFields
from vlkit.hub.keymap import KeyMap, Pattern, drop
from vlkit.models.family import Checkpoint, ModelSpec
from vlkit.models.vlm import HubInputs, VLMConfig
from vlkit.processing import CHAT_FORMATS, ByteTokenizer, ImageRule, ProcessorConfig, VideoRule
from vlkit.projectors.patch_merger import PatchMergerConfig
from vlkit.vision.tower import CLIP_PIXELS

IMAGE_TOKEN, VIDEO_TOKEN = 151655, 151656  # <|image_pad|>, <|video_pad|>
VISION_MARKS = (151652, 151653)  # <|vision_start|>, <|vision_end|>
END_OF_TURN, END_OF_TEXT = 151645, 151643  # <|im_end|>, <|endoftext|>
MARK_FIELDS = ("vision_start_token_id", "vision_end_token_id")
TOKEN_FIELDS = ("image_token_id", "video_token_id", "vision_token_id", *MARK_FIELDS)
TEXT_WITHOUT_EFFECT = (  # training only, serving only, or fixed by the architecture
    "attention_dropout", "bos_token_id", "pad_token_id", "initializer_range", "use_cache", "sliding_window",
    "max_window_layers", "output_router_logits", "router_aux_loss_coef", *TOKEN_FIELDS,
)  # fmt: skip

QWEN2_PROCESSOR = ProcessorConfig(
    tokenizer="files",
    chat=CHAT_FORMATS["chatml"],
    image=ImageRule(
        fit="resize", resampler="torch", patch_size=14, frames_per_patch=2, max_patches=None, max_side=None,
        min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28,
        mean=CLIP_PIXELS.mean, std=CLIP_PIXELS.std,
    ),
    video=VideoRule(),
)  # fmt: skip
"""How Qwen2-VL and Qwen2.5-VL prepare chats: images of 4 to 16,384 tokens, frames of 128 to 768."""

QWEN3_PROCESSOR = ProcessorConfig(
    tokenizer="files",
    chat=CHAT_FORMATS["qwen3-vl"],
    image=ImageRule(
        fit="resize", resampler="torch", patch_size=16, frames_per_patch=2, max_patches=None, max_side=None,
        min_pixels=64 * 32 * 32, max_pixels=16384 * 32 * 32,
    ),
    video=VideoRule(multiple=1, spacing="ends", budget="video", min_pixels=4 * 32 * 32, max_pixels=24576 * 32 * 32),
)  # fmt: skip
"""How Qwen3-VL does: images of 64 to 16,384 tokens, and 4 to 24,576 cells of 32x32 pixels in all frames of a video."""


@dataclass(frozen=True)
class HubConfig:
    """A config.json of one of these families, in whichever form it is.

    Attributes:
        top: The whole.
        text: The fields of the decoder: text_config, or the top itself.
        vision: The fields of the tower.
        tied: Whether the head is the embedding.
        theta: Base of the rotary wavelengths.
        sections: How many of them turn with time, row and column.
    """

    top: HubFields
    text: HubFields
    vision: HubFields
    tied: bool
    theta: float
    sections: tuple[int, int, int]

    @property
    def tokens(self) -> dict[str, Any]:
        """The fields of VLMConfig about ids.

        Files that leave ids out mean those of the published vocabulary. Small models keep them as defaults of the class, though
        their vocabulary does not have them: such ids never come, and only the one of images is needed.
        """
        marks = [self.top.take(name, token) for name, token in zip(MARK_FIELDS, VISION_MARKS, strict=True)]
        video, ends = self.top.take("video_token_id", VIDEO_TOKEN), self._ends()
        return {
            "image_token_id": self.top.take("image_token_id", IMAGE_TOKEN),
            "video_token_id": video if self._known(video) else None,
            "vision_marks": None if None in marks or not all(map(self._known, marks)) else tuple(marks),
            "stop_ids": tuple(filter(self._known, ends)),
        }

    def _known(self, token: Any) -> bool:
        """Whether an id lies within the vocabulary; what is no id is left for VLMConfig to refuse."""
        vocab_size = self.text.take("vocab_size")
        return not (isinstance(token, int) and isinstance(vocab_size, int) and token >= vocab_size)

    def _ends(self) -> list[Any]:
        end = self.text.take("eos_token_id", None)
        if end is None:
            end = self.top.take("eos_token_id", None)
        if end is None or end in (END_OF_TURN, [END_OF_TURN]):
            # What the published files say here; their generation_config.json adds the other.
            return [END_OF_TURN, END_OF_TEXT]
        return end if isinstance(end, list) else [end]

    def warn_of_rest(self) -> None:
        """Warn of fields without an effect."""
        copies = () if self.text is self.top else self.text.values
        self.top.warn_of_rest(*TEXT_WITHOUT_EFFECT, *copies)
        self.vision.warn_of_rest("initializer_range", "spatial_patch_size")
        if self.text is not self.top:
            self.text.warn_of_rest(*TEXT_WITHOUT_EFFECT, "tie_word_embeddings")


def read_hub(
    hub: Mapping[str, Any],
    model_type: str,
    *,
    activation: str,
    inner_tie: bool,
    interleaved: bool,
    unwritten: Mapping[str, Any] | None = None,
) -> HubConfig:
    """Find the parts of a config.json, and what stands in different places.

    Args:
        hub: The whole config.json.
        model_type: Of the family; the parts may have it too, or with "_text" and "_vision".
        activation: Of the tower.
        inner_tie: Whether a true tie_word_embeddings inside text_config counts too: late releases of transformers 4 left it
            only there for Qwen2-VL and Qwen2.5-VL. For Qwen3-VL the one at the top decides alone: the class of its mixture
            of experts has true as the default inside, which re-saved files of untied models then show.
        interleaved: Whether the sections of rotary wavelengths are mixed.
        unwritten: What a vision_config means that leaves a field out. Releases of transformers from 4.45 on wrote only what
            differs from the values of the class, so a fine-tune of a published model may say next to nothing of its tower.

    Raises:
        ConfigError: A field is missing, or holds a value that this family's code would ignore.
    """
    top = HubFields(hub, "config.json")
    nested = top.take("text_config", None) is not None
    text, vision = top.part("text_config") if nested else top, top.part("vision_config")
    vision = HubFields({**(unwritten or {}), **vision.values}, vision.where)
    if nested:
        text.expect("model_type", f"{model_type}_text", model_type)
    vision.expect("model_type", f"{model_type}_vision", model_type)
    vision.expect("hidden_act", activation)
    vision.expect("in_channels", vision.expect("in_chans", 3))
    axial = vision.take("rope_parameters", None)
    if axial is not None:
        turning = HubFields(axial, f"{vision.where}.rope_parameters")
        turning.expect("rope_type", "axial", "default")
        turning.expect("rope_theta", 10000.0)
        turning.warn_of_rest()
    text.expect("hidden_act", "silu")
    text.expect("use_sliding_window", False, None)
    text.expect("attention_bias", False)
    kinds = text.take("layer_types", None)
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError(f"{text.where}.layer_types: {kinds!r} is not supported, only 'full_attention' in every layer")
    tied = top.take("tie_word_embeddings", False)
    if inner_tie and nested:
        tied = tied or text.take("tie_word_embeddings", False)
    theta, sections = _rotation(text, interleaved)
    return HubConfig(top, text, vision, tied, theta, sections)


def _rotation(text: HubFields, interleaved: bool) -> tuple[Any, Any]:
    """Base and sections, from rope_scaling and rope_theta or from rope_parameters; the first wins where both are there."""
    scaling, parameters = text.take("rope_scaling", None), text.take("rope_parameters", None)
    name = "rope_parameters" if scaling is None and parameters is not None else "rope_scaling"
    rope = text.part(name)
    for kind in ("type", "rope_type"):
        rope.expect(kind, "default", "mrope")
    rope.expect("mrope_interleaved", interleaved)
    sections = rope.take("mrope_section")
    beside = text.take("rope_theta", None)
    theta = rope.take("rope_theta") if beside is None else rope.take("rope_theta", beside)
    rope.warn_of_rest()
    return theta, tuple(sections) if isinstance(sections, list) else sections


def written_tokens(config: VLMConfig) -> dict[str, Any]:
    """The fields at the top of config.json about ids, as `HubConfig.tokens` reads them."""
    vocab_size: int = config.llm.vocab_size  # type: ignore[attr-defined]
    start, end = config.vision_marks or (None, None)
    written = {"video_token_id": config.video_token_id, **dict(zip(MARK_FIELDS, (start, end), strict=True))}
    # None is only written where leaving the field out would mean an id.
    written = {name: token for name, token in written.items() if token is not None or vocab_size > VIDEO_TOKEN}
    return {"image_token_id": config.image_token_id, **written}


def written_text(config: VLMConfig) -> dict[str, Any]:
    """The fields of the decoder that all these families write alike."""
    llm: Any = config.llm
    known = tuple(token for token in (END_OF_TURN, END_OF_TEXT) if token < llm.vocab_size)
    return {
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.dim,
        "intermediate_size": llm.mlp_dim,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": llm.max_positions,
        "rms_norm_eps": llm.norm_eps,
        "rope_theta": llm.theta,
        "eos_token_id": END_OF_TURN if config.stop_ids == known else list(config.stop_ids),
    }


def written_patches(config: VLMConfig) -> dict[str, Any]:
    """The fields of the tower about patches that all these families write alike."""
    vision, projector = cast(Any, config.vision), cast(PatchMergerConfig, config.projector)
    return {
        "in_channels": vision.in_channels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.frames_per_patch,
        "spatial_merge_size": projector.merge_size,
    }


def refuse_other_parts(config: VLMConfig, *classes: type[Config]) -> None:
    """Refuse a model of other parts than the family's.

    Raises:
        ConfigError: Names the part.
    """
    for part, wanted in zip((config.vision, config.projector, config.llm), classes, strict=True):
        if not isinstance(part, wanted):
            raise ConfigError(
                f"the layout of {config.family} holds a {wanted.__name__}, found a {type(part).__name__}; "
                "set family=None to save in vlkit's own"
            )


def checked(
    written: dict[str, Any], config: VLMConfig, read: Callable[[Mapping[str, Any]], VLMConfig]
) -> dict[str, Any]:
    """What is written, if reading it gives the model back.

    Raises:
        ConfigError: The family's layout cannot express the model; names the parts that differ.
    """
    ours, again = config.to_dict(), read(written).to_dict()
    ours["loss_chunk"] = again["loss_chunk"]  # how a loss is computed is no part of a checkpoint
    if ours != again:
        raise ConfigError(
            f"the layout of {config.family} cannot express {', '.join(k for k in ours if ours[k] != again[k])} of this "
            "model, because the family has fixed what differs; set family=None to save in vlkit's own"
        )
    return written


def family_keys(tower: KeyMap, projector: KeyMap, decoder: KeyMap, *, old: bool) -> KeyMap:
    """Published names of a whole model.

    Args:
        tower: Of the tower alone.
        projector: Of the mergers alone, beside the tower.
        decoder: Of a decoder alone: "model.*" and "lm_head.weight".
        old: visual.* and model.*; otherwise model.visual.* and model.language_model.*.
    """
    visual, text = ("visual.", "model.") if old else ("model.visual.", "model.language_model.")
    stale = (
        f"{visual}rotary_pos_emb.inv_freq",
        f"{text}rotary_emb.inv_freq",
        f"{text}layers.{{layer}}.self_attn.rotary_emb.inv_freq",
    )
    return (
        tower.mounted(theirs=visual, ours="vision.")
        + projector.mounted(theirs=visual, ours="projector.")
        + moved(decoder, "model.", text).mounted(ours="llm.")
        + KeyMap(*(drop(name) for name in stale))
    )


def whole(number: Any) -> Any:
    """3.0 as 3: a ratio of whole numbers is one in config.json."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def moved(keys: KeyMap, before: str, after: str) -> KeyMap:
    """The map in which published names that began with `before` begin with `after`; other names stay."""
    return KeyMap(
        *(
            replace(rule, theirs=Pattern(after + rule.theirs.text.removeprefix(before), rule.theirs.words))
            if rule.theirs.text.startswith(before)
            else rule
            for rule in keys.rules
        )
    )


def composed(
    family: str,
    vision: Config,
    llm: Config,
    tokens: Mapping[str, Any],
    *,
    norm: Literal["layer", "rms"] = "layer",
    merge_size: int = 2,
    ticks_per_second: float | None = None,
    frames_apart: bool = False,
) -> VLMConfig:
    """A tower and a decoder with the merger that joins them, and positions in time, row and column.

    Args:
        family: Name of the Hub layout.
        vision: The tower.
        llm: The decoder.
        tokens: The fields of VLMConfig about ids.
        norm: Of the merger.
        merge_size: Side of the block of patches that becomes one token.
        ticks_per_second: Positions that a second of video takes; None means one per time step.
        frames_apart: Whether text stands between the time steps of a video.
    """
    tower, decoder = cast(Any, vision), cast(Any, llm)
    projector = PatchMergerConfig(
        in_dim=tower.out_dim,
        out_dim=decoder.dim,
        merge_size=merge_size,
        norm=norm,
        num_levels=getattr(tower, "num_levels", 1),
    )
    return VLMConfig(
        vision=vision,
        projector=projector,
        llm=llm,
        positions="grid",
        ticks_per_second=ticks_per_second,
        hub_inputs=HubInputs(patch_blocks=projector.merge_size, video_frames_apart=frames_apart),
        family=family,
        **tokens,
    )


PUBLISHED_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_marks": VISION_MARKS,
    "stop_ids": (END_OF_TURN, END_OF_TEXT),
}
"""The fields of VLMConfig about ids, for the published vocabulary."""


def byte_tokens() -> dict[str, Any]:
    """The same for the built-in byte tokenizer."""
    special = ByteTokenizer().special
    return {
        "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "vision_marks": (special["<|vision_start|>"], special["<|vision_end|>"]),
        "stop_ids": (special["<|im_end|>"], special["<|endoftext|>"]),
    }


def published_spec(
    config: VLMConfig, repo_id: str, processor: ProcessorConfig, num_parameters: int, active: int | None = None
) -> ModelSpec:
    """A published model."""
    return ModelSpec(config, processor, num_parameters, active or num_parameters, Checkpoint(repo_id))


def tiny_spec(
    config: VLMConfig, processor: ProcessorConfig, num_parameters: int, active: int | None = None
) -> ModelSpec:
    """A model over bytes, whose images and videos have few tokens."""
    patch_size: int = config.vision.patch_size  # type: ignore[attr-defined]
    token = (processor.image.merge_size * patch_size) ** 2
    limits = {"min_pixels": 4 * token, "max_pixels": 64 * token}
    assert processor.video is not None
    processor = processor.replace(
        tokenizer="bytes",
        image=processor.image.replace(patch_size=patch_size, **limits),
        video=processor.video.replace(**limits),
    )
    return ModelSpec(config, processor, num_parameters, active or num_parameters)
