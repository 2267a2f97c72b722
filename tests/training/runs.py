"""What tests of runs share: a run until a step, and what it left."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from torch import Tensor

import vlkit
from tests.ranks import run_ranks
from vlkit.training import Result, TrainConfig, train


def weights(config: TrainConfig) -> dict[str, Tensor]:
    """Of the model that a run has saved."""
    return dict(vlkit.from_pretrained(Path(config.run) / "model").state_dict())


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]


def until(config: TrainConfig, step: int, num_ranks: int = 1) -> None:
    """Run on some ranks until a step, as a run that is stopped there would; the schedule is that of the whole run."""
    if num_ranks == 1:
        train_until(0, config, step)
    else:
        run_ranks(train_until, num_ranks, config, step)


def train_until(rank: int, config: TrainConfig, step: int) -> Result:
    def say(line: str) -> None:
        if line.startswith(f"step {step}/"):
            os.kill(os.getpid(), signal.SIGTERM)

    return train(config, say=say)


def train_ranks(rank: int, config: TrainConfig) -> Result:
    return train(config)
