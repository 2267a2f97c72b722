"""Objectives of a run, by their kind: objective = {kind = "next-token", normalise = "square"}."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vlkit.config import Config
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.training.tasks.task import Setup, Task

# kind: (file, class of the options, class of the task)
_HOME = {
    "next-token": ("next_token", "NextTokenOptions", "NextToken"),
    "dpo": ("preference", "DPOOptions", "Preference"),
    "mpo": ("preference", "MPOOptions", "Preference"),
    "grpo": ("policy", "GRPOOptions", "GRPO"),
    "mirror-descent": ("policy", "MirrorDescentOptions", "MirrorDescent"),
    "contrast": ("contrast", "ContrastOptions", "Contrast"),
}


Make = Callable[[Any, "Setup"], "Task"]
"""A class of tasks: Task(options, setup)."""


class _Tasks(Mapping[str, tuple[type[Config], Make]]):
    """Options and task of every kind; a file is imported when its kind is asked for."""

    def __getitem__(self, kind: str) -> tuple[type[Config], Make]:
        file, options, task = _HOME[kind]
        module = importlib.import_module(f"vlkit.training.tasks.{file}")
        return getattr(module, options), getattr(module, task)

    def __iter__(self) -> Iterator[str]:
        return iter(_HOME)

    def __len__(self) -> int:
        return len(_HOME)


TASKS: Mapping[str, tuple[type[Config], Make]] = _Tasks()


def read_objective(values: Any) -> tuple[Config, Make]:
    """The options in an `objective` table, checked, and the task that they are of.

    Raises:
        ConfigError: No table, an unknown kind, or options that it does not have.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"TrainConfig.objective: expected a table with kind, found {values!r}")
    kind = values.get("kind")
    if kind is None:
        raise ConfigError(f"TrainConfig.objective: kind is missing; there are {', '.join(_HOME)}")
    if kind not in _HOME:
        near = difflib.get_close_matches(str(kind), _HOME, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_HOME)}"
        raise ConfigError(f"TrainConfig.objective.kind: there is no {kind!r}; {hint}")
    options, task = TASKS[kind]
    return options.from_dict({key: value for key, value in values.items() if key != "kind"}), task
