"""The processor of a published checkpoint, from the files of its repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlkit.errors import ConfigError
from vlkit.processing.chat import CHAT_FORMATS
from vlkit.processing.files import read_json
from vlkit.processing.image_rule import ImageRule
from vlkit.processing.processor_config import ProcessorConfig

IMAGE_FILE = "preprocessor_config.json"
FILES = (IMAGE_FILE, "chat_template.jinja", "chat_template.json", "generation_config.json")
"""What a saved processor writes back, beside the tokenizer's files."""


def processor_config(folder: Path) -> ProcessorConfig:
    """The config of the processor whose Hub files lie in a folder.

    Raises:
        ConfigError: No such file, a malformed one, or one of a family that is not known here.
    """
    path = folder / IMAGE_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: neither processor.json nor {IMAGE_FILE}")
    fields = read_json(path)
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    if "in_token_limit" in fields:
        return _kimi_vl(fields, path)
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


def _field(fields: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in fields:
        raise ConfigError(f"{path}: no {name!r}")
    return fields[name]
