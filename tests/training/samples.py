"""A small data set on disk and a config that trains on it, for the tests of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlkit.training import TrainConfig


def write_samples(folder: Path, count: int = 13) -> Path:
    """Conversations of unequal length; every third has no image."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with (folder / "train.jsonl").open("w") as file:
        for index in range(count):
            content: list[dict[str, str]] = [{"type": "text", "text": "what is it" + "?" * index}]
            if index % 3:
                pixels = rng.integers(0, 255, (30 + 14 * (index % 4), 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
                content.insert(0, {"type": "image", "image": f"{index}.png"})
            answer = f"number {index} " * (1 + index % 3)
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder / "train.jsonl"


def small_config(folder: Path, **changes: Any) -> TrainConfig:
    """Ten steps of a small model with experts, on samples that are written if they are not there."""
    lines = folder / "train.jsonl"
    if not lines.exists():
        write_samples(folder)
    values: dict[str, Any] = {
        "run": str(folder / "run"),
        "model": {"name": "kimi-vl-tiny"},
        "data": {"files": [str(lines)], "workers": 0},
        "steps": 10,
        "batch": 5,
        "micro_batch": 2,
        "optimizer": {"lr": 3e-3},
        "checkpoints": {"every": 5},
        "log_every": 1,
        "picture": False,  # matplotlib takes as long as the run
    }
    if "packs" in changes:
        del values["batch"], values["micro_batch"]
    return TrainConfig.from_dict({**values, **changes})
