"""The processor of a published checkpoint, from the files of its repository.

preprocessor_config.json or processor_config.json, video_preprocessor_config.json, config.json --> ProcessorConfig
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlkit.errors import ConfigError, UnknownFieldWarning
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
_NO_EFFECT = frozenset(
    # What the published files hold besides, and what transformers writes: names, and defaults that nothing here depends on.
    [
        "auto_map",
        "crop_size",
        "data_format",
        "default_to_square",
        "device",
        "disable_grouping",
        "do_center_crop",
        "do_pad",
        "do_sample_frames",
        "feature_extractor_type",
        "hidden_stride",
        "image_processor_type",
        "input_data_format",
        "num_pooled_tokens",
        "pad_size",
        "padding",
        "processor_class",
        "return_metadata",
        "return_tensors",
        "transformers_version",
        "video_metadata",
        "video_processor_type",
        "_processor_class",
        "_valid_processor_keys",
    ]
)
_FOLLOWED = {
    "kimi": "in_token_limit merge_kernel_size pad_input patch_size image_mean image_std",
    "qwen": "size patch_size merge_size temporal_patch_size image_mean image_std resample do_resize do_rescale "
    "rescale_factor do_normalize do_convert_rgb",
    "areas": "min_pixels max_pixels",
    "video": "fps min_frames max_frames cap_pixels_per_frame max_video_tokens",
}
_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of them, as the files have them."""
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
        _warn_of_unknown(fields, "kimi")
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
        _warn_of_unknown(fields, "qwen", "areas")
        config = _qwen(fields, third and _thinks(folder), third)
        video, path = _part_file(folder, VIDEO_FILE, "video_processor")
        with _named(path):
            # transformers' class for the videos of Qwen3-VL reads its size alone, every other one lets these two win.
            _warn_of_unknown(video, "qwen", "video", *(() if third else ("areas",)))
            return config.replace(video=_qwen_video(video, third, config.image))
    raise ConfigError(
        f"image_processor_type {fields.get('image_processor_type')!r} is not known; make a Processor from a "
        f"ProcessorConfig and load_tokenizer instead"
    )


def _warn_of_unknown(fields: Mapping[str, Any], *kinds: str) -> None:
    known = _NO_EFFECT.union(*(_FOLLOWED[kind].split() for kind in kinds))
    if unknown := sorted(name for name, value in fields.items() if name not in known and value is not None):
        warnings.warn(
            f"the files of the processor have fields without an effect here: {', '.join(unknown)}",
            UnknownFieldWarning,
            stacklevel=2,
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
    mean, std = _statistics(fields, _field(fields, "image_mean"), _field(fields, "image_std"))
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
            mean=mean,
            std=std,
            resample=_resample(fields),
            resampler="torch",
        ),
    )


def _statistics(fields: Mapping[str, Any], mean: Any, std: Any) -> tuple[Any, Any]:
    """Mean and std of values in 0..1 that do what rescaling and normalising by the fields would.

    Raises:
        ConfigError: A field is no such value.
    """
    factor = _flag(fields, "do_rescale") and fields.get("rescale_factor", 1 / 255)
    factor = 1.0 if factor is False else factor
    if type(factor) not in (int, float) or not factor > 0:
        raise ConfigError(f"rescale_factor must be a number above 0, found {factor!r}")
    if not _flag(fields, "do_normalize"):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    scale = 255 * factor
    if math.isclose(scale, 1, rel_tol=1e-9):
        return mean, std
    try:
        return tuple(float(level) / scale for level in mean), tuple(float(level) / scale for level in std)
    except (TypeError, ValueError):
        raise ConfigError(f"image_mean and image_std must be three numbers each, found {mean!r} and {std!r}") from None


def _resample(fields: Mapping[str, Any]) -> Any:
    """The filter of the resize; refuses files that turn off what always happens here."""
    for name, done in (("do_resize", "images are always resized"), ("do_convert_rgb", "images are always made RGB")):
        if not _flag(fields, name):
            raise ConfigError(
                f"{name} is false; {done} here. Set it to true, or make a Processor from a ProcessorConfig"
            )
    number = fields.get("resample", 3)
    if number not in _FILTERS:
        raise ConfigError(f"resample is {number!r}; known are 1 (lanczos), 2 (bilinear) and 3 (bicubic)")
    return _FILTERS[number]


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, found {value!r}")
    return value is not False


def _qwen_video(fields: Mapping[str, Any], third: bool, image: ImageRule) -> VideoRule:
    """Sampling and sizes of videos: what the file says, else what the published files of the family say.

    Repositories of Qwen2-VL and Qwen2.5-VL have no such file; the limits are then those of the authors' own reader, 128 to 768
    tokens per frame. `do_sample_frames` is not followed: who gives no rate gets all frames.
    """
    least, most = _areas({"size": fields.get("size")} if third else fields)
    if fields:
        given = {
            "patch_size": fields.get("patch_size"),
            "merge_size": fields.get("merge_size"),
            "frames_per_patch": fields.get("temporal_patch_size"),
        }
        for name, value in given.items():
            if value not in (None, getattr(image, name)):
                raise ConfigError(
                    f"{name} is {value!r} for videos and {getattr(image, name)!r} for images; they must agree"
                )
    filter = _resample(fields) if fields else image.resample
    if filter == "lanczos":
        raise ConfigError("resample is 1 (lanczos), which torch, the resampler of this family, has not")
    mean, std = _statistics(fields, fields.get("image_mean") or image.mean, fields.get("image_std") or image.std)
    cap = fields.get("cap_pixels_per_frame") is True
    tokens = fields.get("max_video_tokens")
    shared: dict[str, Any] = {
        "fps": float(fields["fps"]) if isinstance(fields.get("fps"), (int, float)) else 2.0,
        "min_frames": fields.get("min_frames", 4),
        "max_frames": fields.get("max_frames", 768),
        "mean": None if mean in (image.mean, list(image.mean)) else mean,
        "std": None if std in (image.std, list(image.std)) else std,
        "resample": None if filter == image.resample else filter,
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
    """Least and most pixels; fields of that name go before those of the size, as in transformers."""
    size = fields.get("size")
    edges = size if isinstance(size, Mapping) else {}
    return (
        fields.get("min_pixels") or edges.get("shortest_edge") or edges.get("min_pixels"),
        fields.get("max_pixels") or edges.get("longest_edge") or edges.get("max_pixels"),
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
