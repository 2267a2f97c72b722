"""Reading the config.json of other libraries so that nothing is overlooked: what is neither read nor known is named."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from vlkit.errors import ConfigError, UnknownFieldWarning


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
