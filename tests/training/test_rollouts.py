"""Answers of a policy: how they end, seeds, the batch that they are learnt from, and rejection sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import vlkit
from vlkit.models import VisionLanguageModel
from vlkit.packing import Batch
from vlkit.testing import random_batch
from vlkit.training.rollouts import answer_batch, answer_seeds, rejection_sample, sample_answers
from vlkit.training.samples import check_sample

NAME = "kimi-vl-tiny"


def planted(monkeypatch: pytest.MonkeyPatch, answers: Sequence[Sequence[int]]) -> None:
    """Make the model say these."""

    def generate(model: VisionLanguageModel, batch: Batch, **options: Any) -> list[list[int]]:
        assert batch.ids.layout.num_items == len(options["seed"]) == len(answers)
        return [list(answer) for answer in answers]

    monkeypatch.setattr(VisionLanguageModel, "generate", generate)


def test_how_answers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = vlkit.create_model(NAME), vlkit.create_processor(NAME)
    stop, image = processor.stop_ids[0], model.config.image_token_id
    a = ord("a")
    planted(monkeypatch, [[a, a, stop], [a, a, a], [a, image, stop], [stop], [image, a, a], [a, a]])
    prompt = processor([{"role": "user", "content": "?"}])
    found = sample_answers(
        model, processor, [prompt, prompt], [[1, 2, 3], [4, 5, 6]], max_new_tokens=3, temperature=1.0
    )
    told = [
        (answer.ids, answer.text, answer.truncated, answer.broken, answer.empty) for each in found for answer in each
    ]
    assert told == [
        ((a, a, stop), "aa", False, False, False),
        ((a, a, a), "aaa", True, False, False),
        ((a,), "a", False, True, False),
        ((stop,), "", False, False, True),
        ((), "", False, True, True),
        ((a, a), "aa", False, False, False),
    ]
    assert sample_answers(model, processor, [], [], max_new_tokens=3, temperature=1.0) == []


def test_the_answer_alone_is_labelled() -> None:
    model = vlkit.create_model(NAME)
    prompt = random_batch(model, [(5, [(1, 2)])], labels=False)
    found = answer_batch(prompt, [7, 8])
    assert found.labels is not None
    assert found.labels.tolist() == [-100] * 7 + [7, 8]
    assert found.ids.tokens.tolist() == [*prompt.ids.tokens.tolist(), 7, 8]
    assert found.patches is prompt.patches
    assert answer_batch(prompt, []).labels.tolist() == [-100] * 7  # type: ignore[union-attr]


def test_answers_depend_on_their_seed_alone_and_leave_the_mode_as_it_was() -> None:
    model, processor = vlkit.create_model(NAME).train(), vlkit.create_processor(NAME)
    prompts = [processor([{"role": "user", "content": text}]) for text in ("one", "and two")]
    seeds = [answer_seeds(11, prompt, 3) for prompt in range(2)]
    assert len({seed for own in seeds for seed in own}) == 6
    together = sample_answers(model, processor, prompts, seeds, max_new_tokens=5, temperature=1.0)
    assert model.training
    apart = [
        sample_answers(model, processor, [prompts[i]], [seeds[i]], max_new_tokens=5, temperature=1.0)[0] for i in (1, 0)
    ]
    assert together == apart[::-1]
    assert len({answer.ids for answer in together[0]}) > 1
    with torch.no_grad():
        assert not torch.is_grad_enabled()


def test_rejection_sampling_keeps_what_verifies_and_stops_there() -> None:
    tries: list[tuple[str, int]] = []
    drawn = {"q": ["wrong", "right", "right", "right too"], "never": ["wrong"] * 4}

    def generate(sample: Any, attempt: int) -> str:
        name = sample["messages"][-1]["content"]
        tries.append((name, attempt))
        return drawn[name][attempt]

    def verify(text: str, sample: Any) -> bool:
        return text.startswith("right")

    samples = [
        {
            "messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": name}],
            "answer": "x",
            "id": 3,
        }
        for name in drawn
    ]
    found = list(rejection_sample(samples, generate, verify, 4, keep=2))
    assert [sample["messages"][-1] for sample in found] == [
        {"role": "assistant", "content": "right"},
        {"role": "assistant", "content": "right too"},
    ]
    assert [check_sample(sample, "here") for sample in found] == ["conversation"] * 2
    assert found[0]["messages"][0] == {"role": "assistant", "content": "hi", "loss": False}
    assert set(found[0]) == {"messages", "id"}
    tries.clear()
    assert len(list(rejection_sample(samples[:1], generate, verify, 4))) == 1
    assert tries == [("q", 0), ("q", 1)]
