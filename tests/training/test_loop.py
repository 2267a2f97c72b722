"""The loop of a run: the same on any ranks, resumed as if never stopped, normalised by supervised tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import vlkit
from tests.ranks import run_ranks
from tests.training.runs import metrics, until, weights
from tests.training.samples import small_config
from vlkit.errors import ConfigError, NonFiniteError, SampleError
from vlkit.models import VisionLanguageModel
from vlkit.training import Result, TrainConfig, stage_models, stage_run, train
from vlkit.training.build import build_model
from vlkit.training.order import order
from vlkit.training.sources import open_source
from vlkit.training.stage_run import seed_all
from vlkit.training.update import blank_batch


def train_ranks(rank: int, config: TrainConfig, steps: int) -> Result:
    return train(config.replace(steps=steps) if steps else config)


def test_a_run_learns_and_its_model_loads(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    result = train(config)
    losses = [entry["loss"] for entry in metrics(config)]
    assert result.steps == 10
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.3
    assert result.model is not None
    processor = vlkit.Processor.from_pretrained(result.model)
    question = processor([{"role": "user", "content": "what is it"}])
    assert len(vlkit.from_pretrained(result.model).generate(question, max_new_tokens=3)[0]) <= 3


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole, halves = small_config(tmp_path), small_config(tmp_path, run=str(tmp_path / "halves"))
    train(whole)
    until(halves, 5)
    assert not (Path(halves.run) / "model").exists()
    lines: list[str] = []
    train(halves, say=lines.append)
    assert any(line.startswith("resumed from") and line.endswith("5 steps are left") for line in lines)
    assert_close(weights(halves), weights(whole), rtol=0, atol=0)
    assert [{**m, "tokens_per_second": 0} for m in metrics(halves)] == [
        {**m, "tokens_per_second": 0} for m in metrics(whole)
    ]


def test_data_prepared_in_threads_changes_nothing(tmp_path: Path) -> None:
    plain, ahead = small_config(tmp_path, steps=3), small_config(tmp_path, steps=3, run=str(tmp_path / "ahead"))
    ahead = ahead.replace(data=ahead.data.replace(workers=2))
    train(plain)
    train(ahead)
    assert_close(weights(ahead), weights(plain), rtol=0, atol=0)


@pytest.mark.parametrize("micro", [{"micro_batch": 1}, {"micro_batch": None}, {"micro_batch_tokens": 70}])
def test_micro_batches_do_not_change_the_step(tmp_path: Path, micro: dict[str, Any]) -> None:
    """fp64: gradients of tokens are summed in another order, largest difference seen 5e-16."""
    whole = small_config(tmp_path, steps=2, dtype="float64", micro_batch=2)
    parts = small_config(tmp_path, steps=2, dtype="float64", run=str(tmp_path / "parts"), **micro)
    train(whole)
    train(parts)
    assert_close(weights(parts), weights(whole), rtol=0, atol=1e-9)


def test_gradients_are_those_of_the_mean_over_all_supervised_tokens(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=1, dtype="float64", micro_batch=2)
    train(config)
    torch.manual_seed(config.seed)
    model = vlkit.create_model("kimi-vl-tiny", dtype=torch.float64)
    processor = vlkit.create_processor("kimi-vl-tiny")
    data = open_source(config.data.files)
    samples = [data[index]["messages"] for index in order(len(data), range(5), seed=config.seed)]
    out = model(processor(samples, labels=True))
    out.loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert metrics(config)[0]["loss"] == pytest.approx(out.loss.item(), rel=1e-9)
    assert metrics(config)[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-6)


def test_a_run_moves_the_bias_of_its_routers(tmp_path: Path) -> None:
    moved, still = small_config(tmp_path, steps=2), small_config(tmp_path, steps=2, run=str(tmp_path / "still"))
    train(moved)
    train(still.replace(balance_rate=0.0))

    def biases(config: TrainConfig) -> list[Tensor]:
        return [value for name, value in weights(config).items() if name.endswith("router.bias")]

    assert biases(moved)
    assert all(float(bias.abs().max()) > 0 for bias in biases(moved))
    assert all(float(bias.sum()) == pytest.approx(0, abs=1e-6) for bias in biases(moved))
    assert all(float(bias.abs().max()) == 0 for bias in biases(still))


def test_a_blank_batch_gives_every_parameter_a_gradient_of_zero() -> None:
    model = vlkit.create_model("kimi-vl-tiny")
    out = model(blank_batch(model))
    assert out.num_targets == 0
    out.loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert not unused
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.grad is not None)


class _Planted:
    """Makes the gradients of chosen steps NaN."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
        gradients = stage_run.StageRun.gradients

        def planted(run: Any, *args: Any) -> Any:
            result = gradients(run, *args)
            if run.progress.step + 1 in steps:
                next(p for p in run.model.parameters() if p.grad is not None).grad.fill_(float("nan"))
            return result

        monkeypatch.setattr(stage_run.StageRun, "gradients", planted)


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, steps=3)
    _Planted(monkeypatch, {3})
    result = train(config)
    assert result.skipped_steps == 1
    monkeypatch.undo()
    shorter = small_config(tmp_path, steps=3, run=str(tmp_path / "shorter"))
    until(shorter, 2)
    saved = Path(shorter.run) / "checkpoints/step-00000002"
    stored = Path(config.run) / "checkpoints/step-00000003"
    for part in ("model", "optimizer"):
        a, b = (load_file(folder / part / "shard-00000-of-00001.safetensors") for folder in (saved, stored))
        counters = {"header.skipped_steps[]", *(name for name in a if name.startswith("param_groups."))}
        assert all(torch.equal(a[name], b[name]) for name in a.keys() - counters)


def test_too_many_skipped_steps_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, max_skipped_steps=2)
    _Planted(monkeypatch, {2, 4, 5, 6, 7})
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .* step 6"):
        train(config)
    assert not (Path(config.run) / "model").exists()


def test_a_step_without_a_supervised_token_changes_nothing_and_too_many_end_the_run(tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "z"}, {"role": "assistant", "content": "yes"}]}) + "\n"
    (tmp_path / "train.jsonl").write_text(good + "{}\n" * 3)
    data = {"files": [str(tmp_path / "train.jsonl")], "shuffle": False, "corrupt": "skip", "workers": 0}
    options = {"data": data, "batch": 1, "schedule": {"decay": 0}}
    one, two = (small_config(tmp_path, steps=n, run=str(tmp_path / str(n)), **options) for n in (1, 2))
    train(one)
    lines: list[str] = []
    result = train(two, say=lines.append)
    assert (result.skipped_steps, result.corrupt_samples) == (1, 1)
    assert lines[-1].startswith("1 of 2 samples were corrupt")
    assert_close(weights(two), weights(one), rtol=0, atol=0)
    with pytest.raises(
        SampleError,
        match=r"3 of the last 3 steps, up to step 4, had no supervised token, .* 3 of their 3 samples were left out: "
        r"one of them is .*train\.jsonl, line \d: 'messages' must be",
    ):
        train(small_config(tmp_path, steps=9, max_skipped_steps=2, **options))
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(SampleError, match="2 of the last 2 steps, up to step 2, had no supervised token"):
        train(small_config(tmp_path, steps=2, run=str(tmp_path / "never"), **options))
    assert not (tmp_path / "never/model").exists()


def test_a_run_looks_at_its_parts_when_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def spoilt(*args: Any, **options: Any) -> Any:
        model = build_model(*args, **options)
        with torch.no_grad():
            model.llm.norm.weight.fill_(float("inf"))
        return model

    monkeypatch.setattr(stage_models, "build_model", spoilt)
    with pytest.raises(NonFiniteError, match=r"llm\.norm gives"):
        train(small_config(tmp_path, check_finite_every=1))


def test_frozen_parts_stay_and_parts_have_rates(tmp_path: Path) -> None:
    options = {"lr": 1e-3, "freeze": ["vision"], "part_lr": {"projector": 1e-4}}
    config = small_config(tmp_path, steps=1, optimizer=options)
    train(config)
    torch.manual_seed(config.seed)
    before = vlkit.create_model("kimi-vl-tiny").state_dict()
    after = weights(config)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"projector", "llm"}


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"kind": "adamw", "lr": 1e-3}},
        {"model": {"vision": "moonvit-tiny", "llm": "qwen3-tiny"}, "activation_checkpointing": "full"},
        {"dtype": "bfloat16", "micro_batch_tokens": 60},
        {"model": {"name": "kimi-vl-tiny", "overrides": {"llm": {"num_layers": 2}}}},
        {"steps": None, "epochs": 0.5},
    ],
)
def test_configs_of_many_kinds_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    result = train(small_config(tmp_path, **{"steps": 2, **changes}))
    assert result.steps == 2
    assert result.loss is not None
    assert 0 < result.loss < 8


def test_a_run_begins_from_the_folder_of_another(tmp_path: Path) -> None:
    first = small_config(tmp_path, steps=2)
    train(first)
    second = small_config(tmp_path, steps=1, run=str(tmp_path / "second"), model={"folder": f"{first.run}/model"})
    train(second)
    assert metrics(second)[0]["loss"] < metrics(first)[0]["loss"]


def test_corrupt_samples_stop_the_run_or_are_counted(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=3)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(SampleError, match="line 14"):
        train(config)
    skipping = config.replace(data=config.data.replace(corrupt="skip"))
    assert train(skipping).corrupt_samples == 1


@pytest.mark.parametrize("max_tokens", [None, 10**6])
def test_a_sample_longer_than_the_positions_of_the_decoder_is_corrupt(tmp_path: Path, max_tokens: int | None) -> None:
    config = small_config(tmp_path, steps=3)
    messages = [{"role": "user", "content": "x" * 5000}, {"role": "assistant", "content": "y"}]
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(json.dumps({"messages": messages}) + "\n")
    config = config.replace(data=config.data.replace(max_tokens=max_tokens))
    with pytest.raises(SampleError, match=r"line 14: \d+ tokens, more than the 4096 positions of the decoder"):
        train(config)
    skipping = config.replace(data=config.data.replace(corrupt="skip"))
    assert train(skipping).corrupt_samples == 1


def test_a_folder_with_checkpoints_is_not_begun_anew(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=1)
    train(config)
    with pytest.raises(ConfigError, match="has checkpoints"):
        train(config, resume=False)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=2)
    train(config)
    before = weights(config)
    result = train(config)
    assert result.loss is None
    assert result.steps == 2
    assert_close(weights(config), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"kind": "adamw"}, r'optimizer\.kind: was "muon", is now "adamw"'),
        ({"part_lr": {"vision": 1e-3}}, r'optimizer\.part_lr: was null, is now \{"vision": 0\.001\}'),
        ({"decay_vectors": False}, r"optimizer\.decay_vectors: was true, is now false"),
    ],
)
def test_another_grouping_of_the_optimizer_is_refused(tmp_path: Path, options: dict[str, Any], change: str) -> None:
    train(small_config(tmp_path, steps=1, batch=1))
    with pytest.raises(ConfigError, match=rf"cannot go on with this config: .* \({change}\)\. Set that back"):
        train(small_config(tmp_path, steps=2, batch=1, optimizer={"lr": 3e-3, **options}))


def test_a_run_is_not_made_shorter_than_it_is(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=2)
    train(config)
    (tmp_path / "run/model/config.json").unlink()
    lines: list[str] = []
    with pytest.raises(ConfigError, match=r"step-00000002: 2 steps are done, and the config asks for 1"):
        train(config.replace(steps=1), say=lines.append)
    assert not lines
    assert not (tmp_path / "run/model/config.json").exists()


def test_other_data_or_another_model_is_refused_and_another_rate_is_said(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=2)
    train(config)
    longer = config.replace(steps=3, optimizer=config.optimizer.replace(lr=1e-4))
    deeper = config.model.replace(overrides={"llm": {"num_layers": 3}})
    with pytest.raises(ConfigError, match=r"model\.llm\.num_layers: found 3, expected 2"):
        train(longer.replace(model=deeper))
    others = {
        "seed: found 1, expected 0": {"seed": 1},
        'objective: found "dpo", expected "next-token"': {"objective": {"kind": "dpo"}},
        'draws: found "curriculum", expected "epochs"': {"data": config.data.replace(draws="curriculum")},
        "of steps of samples, these are steps of packs. Give the new run another folder": {
            "batch": None,
            "micro_batch": None,
            "packs": 1,
            "data": config.data.replace(pack_tokens=300),
        },
    }
    for message, changes in others.items():
        with pytest.raises(ConfigError, match=rf"step-00000002: the run cannot go on .*{message}") as refused:
            train(longer.replace(**changes))
        assert refused.value.__notes__ == ["before any step"]
    lines: list[str] = []
    chunked = config.model.replace(overrides={"loss_chunk": 77})  # how a loss is computed is not what a model is
    longer = longer.replace(model=chunked, data=config.data.replace(max_tokens=900, images_first=0.5))
    assert train(longer, say=lines.append).steps == 3
    assert "changed since step-00000002: data.max_tokens: was null, is now 900" in lines
    assert "changed since step-00000002: data.images_first: was 0.0, is now 0.5" in lines
    assert "changed since step-00000002: steps: was 2, is now 3" in lines
    assert any("optimizer.lr" in line for line in lines)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write((tmp_path / "train.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match=r"data\[0\]\.bytes"):
        train(longer)


def test_every_model_has_a_token_that_is_no_placeholder() -> None:
    for name in vlkit.list_models("*-tiny"):
        model: VisionLanguageModel = vlkit.create_model(name)
        assert model(blank_batch(model)).num_targets == 0


def test_a_run_may_change_its_ranks(tmp_path: Path) -> None:
    """1 -> 2 -> 3 -> 1 ranks; fp64, gradients are summed in another order: largest difference seen 1e-15."""
    whole = small_config(tmp_path, steps=4, dtype="float64", optimizer={"lr": 3e-3, "partition": "matrix"})
    moving = whole.replace(run=str(tmp_path / "moving"))
    train(whole)
    until(moving, 1)
    until(moving.replace(optimizer=moving.optimizer.replace(partition="flat")), 2, num_ranks=2)
    until(moving, 3, num_ranks=3)
    train(moving)
    expected, found = weights(whole), weights(moving)
    assert_close(found, expected, rtol=0, atol=1e-10)
    assert [m["loss"] for m in metrics(moving)] == pytest.approx([m["loss"] for m in metrics(whole)], abs=1e-10)
    assert [m["samples"] for m in metrics(moving)] == [m["samples"] for m in metrics(whole)]


def test_a_run_may_change_how_it_is_sharded(tmp_path: Path) -> None:
    """One process -> FSDP on 2 ranks -> experts spread over 2 -> one process; fp64, largest difference seen 1e-15."""
    whole = small_config(tmp_path, steps=4, dtype="float64")
    moving = whole.replace(run=str(tmp_path / "moving"))
    train(whole)
    until(moving, 1)
    until(moving.replace(ranks=moving.ranks.replace(sharding="fsdp")), 2, num_ranks=2)
    until(moving.replace(ranks=moving.ranks.replace(sharding="fsdp", expert_parallel=2)), 3, num_ranks=2)
    train(moving)
    assert_close(weights(moving), weights(whole), rtol=0, atol=1e-10)


def test_a_sharded_run_saves_its_model(tmp_path: Path) -> None:
    first = small_config(tmp_path, steps=2)
    train(first)
    source = {"folder": f"{first.run}/model"}
    whole = small_config(tmp_path, steps=2, dtype="float64", run=str(tmp_path / "whole"), model=source)
    sharded = whole.replace(run=str(tmp_path / "sharded"), ranks=whole.ranks.replace(sharding="fsdp"))
    train(whole)
    run_ranks(train_ranks, 2, sharded, 0)
    assert_close(weights(sharded), weights(whole), rtol=0, atol=1e-10)
    assert vlkit.Processor.from_pretrained(Path(sharded.run) / "model")


def test_products_may_be_computed_in_another_dtype(tmp_path: Path) -> None:
    narrow = small_config(tmp_path, steps=2, compute_dtype="bfloat16", run=str(tmp_path / "narrow"))
    sharded = narrow.replace(run=str(tmp_path / "sharded"), ranks=narrow.ranks.replace(sharding="fsdp"))
    wide = small_config(tmp_path, steps=2)
    for config in (narrow, wide):
        train(config)
    run_ranks(train_ranks, 2, sharded, 0)
    losses = [metrics(config)[1]["loss"] for config in (wide, narrow, sharded)]
    assert len(set(losses)) == 3
    assert losses == pytest.approx([losses[0]] * 3, abs=0.05)
    assert {value.dtype for value in weights(narrow).values()} == {torch.float32}


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_randomness_follows_from_seed_step_and_rank() -> None:
    seen = set()
    for seed, step, rank in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        seed_all(seed, step, rank)
        first = draws()
        seed_all(seed, step, rank)
        assert draws() == first
        seen.add(first)
    assert len({value for values in seen for value in values}) == 12


def test_a_run_leaves_the_random_states_as_they_were(tmp_path: Path) -> None:
    seed_all(3, 0, 0)
    expected = draws()
    seed_all(3, 0, 0)
    train(small_config(tmp_path, steps=1))
    assert draws() == expected
