"""How the conversations of a run become batches: measured as they are written, and by every rule of the config."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training.tasks.setups import make_task
from vlkit.errors import SequenceTooLongError
from vlkit.training.order import Draw
from vlkit.training.tasks.task import Item

PAIRS = {"kind": "dpo"}
NEXT = {"kind": "next-token"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Images behind text, of unequal sizes."""
    folder: Path = tmp_path_factory.mktemp("images")
    found = []
    for index, (height, width) in enumerate([(60, 90), (140, 70), (33, 200)]):
        pixels = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        parts = [
            {"type": "text", "text": "look"},
            {"type": "image", "image": str(folder / f"{index}.png")},
            {"type": "text", "text": "and say" + "?" * index},
        ]
        question = {"role": "user", "content": parts}
        found.append({"messages": [question, {"role": "assistant", "content": "seen " * (index + 1)}]})
    return found


def pair(sample: dict[str, Any]) -> dict[str, Any]:
    *prompt, answer = sample["messages"]
    return {"messages": prompt, "chosen": [answer], "rejected": [{"role": "assistant", "content": "no"}]}


def task(objective: dict[str, Any], data: dict[str, Any] | None = None, **config: Any) -> Any:
    return make_task(objective, data={"files": ["unused"], **(data or {})}, **config)


def item(task: Any, sample: dict[str, Any], draw: Draw) -> Item:
    """What is prepared, which is what was measured."""
    cost = task.measure(sample, dataclasses.replace(draw))
    found: Item = task.prepare(sample, dataclasses.replace(draw))
    assert (found.num_tokens, found.num_patches) == cost
    return found


DRAWN = {"resolution": {"points": [[0.0, 6000], [0.5, 20000]], "mode": "sample", "min_pixels": 800}}


def test_what_is_drawn_is_measured_as_it_is_written(samples: list[dict[str, Any]]) -> None:
    """Images to the front for half of the draws, and a size of their own for each."""
    ours, pairs = task(NEXT, {"images_first": 0.5}, **DRAWN), task(PAIRS, {"images_first": 0.5}, **DRAWN)
    patches, fronts = set(), set()
    for epoch in range(8):
        for index, sample in enumerate(samples):
            draw = Draw(0, index, epoch, progress=epoch / 8)
            found = item(ours, sample, draw)
            both = item(pairs, pair(sample), draw)
            assert both.batch.patches is not None
            assert found.batch.patches is not None
            first, second = both.batch.patches.layout.grids or ()
            assert (first,) == (second,) == found.batch.patches.layout.grids, "the sides of a pair see the same"
            patches.add(found.num_patches)
            fronts.add(ours.writer.drawn(sample, dataclasses.replace(draw))[0] is sample)
    assert len(patches) > 4
    assert fronts == {True, False}


def test_small_images_are_drawn_below_their_own_size(samples: list[dict[str, Any]]) -> None:
    """Else one of 5,400 pixels would stay as it is in 3 of 5 draws between 800 and 20,000."""
    ours = task(NEXT, **DRAWN)
    bounds = [ours.writer.drawn(samples[0], Draw(0, 0, epoch, progress=0.9))[1] for epoch in range(40)]
    assert max(bounds) < 60 * 90
    assert min(bounds) < 1000


def test_images_grow_with_the_progress_of_the_stage(samples: list[dict[str, Any]]) -> None:
    ours = task(NEXT, resolution={"points": [[0.0, 2000], [0.5, 20000]]})
    small, large = (item(ours, samples[1], Draw(0, 1, progress=progress)).num_patches for progress in (0.4, 0.6))
    assert small < large
    assert large == item(task(NEXT), samples[1], Draw(0, 1)).num_patches


@pytest.mark.parametrize("objective", [NEXT, PAIRS])
def test_the_rule_of_labels_is_that_of_the_config(samples: list[dict[str, Any]], objective: dict[str, Any]) -> None:
    sample = samples[0] if objective is NEXT else pair(samples[0])

    def learnt(**data: Any) -> int:
        labels = item(task(objective, data), sample, Draw(0, 0)).batch.labels
        assert labels is not None
        return int((labels != -100).sum())

    assert learnt(labels={"special": "answers"}) > learnt()


@pytest.mark.parametrize("objective", [NEXT, PAIRS])
def test_what_is_too_long_is_refused_when_it_is_measured(
    samples: list[dict[str, Any]], objective: dict[str, Any]
) -> None:
    """A side of a pair is a conversation: the limit is not that of both together."""
    sample = samples[0] if objective is NEXT else pair(samples[0])
    whole = item(task(objective), sample, Draw(0, 0))
    longest = whole.batch.ids.layout.max_length
    assert item(task(objective, {"max_tokens": longest}), sample, Draw(0, 0)).num_tokens == whole.num_tokens
    ours = task(objective, {"max_tokens": longest - 1})
    for made in (ours.measure, ours.prepare):
        with pytest.raises(
            SequenceTooLongError, match=rf"{longest} tokens, more than data\.max_tokens = {longest - 1};"
        ):
            made(sample, Draw(0, 0))


def test_the_positions_of_the_decoder_are_a_limit_too(samples: list[dict[str, Any]]) -> None:
    text = {"messages": [{"role": "user", "content": "x" * 100_000}, {"role": "assistant", "content": "y"}]}
    with pytest.raises(SequenceTooLongError, match=r"more than the \d+ positions of the decoder"):
        task(NEXT, {"max_tokens": 200_000}).measure(text, Draw(0, 0))


def test_what_is_too_long_is_cut_and_never_measured_as_less(samples: list[dict[str, Any]]) -> None:
    whole = item(task(NEXT), samples[0], Draw(0, 0))
    for limit in (10, whole.num_tokens - 3, whole.num_tokens):
        ours = task(NEXT, {"max_tokens": limit, "too_long": "cut"})
        found, (tokens, patches) = ours.prepare(samples[0], Draw(0, 0)), ours.measure(samples[0], Draw(0, 0))
        assert found.num_tokens <= tokens == min(limit, whole.num_tokens)
        assert found.num_patches <= patches
        assert found.batch.ids.tokens.tolist() == whole.batch.ids.tokens.tolist()[: found.num_tokens]
