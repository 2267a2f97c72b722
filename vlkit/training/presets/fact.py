"""What is known of a published training stage, every number with the place that says it, and what is not known.

    Fact(2e-5, "Kimi-VL, arXiv:2504.07491, 'Joint Supervised Fine-tuning (SFT)'")       the value, its source, how sure
    unknown("the shape of the decay is not stated")                                     no value, and why
    Stage("kimi-vl/sft-32k", ..., about={...}, sets={...}).known()                       fields of a TrainConfig

`about` is for people: tokens, data, what a stage begins with. `sets` are fields of the config, by their path with dots.
Nothing is filled in: what sources do not state is unknown here, and a run has to say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlkit.errors import ConfigError

Sure = Literal["read", "summary", "recalled"]
"""How a value is known: read in the paper or the code itself, as a summary of it states it, or from memory."""


@dataclass(frozen=True)
class Fact:
    """A value that somebody published.

    Attributes:
        value: As a config or a person takes it.
        source: Paper and section, or public repository and file.
        sure: How it is known.
        note: How it follows from what the source says, where it is not written there as it stands here.
    """

    value: Any
    source: str
    sure: Sure = "read"
    note: str = ""


@dataclass(frozen=True)
class Unknown:
    """A value that nobody published, or that could not be found."""

    why: str


def unknown(why: str) -> Unknown:
    """A gap, and what is said around it."""
    return Unknown(why)


Facts = Mapping[str, "Fact | Unknown"]


@dataclass(frozen=True)
class Stage:
    """One stage of a published recipe.

    Attributes:
        name: Family and stage, such as "kimi-vl/sft-32k".
        title: What it is, in words.
        about: What a config cannot say: tokens, data, what it begins with.
        sets: Fields of TrainConfig by path. Of paths that exclude each other one is there, or both as "steps|epochs" where
            neither is known.
    """

    name: str
    title: str
    about: Facts = field(default_factory=dict)
    sets: Facts = field(default_factory=dict)

    def known(self) -> dict[str, Any]:
        """The fields of a TrainConfig that sources state, as nested tables."""
        table: dict[str, Any] = {}
        for path, entry in self.sets.items():
            if isinstance(entry, Fact):
                put(table, path, entry.value)
        return table

    def unknown(self) -> dict[str, str]:
        """The fields that a run has to say itself, and why; "steps|epochs" is either."""
        return {path: entry.why for path, entry in self.sets.items() if isinstance(entry, Unknown)}

    def refuse_gaps(self, own: Mapping[str, Any]) -> None:
        """Refuse a stage of a run that takes these values and does not say itself what sources leave open.

        Args:
            own: The fields that the stage says.

        Raises:
            ConfigError: With all that is missing, and why it is not known.
        """
        gaps = [f"  {path.replace('|', ' or ')}: {why}" for path, why in self.unknown().items() if not says(own, path)]
        epochs = self.sets.get("epochs")
        if isinstance(epochs, Fact) and says(own, "packs|data.streams") and not says(own, "steps|epochs"):
            gaps.append(
                f"  steps: sources have epochs = {epochs.value:g}, and how many packs or samples of streams that is, is not "
                "known before they are read; take the data's tokens / those of a step"
            )
        if gaps:
            raise ConfigError(
                f"preset {self.name!r}: its sources leave open what a run has to know; say it in the stage, not at "
                "the top of the run:\n" + "\n".join(gaps)
            )


def put(table: dict[str, Any], path: str, value: Any) -> None:
    """Set a field of nested tables by its path with dots."""
    *parents, last = path.split(".")
    for name in parents:
        table = table.setdefault(name, {})
    table[last] = plain(value)


def says(table: Mapping[str, Any], path: str) -> bool:
    """Whether nested tables have a field, or one of several with | between them."""
    if "|" in path:
        return any(says(table, choice) for choice in path.split("|"))
    here: Any = table
    for name in path.split("."):
        if not isinstance(here, Mapping) or name not in here:
            return False
        here = here[name]
    return here is not None


def plain(value: Any) -> Any:
    """Tuples as lists and mappings as dictionaries of their own, as TOML and JSON have them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
