"""Tasks on a tiny model without a run around them, and the log-probs of answers by separate forwards on full logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

import vlkit
from vlkit.models import VisionLanguageModel
from vlkit.packing import Batch
from vlkit.training.config import TrainConfig
from vlkit.training.order import Draw
from vlkit.training.ranks import Ranks
from vlkit.training.tasks import read_objective
from vlkit.training.tasks.task import Item, Setup

NAME = "kimi-vl-tiny"


@cache
def _weights(seed: int) -> VisionLanguageModel:
    torch.manual_seed(seed)
    return vlkit.create_model(NAME, dtype=torch.float64)


def model_of(seed: int) -> VisionLanguageModel:
    """In fp64, as an own copy."""
    return copy.deepcopy(_weights(seed)).train()


def make_task(
    objective: Mapping[str, Any],
    *,
    model: VisionLanguageModel | None = None,
    reference: VisionLanguageModel | None = None,
    among: Ranks | None = None,
    verifiers: Mapping[str, Callable[..., Any]] | None = None,
    **config: Any,
) -> Any:
    """A task of a policy and a reference with other weights."""
    values = {"run": "unused", "model": {"name": NAME}, "data": {"files": ["unused"]}, "steps": 1, "dtype": "float64"}
    ours, frozen = model or model_of(0), reference or model_of(1)
    frozen.requires_grad_(False)
    options, task = read_objective(objective)
    return task(
        options,
        Setup(
            ours,
            vlkit.create_processor(NAME),
            TrainConfig.from_dict({**values, **config}),
            among or Ranks(0, 1, torch.device("cpu")),
            lambda: frozen,
            verifiers or {},
        ),
    )


def prepared(task: Any, samples: list[dict[str, Any]], progress: float = 0.0) -> list[Item]:
    return [task.prepare(sample, Draw(0, index, progress=progress)) for index, sample in enumerate(samples)]


def joined(items: list[Item]) -> Batch:
    return Batch.concat([item.batch for item in items])


def token_log_probs(model: VisionLanguageModel, batch: Batch, temperature: float = 1.0) -> list[Tensor]:
    """Of the labelled tokens of every sequence, from the logits of all."""
    assert batch.labels is not None
    found = []
    logits = model(batch).unpack()
    for own, labels in zip(logits, batch.labels.split(list(batch.ids.layout.lengths)), strict=True):
        table = (own / temperature).log_softmax(-1)
        rows = [place for place in range(1, len(labels)) if labels[place] != -100]
        found.append(torch.stack([table[place - 1, labels[place]] for place in rows]) if rows else table.new_zeros(0))
    return found


def gradients(model: VisionLanguageModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
