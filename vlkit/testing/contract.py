"""The contract: what holds for every model made of registered parts. Each check raises AssertionError with what it found.

Tolerances: fp64 differs by rounding only; fp32 stays within 1e-6 of the largest value seen, the two of them in the same code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlkit.packing import Batch, Layout, Packed
from vlkit.testing.batches import random_batch, random_patches

if TYPE_CHECKING:
    from vlkit.models.family import ModelSpec
    from vlkit.models.vlm import VisionLanguageModel, VLMConfig

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
ODD_SIZES = [(1, 1), (27, 29), (300, 200), (480, 640), (13, 190), (897, 897), (1080, 1920), (2160, 3840), (57, 31)]
Sequences = Sequence[tuple[int, Sequence[tuple[int, ...]]]]
SEQUENCES: Sequences = [(5, [(1, 2)]), (3, []), (1, [(2, 3)]), (7, [(3, 1), (1, 1)]), (1, [])]
VIDEO: Sequences = [(6, [(1, 2), (3, 2, 1)]), (2, [(2, 1, 1)])]


def sequences_of(model: VisionLanguageModel) -> Sequences:
    """What the checks run: images, text alone, and videos where the model has them."""
    return SEQUENCES if model.config.video_token_id is None else [*SEQUENCES, *VIDEO]


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude of the second; equal tensors give 0."""
    assert ours.shape == theirs.shape, f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    if not ours.numel() or torch.equal(ours, theirs):
        return 0.0
    scale = float(theirs.abs().max())
    difference = float((ours - theirs).abs().max())
    assert difference == difference, "NaN"
    return difference / scale if scale else difference


def _assert_close(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    found = relative_difference(ours.detach(), theirs.detach())
    assert found <= tolerance, f"{what}: relative difference {found:.2e}, allowed {tolerance:.0e}"


def config_round_trips(config: VLMConfig) -> None:
    """to_dict gives JSON, and from_dict gives the config back."""
    import json

    text = json.dumps(config.to_dict(), allow_nan=False)
    assert type(config).from_dict(json.loads(text)) == config


def splits(batch: Batch, sequences: Sequences) -> Iterator[Batch]:
    """Each sequence of a `random_batch` as a batch of its own."""
    images = list(zip(batch.patches.unpack(), batch.patches.layout.grids or (), strict=True)) if batch.patches else []
    labels = batch.labels.split(list(batch.ids.layout.lengths)) if batch.labels is not None else None
    seconds = batch.seconds
    taken = 0
    for item, ids in enumerate(batch.ids.unpack()):
        part = images[taken : taken + len(sequences[item][1])]
        own = seconds[taken : taken + len(part)] if seconds is not None and part else None
        taken += len(part)
        yield Batch(
            ids=Packed(ids, Layout((len(ids),))),
            patches=Packed(torch.cat([p for p, _ in part]), Layout.from_grids([g for _, g in part])) if part else None,
            labels=labels[item] if labels is not None else None,
            seconds=own,
        )


def _batch(model: VisionLanguageModel, seed: int = 0) -> Batch:
    return random_batch(model, sequences_of(model), seed=seed)


def _gradients(model: VisionLanguageModel, loss: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    missing = [n for n, g in zip(named, grads, strict=True) if g is None]
    assert not missing, f"no gradient reaches {missing}"
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def packed_equals_alone(model: VisionLanguageModel) -> None:
    """Logits, and gradients of the summed loss, of a pack are those of its sequences one by one."""
    batch = _batch(model)
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    together = model(batch)
    loss = together.loss * together.num_targets
    alone = [model(part) for part in splits(batch, sequences_of(model))]
    for item, (ours, theirs) in enumerate(zip(together.unpack(), alone, strict=True)):
        _assert_close(ours, theirs.logits.tokens, tolerance, f"logits of sequence {item}")
    summed = torch.stack([out.loss * out.num_targets for out in alone]).sum()
    _assert_close(loss, summed, tolerance, "loss")
    ours, theirs = _gradients(model, loss), _gradients(model, summed)
    scale = max(float(g.abs().max()) for g in theirs.values())
    for name, grad in ours.items():
        found = float((grad - theirs[name]).abs().max()) / scale
        assert found <= tolerance, f"gradient of {name}: {found:.2e} of the largest gradient, allowed {tolerance:.0e}"


@torch.no_grad()
def items_are_isolated(model: VisionLanguageModel) -> None:
    """Other text and other pixels in one sequence change no bit of any other sequence's logits."""
    batch = _batch(model)
    before = model(batch).unpack()
    for changed in (0, 3):
        other = _batch(model, seed=1)
        ids = batch.ids.tokens.clone()
        start, end = batch.ids.layout.offsets[changed], batch.ids.layout.offsets[changed + 1]
        ids[start:end] = other.ids.tokens[start:end]
        assert batch.patches is not None
        assert other.patches is not None
        first = sum(len(images) for _, images in SEQUENCES[:changed])
        patches = list(batch.patches.unpack())
        for image in range(first, first + len(SEQUENCES[changed][1])):
            patches[image] = other.patches.unpack()[image]
        after = model(
            replace(batch, ids=batch.ids.with_tokens(ids), patches=batch.patches.with_tokens(torch.cat(patches)))
        ).unpack()
        for item, (a, b) in enumerate(zip(before, after, strict=True)):
            if item == changed:
                assert not torch.equal(a, b), f"sequence {item} does not look at its own contents"
            else:
                assert torch.equal(a, b), f"sequence {changed} leaks into {item}: {relative_difference(a, b):.2e}"


@torch.no_grad()
def cache_equals_full(model: VisionLanguageModel) -> None:
    """Prefill, then one token at a time from the cache: the logits of one forward over everything."""
    steps = 3
    sequences: Sequences = [(9, [(1, 2)]), (5, []), (4, []), (12, [(3, 1), (1, 1)])]  # all end with `steps` of text
    if model.config.video_token_id is not None:
        sequences = [*sequences, (8, [(4, 1, 2)])]
    full = random_batch(model, sequences)
    want = model(full).unpack()
    parts = list(splits(full, sequences))
    prefill = Batch.concat(
        [
            Batch(Packed(p.ids.tokens[:-steps], Layout((len(p.ids.tokens) - steps,))), p.patches, seconds=p.seconds)
            for p in parts
        ]
    )
    cache = model.llm.new_cache(
        len(parts), full.ids.layout.max_length, dtype=next(model.parameters()).dtype, device=full.ids.tokens.device
    )
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    for item, logits in enumerate(model(prefill, cache=cache).unpack()):
        _assert_close(logits, want[item][:-steps], tolerance, f"prefill of sequence {item}")
    for step in range(steps, 0, -1):
        ids = torch.stack([p.ids.tokens[-step] for p in parts])
        step_batch = Batch(Packed(ids, Layout((1,) * len(parts))))
        for item, logits in enumerate(model(step_batch, cache=cache).unpack()):
            _assert_close(logits[0], want[item][-step], tolerance, f"decoded token {-step} of sequence {item}")


def batch_equals_single(model: VisionLanguageModel) -> None:
    """Greedy answers and sampled ones, with the same seeds, of a batch are those of its sequences one by one."""
    from vlkit.generation.sampling import sequence_seeds

    batch = random_batch(model, sequences_of(model), labels=False)
    together = model.generate(batch, max_new_tokens=6, stop=())
    alone = [model.generate(part, max_new_tokens=6, stop=())[0] for part in splits(batch, sequences_of(model))]
    assert together == alone
    seeds = sequence_seeds(3, batch.ids.layout.num_items)
    sampled = model.generate(batch, max_new_tokens=6, stop=(), temperature=1.5, top_p=0.9, top_k=50, seed=3)
    singly = [
        model.generate(part, max_new_tokens=6, stop=(), temperature=1.5, top_p=0.9, top_k=50, seed=[seeds[i]])[0]
        for i, part in enumerate(splits(batch, sequences_of(model)))
    ]
    assert sampled == singly
    stop = {together[0][2]}
    cut = model.generate(batch, max_new_tokens=6, stop=list(stop))
    for long, short in zip(together, cut, strict=True):
        until = next((i + 1 for i, token in enumerate(long) if token in stop), len(long))
        assert short == long[:until], "a sequence that stops changes another, or goes on"


def checkpointing_changes_no_bit(model: VisionLanguageModel) -> None:
    """Recomputing activations in the backward gives the same loss and gradients, bit for bit."""
    batch = _batch(model)
    plain = model(batch).loss
    want = _gradients(model, plain)
    parts = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert len(parts) >= 2, "tower and decoder offer gradient_checkpointing"
    for part in parts:
        part.gradient_checkpointing = True  # type: ignore[assignment]
    try:
        again = model(batch).loss
        got = _gradients(model, again)
    finally:
        for part in parts:
            part.gradient_checkpointing = False  # type: ignore[assignment]
    assert torch.equal(plain, again)
    for name in want:
        assert torch.equal(want[name], got[name]), f"gradient of {name} changes under checkpointing"


def same_seed_same_bits(config: VLMConfig) -> None:
    """Two models from one seed have the same weights and, after a step of SGD, still have."""
    from vlkit.models import VisionLanguageModel

    results = []
    for _ in range(2):
        torch.manual_seed(7)
        model = VisionLanguageModel(config)
        model.reset_parameters()
        grads = _gradients(model, model(_batch(model)).loss)
        results.append([p.detach() - 0.1 * grads[n] for n, p in model.named_parameters() if n in grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def gradients_reach_everything(model: VisionLanguageModel) -> None:
    """Every trainable parameter has a finite gradient, with images and without any; with images none is zero."""
    for sequences in (sequences_of(model), [(6, []), (2, [])]):
        batch = random_batch(model, sequences)
        grads = _gradients(model, model(batch).loss)
        for name, grad in grads.items():
            assert bool(grad.isfinite().all()), f"gradient of {name} is not finite"
        if batch.patches is not None:
            zero = [name for name, grad in grads.items() if not bool(grad.any())]
            assert not zero, f"gradients that are zero everywhere: {zero}"


def blocks_compile(
    model: VisionLanguageModel, parts: Sequence[str] = ("vision", "llm"), *, backend: str = "aot_eager"
) -> None:
    """The block stacks of these parts compile as one graph each, and other lengths reuse it; results stay equal."""
    import torch._dynamo as dynamo

    model = copy.deepcopy(model)
    batches = [
        random_batch(model, sequences, seed=seed)
        for seed, sequences in enumerate(
            [[(5, [(2, 3)]), (4, [])], [(3, [(1, 2), (3, 2)]), (7, [])], [(9, [(4, 1)]), (2, []), (6, [(2, 2)])]]
        )
    ]
    dtype = next(model.parameters()).dtype
    want = [(model(b).logits.tokens, _gradients(model, model(b).loss)) for b in batches]
    dynamo.reset()
    dynamo.utils.counters.clear()
    for part in (getattr(model, name) for name in parts):
        part.forward_blocks = torch.compile(part.forward_blocks, fullgraph=True, dynamic=True, backend=backend)
    for batch, (logits, grads) in zip(batches, want, strict=True):
        out = model(batch)
        _assert_close(out.logits.tokens, logits, 50 * TOLERANCE[dtype], "compiled logits")
        got = _gradients(model, out.loss)
        # Of the largest gradient: where keys have a bias and no rotary, its own gradient is nothing but rounding.
        scale = max(float(grad.abs().max()) for grad in grads.values())
        for name, grad in grads.items():
            found = float((got[name] - grad).abs().max()) / scale
            assert found <= 50 * TOLERANCE[dtype], f"compiled gradient of {name}: {found:.2e} of the largest gradient"
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    dynamo.reset()
    assert graphs == len(parts), (
        f"{graphs} graphs for {len(parts)} block stacks: something recompiles for another length"
    )


def saves_and_loads_the_same_bits(model: VisionLanguageModel, folder: Path) -> None:
    """save_pretrained then from_pretrained gives the same config, names, dtypes and bits, and the same logits."""
    from vlkit.models.pretrained import from_pretrained

    model.save_pretrained(folder / "saved")
    loaded = from_pretrained(folder / "saved")
    assert loaded.config == model.config
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, f"{name}: {tensor.dtype} became {theirs[name].dtype}"
        assert torch.equal(tensor, theirs[name]), f"{name} changed"
    with torch.no_grad():
        batch = _batch(model)
        assert torch.equal(model(batch).logits.tokens, loaded(batch).logits.tokens)


def key_map_is_total_and_injective(model: VisionLanguageModel) -> None:
    """Every tensor of the model has its published name, and back: same names, shapes, dtypes and bits."""
    from vlkit.models.pretrained import keys_of

    keys = keys_of(model.config)
    ours = {name: torch.randn(t.shape).to(t.dtype) for name, t in model.state_dict().items()}
    theirs = keys.to_theirs(ours)
    again = keys.to_ours(theirs)
    assert set(again) == set(ours), f"names differ: {sorted(set(again) ^ set(ours))[:5]}"
    for name, tensor in ours.items():
        assert torch.equal(again[name], tensor), f"{name} does not survive the round trip"
    written = keys.to_theirs(again)
    assert {k: (v.shape, v.dtype) for k, v in written.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


def placeholders_equal_image_tokens(spec: ModelSpec) -> None:
    """For odd sizes the processor writes as many placeholders as the projector gives tokens, by the layout alone."""
    rule, merge = spec.processor.image, spec.config.projector.merge_size  # type: ignore[attr-defined]
    assert rule.patch_size == spec.config.vision.patch_size  # type: ignore[attr-defined]
    assert rule.merge_size == merge
    for height, width in ODD_SIZES:
        grid = rule.target_size(height, width).grid
        tokens = math.prod(spec.config.projector.out_grid((1, *grid)))  # type: ignore[attr-defined]
        assert rule.num_tokens(grid) == tokens, f"{height}x{width} pixels"


def bad_input_is_named(model: VisionLanguageModel) -> None:
    """Mistakes in a batch raise a VlkitError that names the item and both numbers."""
    from vlkit.errors import LayoutError, PlaceholderMismatchError, TokenError, VlkitError

    batch = _batch(model)
    assert batch.patches is not None
    assert batch.patches.layout.grids is not None
    tokens, layout = batch.ids.tokens, batch.ids.layout
    image = model.config.image_token_id
    one_more, outside = tokens.clone(), tokens.clone()
    one_more[layout.offsets[1]] = image
    outside[0] = model.config.llm.vocab_size  # type: ignore[attr-defined]
    without_first = Packed(
        batch.patches.tokens[batch.patches.layout.lengths[0] :], Layout.from_grids(batch.patches.layout.grids[1:])
    )
    merge = model.config.projector.merge_size  # type: ignore[attr-defined]
    narrow = random_patches([(merge, merge)], batch.patches.tokens.shape[1] - 1, dtype=batch.patches.tokens.dtype)
    cases: list[tuple[type[VlkitError], str, Batch]] = [
        (PlaceholderMismatchError, "no images", Batch(batch.ids)),
        (PlaceholderMismatchError, "placeholders", Batch(batch.ids, without_first)),
        (PlaceholderMismatchError, "placeholders", replace(batch, ids=batch.ids.with_tokens(one_more))),
        (TokenError, str(model.config.llm.vocab_size), replace(batch, ids=batch.ids.with_tokens(outside))),  # type: ignore[attr-defined]
        (LayoutError, "patches", Batch(batch.ids, narrow)),
    ]
    if merge > 1:
        odd = random_patches([(merge, merge + 1)], batch.patches.tokens.shape[1], dtype=batch.patches.tokens.dtype)
        cases.append((LayoutError, "item 0", Batch(batch.ids, odd)))
    for kind, words, bad in cases:
        said = _raised(kind, model, bad)
        assert said is not None, f"no {kind.__name__} for a batch with wrong {words}"
        assert words in said, f"{kind.__name__} does not say {words!r}: {said}"


def _raised(kind: type[Exception], model: VisionLanguageModel, batch: Batch) -> str | None:
    """The message of an error of this kind, or None if the forward goes through."""
    try:
        model(batch)
    except kind as error:
        return str(error)
    return None
