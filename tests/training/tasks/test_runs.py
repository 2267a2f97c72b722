"""Pairs and rollouts through `train`: resumed to the bit, the same on two ranks, with draws by success and by difficulty."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.training.test_loop import metrics, weights
from vlkit.errors import ConfigError, SampleError
from vlkit.training import TrainConfig, train

DPO = {"kind": "dpo"}
MPO = {"kind": "mpo", "beta": 0.3}
GRPO = {"kind": "grpo", "verifier": "odd", "group": 3, "updates": 2, "max_new_tokens": 4, "kl_weight": 0.05}
MIRROR = {"kind": "mirror-descent", "verifier": "odd", "group": 3, "updates": 2, "max_new_tokens": 4, "tau": 0.5}


def odd(text: str, sample: Mapping[str, Any]) -> float:
    """A reward by which untrained answers differ."""
    return sum(ord(each) % 2 for each in text) / 4


def write(folder: Path, kind: str) -> Path:
    """Seven pairs or questions, three of them about an image."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(7):
        content: list[dict[str, str]] = [{"type": "text", "text": "q" * (1 + index)}]
        if index % 2:
            Image.fromarray(rng.integers(0, 255, (30, 30 + 14 * index, 3), dtype=np.uint8)).save(
                folder / f"{index}.png"
            )
            content.insert(0, {"type": "image", "image": f"{index}.png"})
        sample: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
        if kind in ("dpo", "mpo"):
            for side, text in (("chosen", f"yes {index}"), ("rejected", "no" * (1 + index % 3))):
                sample[side] = [{"role": "assistant", "content": text}]
        else:
            sample |= {"answer": str(index), "difficulty": index / 7}
        lines.append(json.dumps(sample) + "\n")
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(lines))
    return path


def config_of(folder: Path, objective: dict[str, Any], name: str = "run", **changes: Any) -> TrainConfig:
    data = {"files": [str(write(folder, objective["kind"]))], "workers": 0, **changes.pop("data", {})}
    values: dict[str, Any] = {
        "run": str(folder / name),
        "model": {"name": "kimi-vl-tiny"},
        "data": data,
        "objective": objective,
        "steps": 4,
        "batch": 3,
        "micro_batch": 4,
        "optimizer": {"lr": 3e-3},
        "log_every": 1,
    }
    return TrainConfig.from_dict({**values, **changes})


def run(rank: int, config: TrainConfig, until: int | None = None) -> None:
    import os
    import signal

    watched = "  margin " if config.objective["kind"] in ("dpo", "mpo") else "  reward "

    def say(line: str) -> None:
        assert not line.startswith("step ") or watched in line
        if line.startswith(f"step {until}/"):
            os.kill(os.getpid(), signal.SIGTERM)

    train(config, say=say, verifiers={"odd": odd})


def told(config: TrainConfig) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in metrics(config)]


def both_ways(
    folder: Path, objective: dict[str, Any], num_ranks: int, **changes: Any
) -> tuple[TrainConfig, TrainConfig]:
    """Four steps, and two and two."""
    whole, halves = (config_of(folder, objective, f"{name}-{num_ranks}", **changes) for name in ("whole", "halves"))
    for config, until in ((whole, None), (halves, 2), (halves, None)):
        if num_ranks == 1:
            run(0, config, until)
        else:
            run_ranks(run, num_ranks, config, until)
    return whole, halves


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("objective", "changes", "num_ranks"),
    [
        (MPO, {}, 1),
        (GRPO, {"data": {"draws": "prioritised"}}, 1),
        pytest.param(DPO, {"data": {"workers": 2}}, 1, marks=SLOW),
        pytest.param(MIRROR, {"data": {"draws": "curriculum", "workers": 2}}, 1, marks=SLOW),
        pytest.param(MPO, {"data": {"workers": 2}}, 2, marks=SLOW),
        pytest.param(GRPO, {"data": {"draws": "prioritised", "workers": 2}}, 2, marks=SLOW),
        pytest.param(MIRROR, {}, 2, marks=SLOW),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, objective: dict[str, Any], changes: dict[str, Any], num_ranks: int
) -> None:
    whole, halves = both_ways(tmp_path, objective, num_ranks, **changes)
    assert_close(weights(halves), weights(whole), rtol=0, atol=0)
    assert told(halves) == told(whole)
    assert len(told(whole)) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "batch"),
    [(DPO, 3), (MPO, 1), (GRPO, 3), (GRPO, 1), ({**GRPO, "variant": "dapo"}, 3), (MIRROR, 1)],
)
def test_ranks_change_only_the_order_of_sums(tmp_path: Path, objective: dict[str, Any], batch: int) -> None:
    """fp64; with a batch of 1 the second rank has nothing to learn from."""
    one, two = (
        config_of(tmp_path, objective, name, dtype="float64", steps=2, batch=batch, max_skipped_steps=4)
        for name in ("one", "two")
    )
    run(0, one)
    run_ranks(run, 2, two)
    assert_close(weights(two), weights(one), rtol=0, atol=1e-9)
    for ours, theirs in zip(told(two), told(one), strict=True):
        assert set(ours) == set(theirs)
        for name in ("loss", "reward", "accuracy", "reward_shift", "kl", "clip_fraction", "entropy"):
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [3, 1])
def test_pairs_may_be_learnt_by_a_sharded_model(tmp_path: Path, batch: int) -> None:
    """fp64; the reference is sharded too, and a rank without pairs still brings its share of the weights."""
    one, two = (
        config_of(tmp_path, MPO, name, dtype="float64", steps=2, batch=batch, micro_batch=1) for name in ("one", "two")
    )
    run(0, one)
    run_ranks(run, 2, two.replace(ranks=two.ranks.replace(sharding="fsdp")))
    assert_close(weights(two), weights(one), rtol=0, atol=1e-9)


def test_draws_by_success_need_answers_that_are_judged(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs an objective that judges answers"):
        run(0, config_of(tmp_path, DPO, data={"draws": "prioritised"}))


def test_a_verifier_that_is_not_there_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no verifier 'none'; there are exact, number, boxed, odd"):
        run(0, config_of(tmp_path, {**GRPO, "verifier": "none"}))


def test_a_run_whose_answers_are_all_judged_alike_stops_and_says_so(tmp_path: Path) -> None:
    config = config_of(tmp_path, {**GRPO, "kl_weight": 0.0}, steps=9, max_skipped_steps=1)
    with pytest.raises(
        SampleError, match="2 of the last 2 steps, up to step 2, had no prompt whose answers got different"
    ) as it:
        train(config, verifiers={"odd": lambda text, sample: 0.5})
    assert "look at reward and length in the metrics" in str(it.value)
    assert [entry["skipped_steps"] for entry in metrics(config)] == [1, 2]
    assert metrics(config)[-1]["equal_groups"] == 1.0
