"""Stages of a run: its config again and again, each time with some fields changed.

    config without its stages, as a table
        <- the known values of the stage's preset        preset = "kimi-vl/sft-32k"
        <- the stage's own fields                        tables are merged, everything else is replaced
        -> a config of its own

What a run is made of once (its folder, model, ranks, seed) cannot change between stages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlkit.errors import ConfigError

OF_THE_RUN = (
    "run",
    "model",
    "dtype",
    "compute_dtype",
    "seed",
    "device",
    "ranks",
    "lora",
    "tensorboard",
    "picture",
    "stages",
)
"""Fields that no stage can change."""
INSTEAD = (("steps", "epochs"), ("batch", "packs"), ("files", "streams"))
"""Fields that replace one another: a stage that gives one does without the other."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Table = Mapping[str, Any]


def merge_stages(config: Table) -> list[tuple[str, dict[str, Any]]]:
    """Name and fields of every stage of a config.

    Raises:
        ConfigError: A stage without a name or with that of another, a field that belongs to the run, an unknown preset.
    """
    base = {key: value for key, value in config.items() if key != "stages"}
    found: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(config["stages"], start=1):
        if not isinstance(stage, Mapping):
            raise ConfigError(f"TrainConfig.stages: stage {number} is no table: {stage!r}")
        own = dict(stage)
        name, preset = own.pop("name", None), own.pop("preset", None)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"TrainConfig.stages: stage {number} needs a name of letters, digits, '.', '_' and '-', found {name!r}"
            )
        if name in found:
            raise ConfigError(f"TrainConfig.stages: two stages are called {name!r}")
        for field in OF_THE_RUN:
            if field in own:
                raise ConfigError(f"stage {name!r}: {field} belongs to the whole run; a stage cannot change it")
        values = base if preset is None else _merged(base, _known(preset, name, own))
        found[name] = _merged(values, own)
    return list(found.items())


def _known(preset: Any, stage: str, own: Table) -> Table:
    """What is known of a published stage, whose gaps the stage of the run has to fill itself."""
    from vlkit.training.presets import preset as find

    if not isinstance(preset, str):
        raise ConfigError(f"stage {stage!r}: preset: expected the name of a preset, found {preset!r}")
    published = find(preset)
    published.refuse_gaps(own)
    return published.known()


def _merged(base: Table, changes: Table) -> dict[str, Any]:
    """The table with some fields changed; tables inside are merged too, but for an objective of another kind."""
    values = dict(base)
    for one, other in (*INSTEAD, *(pair[::-1] for pair in INSTEAD)):
        if changes.get(one) is not None:
            values.pop(other, None)
    for key, value in changes.items():
        before = values.get(key)
        if key == "streams" and before:
            values[key] = _named(before, value)
        elif isinstance(before, Mapping) and isinstance(value, Mapping):
            another = key == "objective" and value.get("kind", before.get("kind")) != before.get("kind")
            values[key] = value if another else _merged(before, value)
        else:
            values[key] = value
    return values


def _named(base: Any, changes: Any) -> Any:
    """Streams of data, each merged with the one of its name."""
    if not all(isinstance(each, Mapping) for streams in (base, changes) for each in streams):
        return changes
    known = {stream.get("name"): stream for stream in base}
    return [_merged(known.get(stream.get("name"), {}), stream) for stream in changes]


def absolute_stages(
    stages: Sequence[Table], absolute: Callable[[Iterable[str]], tuple[str, ...]]
) -> tuple[dict[str, Any], ...]:
    """The stages with the paths of their data made absolute."""
    found = []
    for stage in stages:
        data = dict(stage.get("data", {}))
        if "files" in data:
            data["files"] = absolute(data["files"])
        if "streams" in data:
            data["streams"] = tuple({**stream, "files": absolute(stream["files"])} for stream in data["streams"])
        found.append({**stage, "data": data} if data else dict(stage))
    return tuple(found)
