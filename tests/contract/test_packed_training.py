"""Training on a pack is training on its samples: loss, every gradient, routing, and what one sample can do to another.

Samples of 0 to 3 images of odd sizes, with the prompt unlabelled, one of them without any label, videos where a family has them.
The families that differ in kind run by default, all others with `-m slow`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

import vlkit
from vlkit.models import VisionLanguageModel
from vlkit.models.factory import build
from vlkit.packing import Batch
from vlkit.registry import model_spec
from vlkit.testing.batches import random_batch
from vlkit.testing.contract import splits

Samples = Sequence[tuple[int, Sequence[tuple[int, ...]]]]
# Text tokens, and each image in (rows, columns), or video in (frames, rows, columns), of blocks that become one token.
IMAGES: Samples = [
    (5, [(1, 3)]),
    (4, []),
    (6, [(2, 3), (1, 1), (3, 1)]),
    (9, [(5, 1), (1, 3)]),
    (1, []),
    (7, [(3, 1)] * 2),
]
VIDEOS: Samples = [(6, [(1, 2), (3, 2, 1)]), (2, [(2, 1, 1)])]
UNLABELLED = 3  # this sample is read but not learnt

KINDS = {
    "kimi-vl-tiny": "experts and latent attention",
    "qwen2.5-vl-tiny": "positions in time, row and column, by the clock; windows in the tower",
    "qwen3-vl-moe-tiny": "features that enter deeper layers; experts",
    "qwen-vl-tiny": "a resampler; no rotary in the tower",
}
FAMILIES = [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in vlkit.list_models("*-tiny")]
EXPERTS = ["kimi-vl-tiny", "qwen3-vl-moe-tiny"]

# What a gradient may differ by, of the largest gradient of the model. Largest seen, all families, three seeds: 2e-15, 8e-7.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
# And of the largest sum of magnitudes that the samples' gradients of the tensor itself have: rounding is relative to what is
# added up. Largest seen in fp32: 1.3e-6, where the samples one by one are 1.4e-6 away from their gradients in fp64.
OWN_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}


@cache
def model_of(name: str, dtype: torch.dtype) -> VisionLanguageModel:
    torch.manual_seed(0)
    return build(model_spec(name).config, dtype=dtype)


def samples_of(model: VisionLanguageModel) -> Samples:
    return IMAGES if model.config.video_token_id is None else [*IMAGES, *VIDEOS]


def pack_of(model: VisionLanguageModel, *, seed: int = 0) -> Batch:
    """All samples in one pack; the first third of each is its prompt."""
    batch = random_batch(model, samples_of(model), seed=seed)
    assert batch.labels is not None
    labels = batch.labels.clone()
    for item, (start, length) in enumerate(zip(batch.ids.layout.offsets, batch.ids.layout.lengths, strict=False)):
        labels[start : start + (length if item == UNLABELLED else length // 3)] = -100
    return replace(batch, labels=labels)


def gradients(model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss, and its gradients."""
    out = model(batch)
    assert out.loss is not None
    loss = out.loss * out.num_targets
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pack_teaches_what_its_samples_teach(name: str, dtype: torch.dtype) -> None:
    """Loss and the gradient of every parameter."""
    model = model_of(name, dtype)
    pack = pack_of(model)
    loss, together = gradients(model, pack)
    alone = [gradients(model, sample) for sample in splits(pack, samples_of(model))]
    summed = torch.stack([part for part, _ in alone]).sum()
    assert float(summed) > 1
    assert abs(float(loss / summed) - 1) <= TOLERANCE[dtype]

    scales = {n: float(torch.stack([grads[n].abs() for _, grads in alone]).sum(0).max()) for n in together}
    largest = max(scales.values())
    for parameter, ours in together.items():
        theirs = torch.stack([grads[parameter] for _, grads in alone]).sum(0)
        found = float((ours - theirs).abs().max())
        assert found <= TOLERANCE[dtype] * largest, f"{parameter}: {found / largest:.1e} of the largest gradient"
        # A key's bias shifts all scores of a query alike unless keys are rotated: its gradient is rounding and nothing else.
        own = scales[parameter] if scales[parameter] > 1e-5 * largest else largest
        assert found <= OWN_TOLERANCE[dtype] * own, f"{parameter}: {found / own:.1e} of its own gradient"


def changed(model: VisionLanguageModel, pack: Batch, item: int) -> Batch:
    """The pack with other text and other pixels in one sample."""
    other = pack_of(model, seed=1)
    assert pack.patches is not None
    assert other.patches is not None
    ids, patches = pack.ids.tokens.clone(), pack.patches.tokens.clone()
    start, end = pack.ids.layout.offsets[item : item + 2]
    ids[start:end] = other.ids.tokens[start:end]
    samples = samples_of(model)
    first = sum(len(images) for _, images in samples[:item])
    start, end = (pack.patches.layout.offsets[i] for i in (first, first + len(samples[item][1])))
    patches[start:end] = other.patches.tokens[start:end]
    return replace(pack, ids=pack.ids.with_tokens(ids), patches=pack.patches.with_tokens(patches))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_changes_no_bit_of_what_another_teaches(name: str) -> None:
    """Text and pixels of one sample against logits of the others, and against the gradient of the others' loss."""
    model = model_of(name, torch.float32)
    pack = pack_of(model)
    assert pack.labels is not None
    last = len(samples_of(model)) - 1
    for item in (0, 2, last):
        start, end = pack.ids.layout.offsets[item : item + 2]
        labels = pack.labels.clone()
        labels[start:end] = -100
        others = replace(pack, labels=labels)
        after = changed(model, others, item)
        for index, (a, b) in enumerate(zip(model(others).unpack(), model(after).unpack(), strict=True)):
            assert torch.equal(a, b) == (index != item), f"sample {item} and logits of sample {index}"
        (loss, want), (again, found) = gradients(model, others), gradients(model, after)
        assert torch.equal(loss, again)
        leaks = [parameter for parameter in want if not torch.equal(want[parameter], found[parameter])]
        assert not leaks, f"sample {item} changes what the others teach {leaks}"


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_images_of_equal_size_are_told_apart(name: str) -> None:
    """Swapped inside a sample they change that sample; swapped between two samples they change these two; nothing else."""
    model = model_of(name, torch.float32)
    pack = pack_of(model)
    assert pack.patches is not None
    owners = [sample for sample, (_, images) in enumerate(samples_of(model)) for _ in images]
    before = model(pack).unpack()
    grids = pack.patches.layout.grids or ()
    for first, second in ((6, 7), (0, 5)):
        assert grids[first] == grids[second]
        images = list(pack.patches.unpack())
        images[first], images[second] = images[second], images[first]
        after = model(replace(pack, patches=pack.patches.with_tokens(torch.cat(images)))).unpack()
        different = {sample for sample, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)}
        assert different == {owners[first], owners[second]}


@pytest.mark.parametrize("name", EXPERTS)
@torch.no_grad()
def test_a_token_keeps_its_experts_in_a_pack(name: str) -> None:
    """The same experts, the same weights, no token left out: an expert takes as many as choose it."""
    model = model_of(name, torch.float64)
    pack = pack_of(model)
    together = model(pack)
    alone = [model(sample) for sample in splits(pack, samples_of(model))]
    assert together.routing
    for layer, routing in enumerate(together.routing):
        experts = torch.cat([out.routing[layer].experts for out in alone])
        weights = torch.cat([out.routing[layer].weights for out in alone])
        assert torch.equal(routing.experts, experts)
        assert float((routing.weights - weights).abs().max()) <= TOLERANCE[torch.float64]
    load = torch.stack([out.expert_load for out in alone]).sum(0)
    assert torch.equal(together.expert_load, load)
    assert torch.equal(
        load.sum(1), torch.full_like(load[:, 0], len(pack.ids.tokens) * together.routing[0].experts.shape[1])
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_begin_anew_in_every_sample(name: str) -> None:
    """Rotary angles do not notice a shift of a whole sample, but lengths beyond what a model was trained on do."""
    model = model_of(name, torch.float64)
    pack = pack_of(model)
    together = model.positions(pack)
    if together is None:
        together = pack.ids.layout.positions().long()
    for (start, ours), sample in zip(
        zip(pack.ids.layout.offsets, together.split(pack.ids.layout.lengths), strict=False),
        splits(pack, samples_of(model)),
        strict=True,
    ):
        alone = model.positions(sample)
        line = sample.ids.layout.positions().long()
        want = alone if alone is not None else line[:, None].expand_as(ours) if ours.ndim == 2 else line
        assert torch.equal(ours, want), f"the sample that begins at token {start}"
