"""Runs whose steps are packs from several streams: resumed as if never stopped, and the same on any ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.training.samples import small_config, write_samples
from tests.training.test_loop import metrics, train_ranks, until, weights
from vlkit.training import TrainConfig, train


def packed_config(folder: Path, run: str, workers: int = 0, **changes: Any) -> TrainConfig:
    """Steps of three packs, a quarter of their tokens from the second stream, whose image 4 is truncated."""
    streams = []
    for name, count, share in (("short", 13, 0.75), ("long", 11, 0.25)):
        if not (folder / name).exists():
            write_samples(folder / name, count)
            picture = folder / name / "4.png"
            picture.write_bytes(picture.read_bytes()[: -400 if name == "long" else None])
        streams.append({"name": name, "files": [str(folder / name / "train.jsonl")], "share": share})
    data = {"streams": streams, "pack_tokens": 300, "pack_patches": 260, "corrupt": "skip", "workers": workers}
    return small_config(
        folder, **{"run": str(folder / run), "data": data, "packs": 3, "steps": 20, "micro_batch": None, **changes}
    )


def told(config: TrainConfig) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if "per_second" not in key} for entry in metrics(config)]


@pytest.mark.parametrize("steps", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_on_packs_resumes_bit_for_bit_with_another_number_of_threads(tmp_path: Path, steps: int) -> None:
    """10 steps and 10 are 20."""
    whole = packed_config(tmp_path, "whole", steps=steps)
    train(whole)
    halves = packed_config(tmp_path, "halves", workers=2, steps=steps)
    until(halves, steps // 2)
    assert not (Path(halves.run) / "model").exists()
    train(packed_config(tmp_path, "halves", steps=steps))
    assert_close(weights(halves), weights(whole), rtol=0, atol=0)
    assert told(halves) == told(whole)
    last = told(whole)[-1]
    assert last["corrupt_samples"] > 0
    assert 0.5 < last["token_fill"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_learn_from_the_same_packs(tmp_path: Path, num_ranks: int) -> None:
    """Also when they take over in the middle. fp64: sums over ranks are rounded in another order."""
    alone = packed_config(tmp_path, "alone", steps=8, dtype="float64")
    train(alone)
    ranks = packed_config(tmp_path, "ranks", workers=1, steps=8, dtype="float64")
    until(ranks, 4)
    run_ranks(train_ranks, num_ranks, ranks, 0)
    assert_close(weights(ranks), weights(alone), rtol=0, atol=1e-9)
    for ours, theirs in zip(told(ranks), told(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        for name in ("samples", "tokens", "corrupt_samples", "token_fill", "patch_fill", "packs"):
            assert ours[name] == theirs[name], name


@pytest.mark.slow
def test_ranks_resume_bit_for_bit(tmp_path: Path) -> None:
    whole = packed_config(tmp_path, "whole", workers=2)
    run_ranks(train_ranks, 2, whole, 0)
    halves = packed_config(tmp_path, "halves")
    until(halves, 10, num_ranks=2)
    run_ranks(train_ranks, 2, halves, 0)
    assert_close(weights(halves), weights(whole), rtol=0, atol=0)
    assert told(halves) == told(whole)
