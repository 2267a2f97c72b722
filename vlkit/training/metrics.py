"""What a run tells of its steps: one line of JSON each, and event files for TensorBoard where they are asked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlkit.errors import MissingDependencyError

METRICS, EVENTS = "metrics.jsonl", "tensorboard"


class Metrics:
    """Writes the figures of steps into a run's folder.

    Args:
        folder: Of the run.
        tensorboard: Write event files too.

    Raises:
        MissingDependencyError: Event files are asked for, and the package that writes them is not there.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self.path, self._folder = folder / METRICS, folder / EVENTS
        self._writer: Any = None
        self._events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingDependencyError(
                    "tensorboard = true needs the package tensorboard: pip install 'vlkit[viz]'"
                ) from error
            self._writer = SummaryWriter

    def write(self, values: Mapping[str, Any]) -> None:
        """Add a line; numbers that are not finite become null."""
        finite = {key: _finite(value) for key, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")
        if (
            self._writer is not None and self._events is None
        ):  # what a run that was killed said of steps to come is void
            self._events = self._writer(str(self._folder), purge_step=finite["step"])
        if self._events is not None:
            for name, number in _numbers(finite):
                if name != "step":
                    self._events.add_scalar(name, number, finite["step"])
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines, but for one that a killed process half wrote."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
    return found


def trim_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again."""
    if not path.exists():
        return
    kept = [values for values in read_metrics(path) if values["step"] <= step]
    hidden = path.with_name(f".{path.name}.partial")
    hidden.write_text("".join(json.dumps(values) + "\n" for values in kept), encoding="utf-8")
    os.replace(hidden, path)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def _numbers(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Every number under its path; of a list, which has one entry per layer, the largest."""
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{name}/")
        elif isinstance(value, list):
            numbers = [each for each in value if isinstance(each, int | float)]
            if numbers:
                yield name, max(numbers)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
