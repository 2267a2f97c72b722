"""Decoding behind images and videos, in families whose positions count time, rows and columns: the cache knows where to go on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlkit
from vlkit.models import VisionLanguageModel
from vlkit.packing import Batch, Layout, Packed

FAMILIES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe")
# Per sequence: a number is that many tokens of text, the rest are grids (time, rows, columns) in patches.
VIDEO = (5, 4, 4)  # more time steps than merged rows or columns: its time runs ahead of the text around it
SEQUENCES: dict[str, list[list[Any]]] = {
    "image": [[2, (1, 4, 6), 7], [9], [1, (1, 2, 2), 1, (1, 2, 10), 6]],
    "video": [[2, VIDEO, 7], [1, (1, 2, 6), 3, VIDEO, 6], [8]],
}


def model_of(family: str) -> VisionLanguageModel:
    torch.manual_seed(3)
    model = vlkit.create_model(f"{family}-tiny").double().eval()
    with torch.no_grad():  # weights of ordinary size, so that a position that is off by one shows
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5 / parameter.std() / parameter.shape[-1] ** 0.5)
    return model


def batches_of(model: VisionLanguageModel, sequences: list[list[Any]], seed: int = 0) -> list[Batch]:
    """A batch for each sequence, each visual item where its grid stands."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for parts in sequences:
        ids: list[int] = []
        visuals: dict[str, list[Tensor]] = {"image": [], "video": []}
        grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
        for part in parts:
            if isinstance(part, int):
                ids += torch.randint(200, (part,), generator=generator).tolist()
                continue
            kind, (t, h, w) = "image" if part[0] == 1 else "video", part
            token = config.image_token_id if kind == "image" else config.video_token_id
            apart = kind == "video" and config.family.startswith("qwen3")
            for _ in range(t if apart else 1):
                ids += [201, *[token] * ((1 if apart else t) * h * w // 4), 202]
            grids[kind].append(part)
            patches = torch.randn(t * h * w, config.vision.patch_dim, generator=generator, dtype=torch.float64)
            visuals[kind].append(patches)
        tensors: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if grids[kind]:
                tensors |= {pixels: torch.cat(visuals[kind]), f"{kind}_grid_thw": torch.tensor(grids[kind])}
        if grids["video"] and config.ticks_per_second is not None:
            tensors["second_per_grid_ts"] = [1.25] * len(grids["video"])
        batches.append(model.pack(**tensors))
    return batches


def close(found: Tensor, want: Tensor) -> None:
    assert (found - want).abs().max() <= 1e-11 * want.abs().max()  # fp64


@pytest.mark.parametrize("what", SEQUENCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_step_by_step_is_the_full_forward(family: str, what: str) -> None:
    model = model_of(family)
    batch = Batch.concat(batches_of(model, SEQUENCES[what]))
    positions = model.positions(batch)
    steps = 4
    with torch.no_grad():
        want = [logits[-steps - 1 :] for logits in model(batch).unpack()]
        lengths = tuple(length - steps for length in batch.ids.layout.lengths)
        texts = batch.ids.unpack()
        prompts = Packed(torch.cat([text[:-steps] for text in texts]), Layout(lengths))
        cache = model.llm.new_cache(len(texts), 8, dtype=torch.float64)
        prefill = model(replace(batch, ids=prompts), cache=cache).unpack()
        for found, expected in zip(prefill, want, strict=True):
            close(found[-1], expected[0])
        for step in range(steps):
            new = Packed(torch.stack([text[step - steps] for text in texts]), Layout((1,) * len(texts)))
            logits = model(Batch(new), cache=cache).logits.tokens
            for found, expected in zip(logits, want, strict=True):
                close(found, expected[step + 1])
    assert positions is not None
    ends = [int(part.max()) + 1 for part in positions.split(batch.ids.layout.lengths)]
    assert cache.next_positions == ends
    assert cache.next_positions != list(batch.ids.layout.lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_brings_its_own_images_and_videos(family: str) -> None:
    """Visual items in a later forward: their positions go on, and their deep features go to their own tokens."""
    model = model_of(family)
    turns = [[[2, (1, 4, 6), 3], [3, VIDEO, 1]], [[1, VIDEO, 2, (1, 2, 4), 3], [4]]]
    first, second = (batches_of(model, turn, seed) for seed, turn in enumerate(turns))
    pairs = list(zip(first, second, strict=True))
    whole = Batch.concat([turn for pair in pairs for turn in pair])
    lengths = tuple(sum(turn.ids.layout.num_tokens for turn in pair) for pair in pairs)
    whole = replace(whole, ids=Packed(whole.ids.tokens, Layout(lengths)))
    cache = model.llm.new_cache(2, 64, dtype=torch.float64)
    with torch.no_grad():
        want = model(whole).unpack()
        found = zip(*(model(Batch.concat(turn), cache=cache).unpack() for turn in (first, second)), strict=True)
        for parts, expected in zip(found, want, strict=True):
            close(torch.cat(parts), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_together_is_each_alone(family: str) -> None:
    model = model_of(family)
    alone = batches_of(model, SEQUENCES["video"] + SEQUENCES["image"])
    with torch.no_grad():
        for found, batch in zip(model(Batch.concat(alone)).unpack(), alone, strict=True):
            close(found, model(batch).logits.tokens)
