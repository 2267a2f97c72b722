"""What is wrong with a later stage ends the run before the first stage begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.samples import small_config
from vlkit.errors import ConfigError, SampleError, VlkitError
from vlkit.training import train

TEXTS = {"dim": 16, "text_dim": 16, "text_layers": 1, "text_heads": 2, "text_mlp_dim": 32}


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        ({"objective": {"kind": "grpo", "verifier": "nope"}}, ConfigError, "there is no verifier 'nope'"),
        ({"data": {"draws": "prioritised"}}, ConfigError, "needs an objective that judges answers"),
        ({"optimizer": {"part_lr": {"visionn": 1e-3}}}, ConfigError, "'visionn' names no parameter"),
        ({"optimizer": {"ns": "nope"}}, ConfigError, "unknown Newton-Schulz preset 'nope'"),
        ({"train": ["visio"]}, ConfigError, "'visio' names no parameter"),
        (
            {"objective": {"kind": "contrast", "pool_heads": 5, **TEXTS}, "micro_batch": None},
            ConfigError,
            "no multiple of pool_heads=5",
        ),
        ({"objective": {"kind": "dpo"}}, SampleError, r"train\.jsonl, line 1: a pair is expected"),
        (
            {"objective": {"kind": "contrast", "pool_heads": 2, **TEXTS}, "micro_batch": None},
            SampleError,
            r"train\.jsonl, line 1: an image and its text",
        ),
    ],
)
def test_a_later_stage_is_refused_before_the_first_step(
    tmp_path: Path, stage: dict[str, Any], error: type[VlkitError], message: str
) -> None:
    stages = [{"name": "first", "steps": 1}, {"name": "second", "steps": 1, **stage}]
    lines: list[str] = []
    with pytest.raises(error, match=f"^stage 'second': .*{message}"):
        train(small_config(tmp_path, steps=1, stages=stages), say=lines.append)
    assert not lines


def test_a_run_without_stages_has_no_state_to_keep(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_state: a run without stages"):
        train(small_config(tmp_path, steps=1, keep_state=True))
