"""Pairs in a run: log-probs of packs, the frozen reference, the running threshold, ranks without pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import logsigmoid

from tests.training.tasks.setups import gradients, joined, make_task, model_of, prepared, token_log_probs
from vlkit.errors import ConfigError, SampleError, SequenceTooLongError
from vlkit.packing import Batch
from vlkit.training.order import Draw
from vlkit.training.update import blank_batch


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def samples() -> list[dict[str, Any]]:
    """Three pairs, the second about an image."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (33, 40, 3), dtype=np.uint8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    return [
        {"messages": [{"role": "user", "content": "one"}], "chosen": said("yes"), "rejected": said("no, never")},
        {"messages": [{"role": "user", "content": content}], "chosen": said("a blue cat"), "rejected": said("b")},
        {"messages": [{"role": "user", "content": "two?"}], "chosen": said("22"), "rejected": said("2")},
    ]


@pytest.mark.parametrize("kind", ["dpo", "mpo"])
def test_packs_add_up_to_the_formula(kind: str) -> None:
    """fp64, against the log-probs of each answer alone from its logits."""
    task = make_task({"kind": kind, "beta": 0.3})
    model, frozen = task.setup.model, task.setup.reference()
    (items,), told = task.begin(prepared(task, samples()), 0)
    totals = task.totals(items)
    packs = [items[:2], items[2:]]
    parts = [task.loss(model, pack, joined(pack), totals) for pack in packs]
    found = gradients(model, sum(loss for loss, _ in parts))

    ours = [[each.sum() for each in token_log_probs(model, item.batch)] for item in items]
    theirs = [[each.sum().detach() for each in token_log_probs(frozen, item.batch)] for item in items]
    rewards = [[0.3 * (a - b) for a, b in zip(*pair, strict=True)] for pair in zip(ours, theirs, strict=True)]
    expected = sum(-logsigmoid(chosen - rejected) for chosen, rejected in rewards) / 3
    if kind == "mpo":
        shift = float(torch.stack([each.detach() for pair in rewards for each in pair]).mean())
        assert told["reward_shift"] == pytest.approx(shift, rel=1e-9)
        quality = sum(-logsigmoid(chosen - shift) - logsigmoid(shift - rejected) for chosen, rejected in rewards) / 3
        tokens = sum(len(token_log_probs(model, item.batch)[0]) for item in items)
        expected = 0.8 * expected + 0.2 * quality - sum(chosen for chosen, _ in ours) / tokens
        assert totals["tokens"] == tokens
    assert float(sum(loss.detach() for loss, _ in parts)) == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(found, gradients(model, expected), rtol=1e-9, atol=1e-12)
    figures = {name: float(sum(each[name] for _, each in parts)) / totals[name] for name in parts[0][1]}
    assert figures["accuracy"] == sum(chosen > rejected for chosen, rejected in rewards).item() / 3
    assert figures["margin"] == pytest.approx(sum((a - b).item() for a, b in rewards) / 3, rel=1e-9)
    assert figures["reward_chosen"] == pytest.approx(sum(a.item() for a, _ in rewards) / 3, rel=1e-9)


def test_the_beginning_is_a_tie() -> None:
    task = make_task({"kind": "dpo"}, reference=model_of(0))
    (items,), told = task.begin(prepared(task, samples()), 0)
    loss, figures = task.loss(task.setup.model, items, joined(items), task.totals(items))
    assert told == {}
    assert loss.item() == pytest.approx(np.log(2), rel=1e-12)
    assert (float(figures["accuracy"]), float(figures["margin"])) == (1.5, 0.0)


def test_a_rank_without_pairs_gives_every_parameter_a_gradient_of_zero() -> None:
    task = make_task({"kind": "mpo"})
    updates, told = task.begin([], 0)
    assert (updates, told) == ([[]], {"reward_shift": 0.0})
    assert not any(task.totals([]).values())
    model = task.setup.model
    loss, figures = task.loss(model, [], blank_batch(model), {"pairs": 3.0, "tokens": 9.0})
    found = gradients(model, loss)
    assert (loss.item(), figures) == (0.0, {})
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert not any(grad.any() for grad in found.values())


def test_the_threshold_of_a_task_is_restored() -> None:
    first, second = make_task({"kind": "mpo"}), make_task({"kind": "mpo"})
    items = prepared(first, samples())
    first.begin(items, 0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (
        first.begin(items[:1], 0)[1]
        == second.begin(items[:1], 0)[1]
        != make_task({"kind": "mpo"}).begin(items[:1], 0)[1]
    )


def test_pairs_are_measured_as_they_are_made() -> None:
    task = make_task({"kind": "dpo"})
    for sample, item in zip(samples(), prepared(task, samples()), strict=True):
        assert task.measure(sample, Draw(0, 0)) == (item.num_tokens, item.num_patches)


@pytest.mark.parametrize("rule", [{}, {"turns": "last"}])
def test_of_a_conversation_only_the_last_answer_is_compared(rule: dict[str, Any]) -> None:
    task = make_task({"kind": "dpo"}, data={"files": ["unused"], "labels": rule})
    first = [{"role": "user", "content": "hello"}, *said("old answer"), {"role": "user", "content": "and?"}]
    item = task.prepare({"messages": first, "chosen": said("yes"), "rejected": said("no")}, Draw(0, 0))
    assert item.batch.labels is not None
    sides = item.batch.labels.split(list(item.batch.ids.layout.lengths))
    texts = [task.setup.processor.decode([label for label in side.tolist() if label >= 0]) for side in sides]
    assert [text.strip() for text in texts] == ["yes", "no"]


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(SampleError, match=r"a pair is expected .*, and this is a question"):
        make_task({"kind": "dpo"}).prepare({"messages": [{"role": "user", "content": "?"}], "answer": "1"}, Draw(0, 0))
    with pytest.raises(ConfigError, match=r"set data\.too_long to 'refuse' or 'skip', not to 'cut'"):
        make_task({"kind": "dpo"}, data={"files": ["unused"], "max_tokens": 9, "too_long": "cut"})
    with pytest.raises(ConfigError, match=r"lora\.dropout = 0\.1: this objective compares log-probs"):
        make_task({"kind": "mpo"}, lora={"dropout": 0.1})
    with pytest.raises(ConfigError, match=r"MPOOptions\.weights: all are 0"):
        make_task({"kind": "mpo", "weights": [0, 0, 0]})
    with pytest.raises(ConfigError, match="pairs compare answers"):
        make_task({"kind": "dpo"}, data={"files": ["unused"], "labels": {"on": "all"}})


def test_pairs_that_teach_nothing_are_refused() -> None:
    """Their gradient is 0 but for roundings, which Muon would make full steps of."""
    task = make_task({"kind": "dpo"})
    for text in ("same", ""):
        with pytest.raises(SampleError, match="'chosen' and 'rejected' are the same tokens"):
            task.prepare({**samples()[0], "chosen": said(text), "rejected": said(text)}, Draw(0, 0))
    write = task.writer.batch

    def silent(messages: list[dict[str, Any]], *rest: Any, **options: Any) -> Batch:  # a template without an end
        batch = write(messages, *rest, **options)
        return (
            batch
            if messages[-1]["content"]
            else replace(batch, labels=torch.full((batch.ids.layout.num_tokens,), -100))
        )

    task.writer.batch = silent
    with pytest.raises(SampleError, match="'rejected' has no token that is learnt"):
        task.prepare({**samples()[0], "rejected": said("")}, Draw(0, 0))


def test_a_pair_that_is_too_long_is_not_told_to_be_cut() -> None:
    task = make_task({"kind": "dpo"}, data={"files": ["unused"], "max_tokens": 9})
    with pytest.raises(SequenceTooLongError, match=r"tokens = 9; leave such samples out with data\.too_long = 'skip'"):
        task.measure(samples()[2] | {"chosen": said("far too long")}, Draw(0, 0))
