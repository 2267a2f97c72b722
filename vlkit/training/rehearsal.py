"""What is wrong with a later stage is found before the first one begins.

Stage, model on meta --its task, groups of the optimizer, draws; the first samples measured--> nothing, or an error
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vlkit.errors import ConfigError, SampleError, SequenceTooLongError, VlkitError
from vlkit.models import VisionLanguageModel
from vlkit.processing import Processor
from vlkit.training.build import freeze_parts, make_draws, make_optimizer, with_modules
from vlkit.training.order import Draw
from vlkit.training.ranks import Ranks
from vlkit.training.run_stages import Stage
from vlkit.training.tasks.task import Setup, Task


def rehearse(
    stage: Stage,
    shapes: VisionLanguageModel,
    processor: Processor,
    ranks: Ranks,
    verifiers: Mapping[str, Callable[..., Any]],
) -> None:
    """Make what a stage is made of, without memory for weights, and look at the first sample of every stream.

    Args:
        stage: Which.
        shapes: Its model on meta, for this call alone.
        processor: Of the model.
        ranks: Of the run; nothing is exchanged.
        verifiers: Of the run.

    Raises:
        ConfigError: The stage cannot be run.
        SampleError: The first sample is none of its objective's.
    """
    config = stage.config
    try:
        options, make = config.task
        with torch.device("meta"):
            task = make(options, Setup(shapes, processor, config, ranks, _no_reference, verifiers))
        whole = with_modules(shapes, task.modules, config, ranks)
        freeze_parts(whole, config)
        make_optimizer(whole, config, Ranks(0, 1, ranks.device))
        if config.data.draws != "curriculum":  # which reads every sample
            make_draws(config.data, stage.sources, task, seed=config.seed)
        _look_at_samples(stage, task)
    except (ConfigError, SampleError) as error:
        raise type(error)(f"stage {stage.name!r}: {error}") from error


def _look_at_samples(stage: Stage, task: Task) -> None:
    if stage.config.data.corrupt == "skip":
        return
    for number, source in enumerate(stage.sources):
        sample = source[0]
        try:
            task.measure(sample, Draw(number, 0, seed=stage.config.seed))
        except SequenceTooLongError:  # refused or left out when it is drawn
            continue
        except VlkitError as error:
            raise SampleError(f"{source.where(0)}: {error}") from error


def _no_reference() -> VisionLanguageModel:
    raise AssertionError("a task asks for the model that its stage began with when it begins a step, not before")
