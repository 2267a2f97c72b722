"""What a family file is made of: specs of its models, and how its checkpoints are written on the Hub. Data only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlkit.hub.keymap import KeyMap
from vlkit.models.vlm import VLMConfig
from vlkit.processing import ProcessorConfig


@dataclass(frozen=True)
class Checkpoint:
    """Published weights on the Hub."""

    repo_id: str
    revision: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """One registered model.

    Attributes:
        config: What it is made of.
        processor: How its images and chats are prepared.
        num_parameters: Parameters in all, tied ones once; counted again by the contract tests.
        num_active_parameters: Parameters that one token uses.
        checkpoint: Where its published weights are; None if there are none.
    """

    config: VLMConfig
    processor: ProcessorConfig
    num_parameters: int
    num_active_parameters: int
    checkpoint: Checkpoint | None = None


def no_other_keys(config: VLMConfig) -> tuple[KeyMap, ...]:
    """The family was published under one set of names."""
    return ()


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints on the Hub.

    Attributes:
        name: What VLMConfig.family says.
        model_types: The values of config.json's model_type that it answers to.
        read_config: From the vendor's config.json to ours.
        write_config: The inverse; raises ConfigError for a model that the layout cannot express.
        keys: The published names of a model's weights against ours; what is written.
        other_keys: Further spellings that are read: older names, another orientation of the experts.
    """

    name: str
    model_types: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], VLMConfig]
    write_config: Callable[[VLMConfig], dict[str, Any]]
    keys: Callable[[VLMConfig], KeyMap]
    other_keys: Callable[[VLMConfig], tuple[KeyMap, ...]] = no_other_keys
