"""The decode loop: what it returns, where it stops, and where its positions go on."""

from __future__ import annotations

import pytest
import torch

import vlkit
from vlkit.errors import ConfigError, SequenceTooLongError
from vlkit.packing import Batch, Layout, Packed
from vlkit.testing import random_batch

_IMAGES = [(6, [(2, 3)]), (3, []), (9, [(1, 2), (3, 1)])]
_VIDEO = (8, [(1, 2), (5, 1, 2)])  # an image, and a video of five time steps
WITH_IMAGES = {
    "qwen2-vl-tiny": [*_IMAGES, _VIDEO],
    "qwen2.5-vl-tiny": [*_IMAGES, _VIDEO],
    "qwen3-vl-moe-tiny": _IMAGES,
    "qwen-vl-tiny": _IMAGES,
}


@pytest.fixture(scope="module")
def model() -> vlkit.VisionLanguageModel:
    torch.manual_seed(0)
    return vlkit.create_model("moonvit-qwen3-tiny", dtype=torch.float64)


def greedy_without_cache(
    model: vlkit.VisionLanguageModel, batch: Batch, steps: int, start: int | None = None
) -> list[int]:
    """The definition: run everything again for every token. The model finds positions by itself unless told a start."""
    ids = batch.ids.tokens
    for _ in range(steps):
        layout = Layout((len(ids),))
        positions = None if start is None else torch.arange(start, start + len(ids))
        with torch.no_grad():
            logits = model(
                Batch(Packed(ids, layout), batch.patches, positions=positions, seconds=batch.seconds)
            ).logits.tokens
        ids = torch.cat([ids, logits[-1:].argmax(-1)])
    return ids[-steps:].tolist()


def test_equals_the_definition(model: vlkit.VisionLanguageModel) -> None:
    batch = random_batch(model, [(6, [(2, 1)])], labels=False)
    assert model.generate(batch, max_new_tokens=5, stop=()) == [greedy_without_cache(model, batch, 5)]


@pytest.mark.parametrize("name", ["qwen2-vl-tiny", "qwen2.5-vl-tiny", "qwen3-vl-moe-tiny", "qwen-vl-tiny"])
def test_answers_after_images_are_the_definition(name: str) -> None:
    """Positions in time, row and column, features of inner layers, and prompts of unequal lengths in one batch."""
    torch.manual_seed(0)
    model = vlkit.create_model(name, dtype=torch.float64).eval()
    for parameter in model.llm.parameters():  # so that answers depend on all of it
        torch.nn.init.normal_(parameter, std=0.3)
    parts = [random_batch(model, [sequence], seed=i, labels=False) for i, sequence in enumerate(WITH_IMAGES[name])]
    together = model.generate(Batch.concat(parts), max_new_tokens=5, stop=())
    assert together == [greedy_without_cache(model, part, 5) for part in parts]


def test_given_positions_go_on(model: vlkit.VisionLanguageModel) -> None:
    """Positions that start at 40 continue from there, in the cache too."""
    batch = random_batch(model, [(6, [(2, 1)])], labels=False)
    length = batch.ids.layout.num_tokens
    moved = Batch(batch.ids, batch.patches, positions=torch.arange(40, 40 + length))
    assert model.generate(moved, max_new_tokens=5, stop=()) == [greedy_without_cache(model, batch, 5, start=40)]


def test_stop_id_is_the_last_of_the_answer(model: vlkit.VisionLanguageModel) -> None:
    batch = random_batch(model, [(4, []), (9, [(1, 1)])], labels=False)
    free = model.generate(batch, max_new_tokens=8, stop=())
    stop = free[0][3]
    cut = model.generate(batch, max_new_tokens=8, stop=[stop])
    assert cut[0] == free[0][: free[0].index(stop) + 1]


def test_the_models_own_stop_ids_are_the_default(model: vlkit.VisionLanguageModel) -> None:
    batch = random_batch(model, [(4, [])], labels=False)
    first = model.generate(batch, max_new_tokens=1, stop=())[0][0]
    changed = vlkit.VisionLanguageModel(model.config.replace(stop_ids=(first,))).double()
    changed.load_state_dict(model.state_dict())
    assert changed.generate(batch, max_new_tokens=9) == [[first]]


def test_what_cannot_fit_is_refused_before_work(model: vlkit.VisionLanguageModel) -> None:
    batch = random_batch(model, [(4, [])], labels=False)
    with pytest.raises(SequenceTooLongError, match="4 tokens and 4093 new ones pass the decoder's 4096 positions"):
        model.generate(batch, max_new_tokens=4093)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        model.generate(batch, max_new_tokens=0)


def test_positions_that_cannot_go_on_are_refused(model: vlkit.VisionLanguageModel) -> None:
    batch = random_batch(model, [(4, []), (3, [])], labels=False)
    far = Batch(batch.ids, positions=torch.tensor([0, 1, 2, 3, 4090, 4091, 4092]))
    assert len(model.generate(far, max_new_tokens=3, stop=())[1]) == 3
    with pytest.raises(SequenceTooLongError, match="sequence 1 goes on at position 4093, and 4 new tokens"):
        model.generate(far, max_new_tokens=4)


def test_generation_leaves_no_gradients_and_no_mode(model: vlkit.VisionLanguageModel) -> None:
    model.train()
    model.generate(random_batch(model, [(3, [])], labels=False), max_new_tokens=2)
    assert model.training
    assert torch.is_grad_enabled()
