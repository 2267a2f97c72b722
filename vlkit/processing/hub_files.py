"""The processor of a published checkpoint, from the files of its repository.

preprocessor_config.json or processor_config.json, video_preprocessor_config.json, config.json --> ProcessorConfig
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlkit.errors import ConfigError
from vlkit.hub.strict_json import read_json
from vlkit.processing.chat_format import CHAT_FORMATS
from vlkit.processing.hub_template import JINJA_FILE, JSON_FILE, TOKENIZER_FILE, with_template
from vlkit.processing.image_rule import ImageRule
from vlkit.processing.processor_config import ProcessorConfig
from vlkit.processing.video_rule import VideoRule

IMAGE_FILE, VIDEO_FILE, JOINT_FILE = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
MODEL_FILE, GENERATION_FILE = "config.json", "generation_config.json"
KEPT_FILES = (
    *(IMAGE_FILE, VIDEO_FILE, JOINT_FILE),
    *(JINJA_FILE, JSON_FILE, "special_tokens_map.json", "added_tokens.json"),
)
"""What a saved processor writes back, beside the tokenizer's files."""
SHARED_FILES = (MODEL_FILE, GENERATION_FILE)
"""What it writes back only where a model has not written its own."""
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_QWEN_TYPES = ("Qwen2VLImageProcessor", "Qwen3VLImageProcessor")


def processor_config(folder: Path) -> ProcessorConfig:
    """The config of the processor whose Hub files lie in a folder.

    Raises:
        ConfigError: No such file, a malformed one, or one of a family that is not known here.
    """
    model = _optional(folder / MODEL_FILE)
    fields, path = _part_file(folder, IMAGE_FILE, "image_processor")
    if path is None:
        if not (model.get("model_type") == "qwen" and "visual" in model):
            raise ConfigError(
                f"{folder}: neither processor.json nor {IMAGE_FILE}; a processor is saved beside its model with "
                "processor.save_pretrained(folder)"
            )
        path = folder / MODEL_FILE
    with _named(path):
        config = _by_family(fields, model, folder)
    return with_template(config.replace(stop_ids=_stop_ids(folder)), folder)


def _by_family(fields: Mapping[str, Any], model: Mapping[str, Any], folder: Path) -> ProcessorConfig:
    model_type = str(model.get("model_type", ""))
    if not fields:
        return _qwen_vl_chat(model)
    if "in_token_limit" in fields:
        return _kimi_vl(fields)
    if model_type.startswith("andesvl"):
        with _named(folder / MODEL_FILE):
            patch_size = _field(_part(model, "vision_config"), "patch_size")
            if type(patch_size) is not int:
                raise ConfigError(f"vision_config: patch_size must be a whole number, found {patch_size!r}")
        return _andesvl(fields, patch_size)
    if str(fields.get("image_processor_type", "")).startswith(_QWEN_TYPES):
        made_for = str(fields.get("processor_class") or _optional(folder / JOINT_FILE).get("processor_class"))
        third = model_type.startswith("qwen3_vl") or made_for.startswith("Qwen3VL")
        config = _qwen(fields, third and _thinks(folder), third)
        video, path = _part_file(folder, VIDEO_FILE, "video_processor")
        with _named(path):
            return config.replace(video=_qwen_video(video, third))
    raise ConfigError(
        f"image_processor_type {fields.get('image_processor_type')!r} is not known; make a Processor from a "
        f"ProcessorConfig and load_tokenizer instead"
    )


@contextmanager
def _named(path: Path | None) -> Iterator[None]:
    """Errors inside begin with the path, unless they name a file already."""
    try:
        yield
    except ConfigError as error:
        if path is None or ".json" in str(error).split(": ")[0]:
            raise
        raise ConfigError(f"{path}: {error}") from error


def _part_file(folder: Path, name: str, part: str) -> tuple[dict[str, Any], Path | None]:
    """The fields of the processor of images or videos, in a file of its own or in the joint one of transformers 5."""
    if (folder / name).is_file():
        return read_json(folder / name), folder / name
    joint = _optional(folder / JOINT_FILE).get(part)
    return (dict(joint), folder / JOINT_FILE) if isinstance(joint, Mapping) else ({}, None)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end an answer by generation_config.json."""
    ends = _optional(folder / GENERATION_FILE).get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if any(type(end) is not int or end < 0 for end in ends):
        raise ConfigError(f"{folder / GENERATION_FILE}: eos_token_id {ends!r} is no token id and no list of them")
    return tuple(ends)


def _thinks(folder: Path) -> bool:
    """Whether the chat template begins every answer with a thought."""
    texts = [folder / name for name in (JINJA_FILE, JSON_FILE, TOKENIZER_FILE)]
    return any(
        r"assistant\n<think>\n'" in path.read_text("utf-8", "replace").replace(r"\\n", r"\n")
        for path in texts
        if path.is_file()
    )


def _kimi_vl(fields: Mapping[str, Any]) -> ProcessorConfig:
    """Kimi-VL, arXiv:2504.07491: fields as the repositories of Instruct, Thinking and Thinking-2506 name them.

    Nothing is guessed: the defaults of the published class differ from every published file.
    """
    merge = _field(fields, "merge_kernel_size")
    if not isinstance(merge, (list, tuple)) or len(merge) != 2 or merge[0] != merge[1]:
        raise ConfigError(f"merge_kernel_size must be two equal numbers, found {merge!r}")
    if _field(fields, "pad_input") is not True:
        raise ConfigError(f"pad_input is {fields['pad_input']!r}; only true is supported, cropping loses pixels")
    return ProcessorConfig(
        tokenizer="files",
        chat=CHAT_FORMATS["kimi"],
        image=ImageRule(
            patch_size=_field(fields, "patch_size"),
            merge_size=merge[0],
            max_patches=_field(fields, "in_token_limit"),
            max_aspect=None,
            mean=_field(fields, "image_mean"),
            std=_field(fields, "image_std"),
        ),
    )


def _andesvl(fields: Mapping[str, Any], patch_size: int) -> ProcessorConfig:
    """AndesVL, arXiv:2510.11496. Of its CLIPImageProcessor only mean and std are used by its own code.

    Sizes are those behind the scores in its report; `ImageRule.replace(fit="letterbox-chat", max_pixels=733**2)` gives those of
    the `chat` method published beside the weights.
    """
    return ProcessorConfig(
        tokenizer="files",
        chat=CHAT_FORMATS["andesvl"],
        image=ImageRule(
            fit="letterbox",
            patch_size=patch_size,
            max_patches=None,
            min_pixels=4 * (2 * patch_size) ** 2,
            max_pixels=1792**2,
            longest=4172,
            max_side=None,
            max_aspect=None,
            mean=_field(fields, "image_mean"),
            std=_field(fields, "image_std"),
        ),
    )


def _qwen_vl_chat(model: Mapping[str, Any]) -> ProcessorConfig:
    """Qwen-VL and Qwen-VL-Chat, arXiv:2308.12966: no file for images, the statistics are CLIP's."""
    visual = _part(model, "visual")
    size, patch_size = _field(visual, "image_size"), _field(visual, "patch_size")
    if type(size) is not int or type(patch_size) is not int or patch_size < 1 or size % patch_size:
        raise ConfigError(f"visual: image_size {size!r} must be a multiple of patch_size {patch_size!r}")
    return ProcessorConfig(
        tokenizer="files",
        chat=CHAT_FORMATS["qwen-vl"],
        image=ImageRule(
            fit="stretch",
            patch_size=patch_size,
            merge_size=1,
            tokens_per_image=visual.get("n_queries", 256),
            max_patches=None,
            max_side=size // patch_size,
            max_aspect=None,
            mean=_CLIP_MEAN,
            std=_CLIP_STD,
        ),
    )


def _qwen(fields: Mapping[str, Any], thinks: bool, third: bool) -> ProcessorConfig:
    """Qwen2-VL, Qwen2.5-VL (arXiv:2409.12191, arXiv:2502.13923) and Qwen3-VL. The "edges" of newer files are areas in pixels."""
    least, most = _areas(fields)
    if least is None or most is None:
        raise ConfigError("no 'min_pixels' and 'max_pixels', and no such areas as size.shortest_edge and longest_edge")
    return ProcessorConfig(
        tokenizer="files",
        chat=CHAT_FORMATS["chatml" if not third else "qwen3-vl-thinking" if thinks else "qwen3-vl"],
        image=ImageRule(
            fit="resize",
            patch_size=_field(fields, "patch_size"),
            merge_size=_field(fields, "merge_size"),
            frames_per_patch=_field(fields, "temporal_patch_size"),
            max_patches=None,
            min_pixels=least,
            max_pixels=most,
            max_side=None,
            mean=_field(fields, "image_mean"),
            std=_field(fields, "image_std"),
            resampler="torch",
        ),
    )


def _qwen_video(fields: Mapping[str, Any], third: bool) -> VideoRule:
    """Sampling and sizes of videos: what the file says, else what the published files of the family say.

    Repositories of Qwen2-VL and Qwen2.5-VL have no such file; the limits are then those of the authors' own reader, 128 to 768
    tokens per frame. `do_sample_frames` is not followed: who gives no rate gets all frames.
    """
    least, most = _areas(fields)
    cap = fields.get("cap_pixels_per_frame") is True
    tokens = fields.get("max_video_tokens")
    shared: dict[str, Any] = {
        "fps": float(fields["fps"]) if isinstance(fields.get("fps"), (int, float)) else 2.0,
        "min_frames": fields.get("min_frames", 4),
        "max_frames": fields.get("max_frames", 768),
    }
    if third:
        return VideoRule(
            spacing="ends",
            multiple=1,
            budget="video",
            min_pixels=4096 if least is None else least,
            max_pixels=25165824 if most is None else most,
            frame_pixels=(tokens or 768) * 32**2 if cap else None,
            **shared,
        )
    return VideoRule(
        min_pixels=128 * 28**2 if least is None else least,
        max_pixels=768 * 28**2 if most is None else most,
        total_pixels=int((tokens or 128_000) * 28**2 * 0.9) if cap else None,
        **shared,
    )


def _areas(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    size = fields.get("size")
    edges = size if isinstance(size, Mapping) else {}
    return (
        edges.get("shortest_edge") or edges.get("min_pixels") or fields.get("min_pixels"),
        edges.get("longest_edge") or edges.get("max_pixels") or fields.get("max_pixels"),
    )


def _part(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = _field(fields, name)
    if not isinstance(part, Mapping):
        raise ConfigError(f"{name} must be an object, found {part!r}")
    return part


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise ConfigError(f"no {name!r}")
    return fields[name]
