"""An update: what happens to ranks with nothing to do, samples with nothing to learn, and gradients that are not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import vlkit
from tests.ranks import run_ranks
from tests.training.runs import metrics, weights
from tests.training.samples import small_config, write_samples
from vlkit.errors import RankError
from vlkit.models import VisionLanguageModel
from vlkit.packing import Batch
from vlkit.training import Result, TrainConfig, stage_run, train
from vlkit.training.ranks import Ranks
from vlkit.training.tasks.next_token import NextToken, NextTokenOptions
from vlkit.training.tasks.task import Item, Setup
from vlkit.training.update import all_totals, backward, blank_batch

ALONE = Ranks(0, 1, torch.device("cpu"))


def task_of(model: VisionLanguageModel, **options: Any) -> NextToken:
    config = TrainConfig.from_dict(
        {"run": "r", "model": {"name": "kimi-vl-tiny"}, "data": {"files": ["f"]}, "steps": 1}
    )
    processor = vlkit.create_processor("kimi-vl-tiny")
    return NextToken(NextTokenOptions(**options), Setup(model, processor, config, ALONE, lambda: model))


def item(task: NextToken, answer: str, *, taught: bool = True) -> Item:
    """Of an answer; one that is not taught is what a cut before the answer leaves."""
    batch = task.writer.batch([{"role": "user", "content": "z"}, {"role": "assistant", "content": answer}])
    return Item(batch if taught else Batch(batch.ids, labels=torch.full_like(batch.ids.tokens, -100)))


def test_blank_forwards_add_nothing() -> None:
    """Those of a rank with fewer packs than another: gradients are as without, and every parameter has one."""
    from contextlib import nullcontext

    model = vlkit.create_model("kimi-vl-tiny", dtype=torch.float64)
    task = task_of(model, sequence_balance=0.1, router_z_loss=0.1)
    packs = [[item(task, "one"), item(task, "three four")]]
    found = []
    for forwards in (1, 3):
        totals, needed = all_totals(task, packs, ALONE)
        assert needed == 1
        sums = backward(model, task, packs, totals, ALONE, num_forwards=forwards, around=nullcontext)
        assert all(p.grad is not None for p in model.parameters())
        found.append(({name: p.grad for name, p in model.named_parameters()}, sums.all_figures(ALONE), sums.load))
        model.zero_grad(set_to_none=True)
    assert_close(found[1], found[0], rtol=0, atol=0)


def test_an_empty_answer_still_teaches_its_end_and_no_answer_nothing() -> None:
    model = vlkit.create_model("kimi-vl-tiny")
    task = task_of(model)
    assert task.totals([item(task, "")])["cross_entropy"] > 0
    assert task.totals([item(task, "no", taught=False)]) == {"cross_entropy": 0.0}
    assert task.totals([]) == {"cross_entropy": 0.0}


def test_gradients_and_loss_of_samples_with_nothing_to_learn_are_zero() -> None:
    model = vlkit.create_model("kimi-vl-tiny")
    for options in ({}, {"normalise": "sample"}, {"normalise": "square"}):
        task = task_of(model, **options)
        items = [item(task, "no", taught=False)]
        loss, _ = task.loss(model, items, items[0].batch, {"cross_entropy": 0.0})
        loss.backward()
        assert float(loss.detach()) == 0
        assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in model.parameters())
        model.zero_grad(set_to_none=True)


def test_computed_again_blocks_count_their_experts_once(tmp_path: Path) -> None:
    plain = small_config(tmp_path, steps=1)
    again = plain.replace(run=str(tmp_path / "again"), activation_checkpointing="full")
    train(plain)
    train(again)
    assert metrics(again)[0]["experts"] == metrics(plain)[0]["experts"]
    assert_close(weights(again), weights(plain), rtol=0, atol=0)


def sparse(folder: Path) -> Path:
    """Samples for one per step: some without an image, one with nothing to learn."""
    write_samples(folder)
    lines = (folder / "train.jsonl").read_text().splitlines()
    silent = json.loads(lines[3])
    silent["messages"][-1]["loss"] = False
    lines[1] = json.dumps(silent)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def bad_on_one_rank(rank: int, config: TrainConfig) -> Result:
    """The last rank's gradients of the third step are not finite."""
    gradients = stage_run.StageRun.gradients

    def planted(run: Any, *args: Any) -> Any:
        result = gradients(run, *args)
        if run.progress.step == 2 and run.ranks.rank == run.ranks.size - 1:
            next(p for p in run.trained.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_run.StageRun, "gradients", planted)
        return train(config)


def test_ranks_without_samples_images_or_finite_gradients_agree_with_one_process(tmp_path: Path) -> None:
    """One sample per step: a rank of two has none. Step 2 has nothing to learn, step 3 has NaN on the rank with nothing."""
    config = small_config(
        sparse(tmp_path),
        batch=1,
        steps=5,
        dtype="float64",
        data={"files": [str(tmp_path / "train.jsonl")], "shuffle": False, "workers": 0, "corrupt": "skip"},
    )
    two = config.replace(run=str(tmp_path / "two"))
    alone = bad_on_one_rank(0, config)
    both = run_ranks(bad_on_one_rank, 2, two)
    assert [(result.skipped_steps, result.corrupt_samples) for result in (alone, *both)] == [(2, 1)] * 3
    assert_close(weights(two), weights(config), rtol=0, atol=1e-9)
    for ours, theirs in zip(metrics(two), metrics(config), strict=True):
        assert ours["loss"] == (None if theirs["loss"] is None else pytest.approx(theirs["loss"], rel=1e-12))
        assert ours["tokens"] == theirs["tokens"]


def other_totals(rank: int) -> str:
    model = vlkit.create_model("kimi-vl-tiny")
    task = task_of(model, sequence_balance=0.1 * rank)
    ranks = Ranks(rank, 2, torch.device("cpu"), torch.distributed.group.WORLD)
    with pytest.raises(RankError) as error:
        all_totals(task, [], ranks)
    return str(error.value)


@pytest.mark.slow
def test_tasks_that_count_different_things_are_told() -> None:
    assert "counts balance, cross_entropy here, and other totals" in run_ranks(other_totals, 2)[1]


def test_a_blank_batch_has_no_target() -> None:
    model = vlkit.create_model("kimi-vl-tiny")
    assert model(blank_batch(model)).num_targets == 0
