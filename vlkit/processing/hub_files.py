"""The processor of a published checkpoint, from the files of its repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlkit.errors import ConfigError
from vlkit.hub.strict_json import read_json
from vlkit.processing.chat_format import CHAT_FORMATS
from vlkit.processing.image_rule import ImageRule
from vlkit.processing.processor_config import ProcessorConfig

IMAGE_FILE = "preprocessor_config.json"
KEPT_FILES = (IMAGE_FILE, "chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json")
"""What a saved processor writes back, beside the tokenizer's files."""


def processor_config(folder: Path) -> ProcessorConfig:
    """The config of the processor whose Hub files lie in a folder.

    Raises:
        ConfigError: No such file, a malformed one, or one of a family that is not known here.
    """
    path = folder / IMAGE_FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder}: neither processor.json nor {IMAGE_FILE}; a processor is saved beside its model with "
            "processor.save_pretrained(folder)"
        )
    fields = read_json(path)
    if "in_token_limit" in fields:
        return _kimi_vl(fields, path)
    if str(fields.get("image_processor_type", "")).startswith(("Qwen2VLImageProcessor", "Qwen3VLImageProcessor")):
        return _qwen_vl(fields, path)
    raise ConfigError(
        f"{path}: image_processor_type {fields.get('image_processor_type')!r} is not known; make a Processor from a "
        f"ProcessorConfig and load_tokenizer instead"
    )


def _kimi_vl(fields: Mapping[str, Any], path: Path) -> ProcessorConfig:
    """Kimi-VL, arXiv:2504.07491: fields as the repositories of Instruct, Thinking and Thinking-2506 name them.

    Nothing is guessed: the defaults of the published class differ from every published file.
    """
    merge = _field(fields, "merge_kernel_size", path)
    if not isinstance(merge, (list, tuple)) or len(merge) != 2 or merge[0] != merge[1]:
        raise ConfigError(f"{path}: merge_kernel_size must be two equal numbers, found {merge!r}")
    if _field(fields, "pad_input", path) is not True:
        raise ConfigError(
            f"{path}: pad_input is {fields['pad_input']!r}; only true is supported, cropping loses pixels"
        )
    try:
        return ProcessorConfig(
            tokenizer="files",
            chat=CHAT_FORMATS["kimi"],
            image=ImageRule(
                patch_size=_field(fields, "patch_size", path),
                merge_size=merge[0],
                max_patches=_field(fields, "in_token_limit", path),
                max_aspect=None,
                mean=_field(fields, "image_mean", path),
                std=_field(fields, "image_std", path),
            ),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _qwen_vl(fields: Mapping[str, Any], path: Path) -> ProcessorConfig:
    """Qwen2-VL, Qwen2.5-VL (arXiv:2409.12191, arXiv:2502.13923) and Qwen3-VL. The "edges" of newer files are areas in pixels."""
    size = fields.get("size") or {}
    edges = (size.get("shortest_edge"), size.get("longest_edge")) if isinstance(size, Mapping) else (None, None)
    config = read_json(path.parent / "config.json") if (path.parent / "config.json").is_file() else {}
    third = str(config.get("model_type", "")).startswith("qwen3_vl")
    try:
        return ProcessorConfig(
            tokenizer="files",
            chat=CHAT_FORMATS["qwen3-vl" if third else "chatml"],
            image=ImageRule(
                fit="resize",
                patch_size=_field(fields, "patch_size", path),
                merge_size=_field(fields, "merge_size", path),
                max_patches=None,
                min_pixels=edges[0] or _field(fields, "min_pixels", path),
                max_pixels=edges[1] or _field(fields, "max_pixels", path),
                max_side=None,
                mean=_field(fields, "image_mean", path),
                std=_field(fields, "image_std", path),
            ),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _field(fields: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in fields:
        raise ConfigError(f"{path}: no {name!r}")
    return fields[name]
