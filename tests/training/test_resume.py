"""A run that was stopped is the run that was not, bit for bit: in any stage, of any objective, on ranks and with threads."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.training.runs import metrics, weights
from tests.training.samples import small_config
from vlkit.training import TrainConfig, train


def write(folder: Path) -> dict[str, str]:
    """Files of pairs, questions and captions beside the conversations; about half with an image."""
    rng = np.random.default_rng(1)
    lines: dict[str, list[dict[str, Any]]] = {"pairs": [], "questions": [], "captions": []}
    for index in range(6):
        name = f"of-{index}.png"
        Image.fromarray(rng.integers(0, 255, (30, 40 + 14 * (index % 2), 3), dtype=np.uint8)).save(folder / name)
        image = [{"type": "image", "image": name}] if index % 2 else []
        prompt = [{"role": "user", "content": [*image, {"type": "text", "text": "q" * (1 + index)}]}]
        sides = {
            side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "yes"), ("rejected", "no no"))
        }
        lines["pairs"].append({"messages": prompt, **sides})
        lines["questions"].append({"messages": prompt, "answer": str(index), "difficulty": index / 6})
        lines["captions"].append({"image": name, "text": f"picture {index}"})
    for name, samples in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return {name: str(folder / f"{name}.jsonl") for name in lines}


def odd(text: str, sample: Mapping[str, Any]) -> float:
    """A reward by which untrained answers differ."""
    return sum(ord(each) % 2 for each in text) / 4


def all_objectives(folder: Path, name: str, workers: int = 0) -> TrainConfig:
    """Seven stages of two steps."""
    small_config(folder)  # writes the conversations
    files = write(folder)

    def judged(kind: str) -> dict[str, Any]:
        return {"kind": kind, "verifier": "odd", "group": 3, "updates": 2, "max_new_tokens": 3}

    texts = {"dim": 16, "text_dim": 16, "text_layers": 1, "text_heads": 2, "text_mlp_dim": 32, "pool_heads": 2}
    stages = [
        {"name": "samples", "train": ["projector"]},
        {
            "name": "packs",
            "packs": 2,
            "micro_batch": None,
            "keep_state": True,
            "data": {"pack_tokens": 300, "images_first": 0.5},
            "objective": {"kind": "next-token", "normalise": "square", "sequence_balance": 0.01},
        },
        {
            "name": "contrast",
            "micro_batch": None,
            "data": {"files": [files["captions"]]},
            "objective": {"kind": "contrast", **texts},
        },
        {"name": "dpo", "data": {"files": [files["pairs"]]}, "objective": {"kind": "dpo"}},
        {"name": "mpo", "data": {"files": [files["pairs"]]}, "objective": {"kind": "mpo"}},
        {
            "name": "grpo",
            "data": {"files": [files["questions"]], "draws": "prioritised"},
            "objective": {**judged("grpo"), "kl_weight": 0.1},
        },
        {
            "name": "mirror",
            "data": {"files": [files["questions"]], "draws": "curriculum", "curriculum": [0.5, 0.9]},
            "objective": {**judged("mirror-descent"), "tau": 0.5},
        },
    ]
    return small_config(
        folder,
        run=str(folder / name),
        steps=2,
        batch=3,
        stages=stages,
        data={"files": [str(folder / "train.jsonl")], "workers": workers},
        checkpoints={"keep": 1},
    )


def run(rank: int, config: TrainConfig, stops: tuple[int, ...]) -> None:
    """Stopped after some steps, and run again; in the end to the last step."""

    def say(line: str) -> None:
        if any(line.startswith(f"step {step}/") for step in stops):
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(len(stops) + 1):
        train(config, say=say, verifiers={"odd": odd})


def same(ours: TrainConfig, theirs: TrainConfig) -> None:
    assert_close(weights(ours), weights(theirs), rtol=0, atol=0)
    of_speed = {"tokens_per_second": 0}
    assert [{**m, **of_speed} for m in metrics(ours)] == [{**m, **of_speed} for m in metrics(theirs)]


@pytest.mark.slow
def test_all_objectives_resume_at_every_second_step_with_and_without_threads(tmp_path: Path) -> None:
    whole, inside, between = (
        all_objectives(tmp_path, name, workers) for name, workers in (("a", 0), ("b", 2), ("c", 0))
    )
    run(0, whole, ())
    run(0, inside, (1, 3, 5, 7, 9, 11, 13))
    same(inside, whole)
    run(0, between, (2, 6, 10))
    same(between, whole)
    assert [entry["stage"] for entry in metrics(whole)][::2] == [stage["name"] for stage in whole.stages]


@pytest.mark.slow
def test_all_objectives_resume_on_two_ranks(tmp_path: Path) -> None:
    whole, halves = (all_objectives(tmp_path, name, 2) for name in ("a", "b"))
    run_ranks(run, 2, whole, ())
    run_ranks(run, 2, halves, (3, 8, 11))
    same(halves, whole)


@pytest.mark.slow
def test_the_reference_of_a_stage_is_the_model_before_it_and_leaves_no_random_trace(tmp_path: Path) -> None:
    """A stage of DPO behind another one: stopped inside of it, so that the reference is built again."""
    every = all_objectives(tmp_path, "whole")
    chosen = [stage for stage in every.stages if stage["name"] in ("samples", "dpo")]
    whole = every.replace(stages=tuple(chosen))
    halves = whole.replace(run=str(tmp_path / "halves"))
    run(0, whole, ())
    run(0, halves, (3,))
    same(halves, whole)
    assert [entry.get("margin") for entry in metrics(whole)][:3] == [None, None, 0.0]


@pytest.mark.slow
def test_a_stage_of_a_sharded_model_is_compared_with_the_model_before_it(tmp_path: Path) -> None:
    """fp64 and FSDP on two ranks, as on one process."""
    every = all_objectives(tmp_path, "one")
    chosen = [stage for stage in every.stages if stage["name"] in ("samples", "mpo")]
    one = every.replace(stages=tuple(chosen), dtype="float64")
    two = one.replace(run=str(tmp_path / "two"), ranks=one.ranks.replace(sharding="fsdp"))
    run(0, one, ())
    run_ranks(run, 2, two, (3,))
    assert_close(weights(two), weights(one), rtol=0, atol=1e-10)
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-10)
