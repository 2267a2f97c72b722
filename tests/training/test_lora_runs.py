"""Runs that train adapters: resumed, on ranks, with recomputed blocks, with a reference; and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import vlkit
from tests.ranks import all_of, run_ranks
from tests.training.runs import metrics, train_ranks, train_until, until, weights
from tests.training.samples import small_config
from vlkit.training import TrainConfig, load_adapter, merge_lora, train

pytestmark = pytest.mark.slow  # PEFT imports transformers

LORA = {"targets": ["all-linear"], "parts": ["vision", "llm"], "rank": 2, "dropout": 0.1}


def config_of(folder: Path, name: str, **changes: Any) -> TrainConfig:
    values = {"lora": LORA, "steps": 4, "checkpoints": {"keep": 1}, "activation_checkpointing": "selective"}
    return small_config(folder, run=str(folder / name), **{**values, **changes})


def test_stopped_is_not_stopped_on_one_rank_and_two(tmp_path: Path) -> None:
    whole, halves, ranks = (config_of(tmp_path, name) for name in ("whole", "halves", "ranks"))
    train(whole)
    until(halves, 2)
    train(halves)
    assert_close(weights(halves), weights(whole), rtol=0, atol=0)
    assert metrics(halves)[-1]["loss"] == metrics(whole)[-1]["loss"]

    first, second = (config_of(tmp_path, name, lora={**LORA, "dropout": 0.0}) for name in ("one", "two"))
    again = config_of(tmp_path, "again")
    train(first)
    works = [(train_ranks, (second,)), (train_until, (ranks, 2)), (train_ranks, (ranks,)), (train_ranks, (again,))]
    run_ranks(all_of, 2, works)
    assert_close(weights(second), weights(first), rtol=0, atol=1e-4)  # sums of gradients are rounded in another order
    assert_close(weights(ranks), weights(again), rtol=0, atol=0)


def test_the_adapter_beside_the_model_is_what_was_learnt(tmp_path: Path) -> None:
    """On the weights that the run began with it gives the saved model: nothing else has learnt."""
    config = config_of(tmp_path, "run")
    train(config)
    torch.manual_seed(config.seed)
    model = vlkit.create_model("kimi-vl-tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_adapter(model, Path(config.run) / "model" / "adapter")
    merge_lora(model)
    found = weights(config)
    assert_close(dict(model.state_dict()), found, rtol=0, atol=1e-7)
    changed = {name.split(".")[0] for name in found if not torch.equal(found[name], before[name])}
    assert changed == {"vision", "llm"}
    assert torch.equal(found["llm.embedding.weight"], before["llm.embedding.weight"])
    assert vlkit.Processor.from_pretrained(Path(config.run) / "model")
