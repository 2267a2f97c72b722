"""The stages of a run with their data, and how long they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vlkit.processing import Processor
from vlkit.training.build import open_sources
from vlkit.training.config import TrainConfig
from vlkit.training.sources import Source


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
        number: From 0.
        name: Empty in a run without stages.
        config: Of this stage.
        sources: Samples of every stream.
        steps: How many it has.
        before: Steps of the stages before.
    """

    number: int
    name: str
    config: TrainConfig
    sources: tuple[Source, ...]
    steps: int
    before: int


def open_stages(config: TrainConfig, processor: Processor) -> list[Stage]:
    """The stages with their data; files that several of them read are opened once.

    Raises:
        ConfigError: Data that cannot be read.
    """
    stages: list[Stage] = []
    known: dict[Any, Any] = {}
    for number, (name, own) in enumerate(config.resolved_stages()):
        data = own.data
        key: tuple[Any, ...] = data.files, tuple(stream.files for stream in data.streams)
        if data.join_groundings:
            key += own.seed, data.max_tokens, data.labels
        if key not in known:
            known[key] = open_sources(own, processor)
        sources = known[key]
        steps = own.steps or math.ceil((own.epochs or 0) * len(sources[0]) / (own.samples_per_step or 1))
        before = stages[-1].before + stages[-1].steps if stages else 0
        stages.append(Stage(number, name, own, sources, steps, before))
    return stages
