"""next-token: the loss is one formula over all samples of a step, however they are packed and whoever has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import vlkit
from tests.ranks import run_ranks
from tests.training.runs import metrics, weights
from tests.training.samples import small_config
from tests.training.tasks.setups import make_task
from vlkit.errors import SampleError
from vlkit.models import VisionLanguageModel
from vlkit.objectives.balance import sequence_balance_loss
from vlkit.packing import Batch
from vlkit.training import TrainConfig, train
from vlkit.training.order import Draw, order
from vlkit.training.sources import open_source

ALL: dict[str, Any] = {"z_loss": 1e-2, "sequence_balance": 0.1, "router_z_loss": 1e-2}


def config_of(folder: Path, name: str, objective: dict[str, Any], **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "steps": 2,
        "dtype": "float64",
        "micro_batch": None,
        "run": str(folder / name),
        **changes,
    }
    return small_config(folder, objective={"kind": "next-token", **objective}, **options)


def samples_of(config: TrainConfig) -> list[Batch]:
    """Of the first step, each alone."""
    processor = vlkit.create_processor("kimi-vl-tiny")
    data = open_source(config.data.files)
    chosen = order(len(data), range(config.batch), seed=config.seed)
    return [processor(data[index]["messages"], labels=True) for index in chosen]


def alone(model: VisionLanguageModel, batch: Batch) -> tuple[list[float], float, float]:
    """Cross-entropy with its z-loss of every supervised token, balance and z-loss of the routers, by plain means."""
    out = model(batch)
    labels = batch.labels
    assert labels is not None
    logits, targets = out.logits.tokens[:-1].double(), labels[1:]
    found = [
        float(torch.logsumexp(row, 0) - row[target] + ALL["z_loss"] * torch.logsumexp(row, 0) ** 2)
        for row, target in zip(logits, targets, strict=True)
        if target != -100
    ]
    balance = sum(
        float(sequence_balance_loss(routing, batch.ids.layout, coefficient=ALL["sequence_balance"]).sum())
        for routing in out.routing
    )
    router = sum(
        ALL["router_z_loss"] * float(torch.logsumexp(routing.logits, -1).square().sum()) for routing in out.routing
    )
    return found, balance, router


@pytest.mark.parametrize("normalise", ["token", "sample", "square"])
def test_the_loss_is_the_formula_over_samples_alone(tmp_path: Path, normalise: str) -> None:
    """fp64 but for the tokens' weights, which are fp32: 1/x is off by 6e-8 of it."""
    config = config_of(tmp_path, "run", {"normalise": normalise, **ALL}, steps=1)
    train(config)
    torch.manual_seed(config.seed)
    model = vlkit.create_model("kimi-vl-tiny", dtype=torch.float64)
    batches = samples_of(config)
    with torch.no_grad():
        found = [alone(model, batch) for batch in batches]
    weight = {"token": lambda x: 1.0, "sample": lambda x: 1 / x, "square": lambda x: 1 / math.sqrt(x)}[normalise]
    entropy = sum(weight(len(own)) * sum(own) for own, *_ in found) / sum(
        weight(len(own)) * len(own) for own, *_ in found
    )
    balance = sum(each for _, each, _ in found) / len(batches)
    router = sum(each for *_, each in found) / sum(batch.ids.layout.num_tokens for batch in batches)
    (entry,) = metrics(config)
    assert entry["cross_entropy"] == pytest.approx(entropy, rel=1e-7)
    assert (entry["balance"], entry["router_z"]) == pytest.approx((balance, router), rel=1e-9)
    assert entry["loss"] == pytest.approx(entropy + balance + router, rel=1e-7)


@pytest.mark.parametrize("normalise", [pytest.param("sample", marks=pytest.mark.slow), "square"])
def test_packs_do_not_change_the_step(tmp_path: Path, normalise: str) -> None:
    """fp64: gradients are summed in another order, largest difference seen 4e-15."""
    objective = {"normalise": normalise, **ALL}
    one, many = config_of(tmp_path, "one", objective), config_of(tmp_path, "many", objective, micro_batch_tokens=70)
    train(one)
    train(many)
    assert [m["packs"] for m in metrics(one)] == [1, 1]
    assert min(m["packs"] for m in metrics(many)) >= 3
    assert_close(weights(many), weights(one), rtol=0, atol=1e-9)


def train_all(rank: int, configs: list[TrainConfig]) -> None:
    for config in configs:
        train(config)


@pytest.mark.slow
def test_ranks_do_not_change_the_step(tmp_path: Path) -> None:
    """Of three samples two ranks have one and two; three ranks and two samples leave one rank without any."""
    objectives = [{"normalise": normalise, **ALL} for normalise in ("token", "sample", "square")]
    options: dict[str, Any] = {"batch": 3, "micro_batch": 1}
    ones = [config_of(tmp_path, f"one-{i}", objective, **options) for i, objective in enumerate(objectives)]
    twos = [config_of(tmp_path, f"two-{i}", objective, **options) for i, objective in enumerate(objectives)]
    run_ranks(train_all, 2, twos)
    for one, two in zip(ones, twos, strict=True):
        train(one)
        assert_close(weights(two), weights(one), rtol=0, atol=1e-9)
        for ours, theirs in zip(metrics(two), metrics(one), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-12)
            assert ours["experts"] == theirs["experts"]
            assert ours["balance"] == pytest.approx(theirs["balance"], rel=1e-12)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"image": "cat.png", "text": "a cat"}, "this is a caption: choose objective.kind = contrast"),
        ({"messages": [], "chosen": [], "rejected": []}, "this is a pair: choose objective.kind = dpo or mpo"),
    ],
)
def test_what_is_no_conversation_is_refused(sample: dict[str, Any], message: str) -> None:
    task = make_task({"kind": "next-token"}, data={"files": ["unused"], "images_first": 0.5})
    for made in (task.prepare, task.measure):
        with pytest.raises(SampleError, match=message):
            made(sample, Draw(0, 0))
