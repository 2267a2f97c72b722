"""Every example config runs at small size, one after another as a person would run them, and its evaluation gives its figures."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from vlkit.training import Result, TrainConfig, read_train_config, train

ROOT = Path(__file__).parents[2] / "examples"
CONFIGS = {"train", "sft", "contrast", "dpo", "grpo", "mirror_descent"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the configs beside a little data; scripts of the examples can be imported."""
    for path in ROOT.glob("*.toml"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["digits.py", "--small"])
    runpy.run_path(str(ROOT / "digits.py"))
    monkeypatch.syspath_prepend(ROOT / "evaluation")
    return tmp_path


def small(path: Path, **changes: Any) -> TrainConfig:
    """The config with two steps of few samples in every stage."""
    config = read_train_config(path).replace(**changes)
    short = {"steps": 2, "schedule": {}}
    if config.stages:
        return config.replace(stages=tuple({**stage, **short} for stage in config.stages))
    return config.replace(steps=2, schedule=type(config.schedule)())


def metrics(result: Result) -> dict[str, Any]:
    """Of the last step."""
    assert result.model is not None
    assert not result.skipped_steps
    return dict(json.loads((result.model.parent / "metrics.jsonl").read_text().splitlines()[-1]))


def test_there_is_a_test_of_every_config() -> None:
    assert {path.stem for path in ROOT.glob("*.toml")} == CONFIGS


@pytest.mark.slow
def test_reading_from_supervision_to_rewards(folder: Path) -> None:
    """sft, pairs of its own mistakes, dpo, grpo, mirror descent, and readings of all of them."""
    import pairs
    import readings

    done = metrics(train(small(folder / "sft.toml", packs=1, picture=False)))
    assert (done["stage"], done["step"]) == ("all", 4)
    assert 0.5 < done["token_fill"] <= 1
    for part in ("seen", "unseen"):
        assert pairs.write_pairs(folder / "runs/sft/model", folder / "digits" / part) > 0
    few = {"batch": 3, "picture": False}
    assert "margin" in metrics(train(small(folder / "dpo.toml", **few)))
    for name in ("grpo", "mirror_descent"):
        config = small(folder / f"{name}.toml", **few)
        # After so few steps no reading is right, and answers that are all wrong teach nothing.
        config = config.replace(objective={**config.objective, "verifier": "length"})
        assert 0 <= metrics(train(config, verifiers={"length": lambda text, _: len(text) % 7 / 7}))["reward"] <= 1
    for name in ("sft", "dpo", "grpo", "mirror_descent"):
        figures = readings.evaluate(folder / f"runs/{name}/model", folder / "digits/unseen")
        assert set(figures) == {"exact", "drawn", "preferred"}


def test_contrast_and_retrieval(folder: Path) -> None:
    import retrieval

    done = metrics(train(small(folder / "contrast.toml", batch=6, picture=False)))
    assert done["loss"] == pytest.approx(done["contrastive"] + 2 * done["caption"], rel=1e-5)
    figures = retrieval.evaluate(folder / "runs/contrast/model", folder / "digits/unseen")
    assert figures["texts"] == 5
    assert figures["image to text, recall at 5"] == figures["text to image, recall at 5"] == 1
