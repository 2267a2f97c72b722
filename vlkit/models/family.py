"""What a family file is made of: specs of its models, and how its checkpoints are written on the Hub. Data only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlkit.errors import ConfigError, UnknownFieldWarning
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


class HubFields:
    """A dictionary of a vendor's config.json, read field by field, so that nothing is overlooked.

    Args:
        values: The dictionary.
        where: How messages call it.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected a JSON object, found {type(values).__name__}")
        self.values, self.where = dict(values), where
        self.seen: set[str] = set()

    def take(self, name: str, *default: Any) -> Any:
        """The field, or the default if one is given.

        Raises:
            ConfigError: The field is missing and has no default: class defaults of other libraries are never filled in.
        """
        self.seen.add(name)
        if name in self.values:
            return self.values[name]
        if default:
            return default[0]
        raise ConfigError(f"{self.where}: missing {name!r}; it has {', '.join(sorted(self.values))}")

    def part(self, name: str) -> HubFields:
        """A nested dictionary."""
        return HubFields(self.take(name), f"{self.where}.{name}")

    def expect(self, name: str, *supported: Any) -> Any:
        """The field if it holds one of the supported values; a missing field counts as the first.

        Raises:
            ConfigError: Another value, which this family's code would silently ignore.
        """
        value = self.take(name, supported[0])
        if value not in supported:
            raise ConfigError(
                f"{self.where}.{name}: {value!r} is not supported, only {' or '.join(map(repr, supported))}"
            )
        return value

    def warn_of_rest(self, *known: str) -> None:
        """Warn once of fields that were neither read nor listed as known to have no effect here."""
        # What transformers writes into every config and what does not change a forward.
        everywhere = {
            "model_type",
            "architectures",
            "torch_dtype",
            "dtype",
            "transformers_version",
            "auto_map",
            "_name_or_path",
        }
        rest = sorted(k for k in set(self.values) - self.seen - set(known) - everywhere if not k.startswith("_"))
        if rest:
            message = f"{self.where}: fields without an effect in vlkit: {', '.join(rest)}"
            warnings.warn(message, UnknownFieldWarning, stacklevel=2)
