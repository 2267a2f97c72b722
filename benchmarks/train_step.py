"""One SFT step, forward, loss, backward and AdamW, on samples of very different lengths: a pack against padding.

Both sides have the same weights, samples and fused AdamW of torch. The mix: texts of log-normal length (median 128 tokens,
sigma 0.9, 16 to 1,536), the last third of each is learnt; 0, 1, 2 or 3 images (30, 40, 20, 10 %) of 112x168, 224x224, 224x336 or
336x448 pixels (15, 35, 25, 25 %), so 24 to 192 tokens each.

    vlkit                              all samples in one pack
    vlkit, full logits                 the same, and torch's cross-entropy of all logits
    transformers, padded               all samples in one batch, padded to the longest
    transformers, padded, by length    batches of four samples of like length, gradients added up
    transformers, one by one           no padding, gradients added up
    transformers, packed by hand       one row, four rows of positions, no cache: the only packing that does not leak there
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import compare, print_table
from peak import peak_bytes
from torch import Tensor, nn

import vlkit
from vlkit.models import VisionLanguageModel
from vlkit.models.pretrained import keys_of
from vlkit.objectives import next_token_targets
from vlkit.packing import Batch

NUM_SAMPLES = 16
GRIDS = [(8, 12), (16, 16), (16, 24), (24, 32)]  # patches of 14 pixels; 2x2 make a token
GRID_SHARES = [0.15, 0.35, 0.25, 0.25]
IMAGE_SHARES = [0.3, 0.4, 0.2, 0.1]

SIZES: dict[str, Any] = {
    "vision": {"dim": 192, "num_layers": 3, "num_heads": 3, "mlp_dim": 768, "patch_size": 14, "frames_per_patch": 2},
    "llm": {
        "vocab_size": 16_384,
        "dim": 256,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_dim": 768,
        "rope_sections": (8, 12, 12),
    },
}


class Sample(NamedTuple):
    """A sample as transformers' processor gives it."""

    ids: Tensor
    labels: Tensor
    pixels: Tensor
    grids: list[tuple[int, int, int]]


def build() -> VisionLanguageModel:
    torch.manual_seed(0)
    return vlkit.create_model("qwen2-vl-tiny", **SIZES)


def reference(ours: VisionLanguageModel) -> nn.Module:
    """transformers' model with the same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        return transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()


def draw_samples(model: VisionLanguageModel, count: int = NUM_SAMPLES, seed: int = 0) -> list[Sample]:
    config: Any = model.config
    image, marks = config.image_token_id, config.vision_marks
    generator = torch.Generator().manual_seed(seed)
    lengths = (128 * torch.exp(0.9 * torch.randn(count, generator=generator))).long().clamp(16, 1536).tolist()
    samples = []
    for length in lengths:
        num_images = int(torch.multinomial(torch.tensor(IMAGE_SHARES), 1, generator=generator))
        chosen = torch.multinomial(torch.tensor(GRID_SHARES), max(num_images, 1), True, generator=generator)
        grids = [(1, *GRIDS[int(i)]) for i in chosen[:num_images]]
        text = torch.randint(300, config.llm.vocab_size, (length,), generator=generator)
        parts = list(text[: length // 2].tensor_split(num_images + 1))
        ids = [parts[0]]
        for (_, rows, columns), after in zip(grids, parts[1:], strict=True):
            ids += [torch.tensor([marks[0], *[image] * (rows * columns // 4), marks[1]]), after]
        ids = torch.cat([*ids, text[length // 2 :]])
        labels = torch.full_like(ids, -100)
        labels[-(length // 3) :] = ids[-(length // 3) :]
        patches = sum(t * h * w for t, h, w in grids)
        samples.append(Sample(ids, labels, torch.randn(patches, config.vision.patch_dim, generator=generator), grids))
    return samples


def padded(samples: Sequence[Sample], image: int) -> dict[str, Tensor]:
    """What transformers' processor gives for a batch, padded on the right."""
    pad = nn.utils.rnn.pad_sequence
    ids = pad([s.ids for s in samples], batch_first=True)
    made = {
        "input_ids": ids,
        "attention_mask": pad([torch.ones_like(s.ids) for s in samples], batch_first=True),
        "labels": pad([s.labels for s in samples], batch_first=True, padding_value=-100),
        "mm_token_type_ids": (ids == image).int(),
    }
    grids = [grid for s in samples for grid in s.grids]
    if grids:
        made |= {"pixel_values": torch.cat([s.pixels for s in samples]), "image_grid_thw": torch.tensor(grids)}
    return made


def packed_by_hand(theirs: Any, samples: Sequence[Sample], image: int) -> dict[str, Any]:
    """One row. The positions of each sample are computed alone; the first of the four rows says where samples begin."""
    rows = []
    for sample in samples:
        alone = padded([sample], image)
        three, _ = theirs.model.get_rope_index(
            alone["input_ids"], mm_token_type_ids=alone["mm_token_type_ids"], image_grid_thw=alone.get("image_grid_thw")
        )
        rows.append(torch.cat([torch.arange(len(sample.ids))[None, None], three]))
    joined = Sample(
        torch.cat([s.ids for s in samples]),
        # The first token of a sample is no answer to the last one's end.
        torch.cat([torch.cat([s.labels.new_full((1,), -100), s.labels[1:]]) for s in samples]),
        torch.cat([s.pixels for s in samples]),
        [grid for s in samples for grid in s.grids],
    )
    made = padded([joined], image)
    del made["attention_mask"]
    return {**made, "position_ids": torch.cat(rows, dim=2), "use_cache": False}


def pack(ours: VisionLanguageModel, samples: Sequence[Sample]) -> Batch:
    return Batch.concat([ours.pack(**padded([s], ours.config.image_token_id)) for s in samples])


def full_logits_loss(ours: VisionLanguageModel, batch: Batch) -> Tensor:
    assert batch.labels is not None
    decoded = ours.decode(batch)
    logits = ours.llm.head(decoded.hidden.tokens)
    return F.cross_entropy(logits.float(), next_token_targets(batch.labels, batch.ids.layout))


def losses(
    names: Sequence[str], num_samples: int = NUM_SAMPLES
) -> tuple[dict[str, Callable[[], None]], dict[str, nn.Module]]:
    """For each name what fills the gradients of its model with those of the mean loss; and its model."""
    ours = build()
    samples = draw_samples(ours, num_samples)
    image = ours.config.image_token_id
    batch = pack(ours, samples)
    count = int((next_token_targets(batch.labels, batch.ids.layout) != -100).sum())  # type: ignore[arg-type]
    models: dict[str, nn.Module] = {}
    made: dict[str, Callable[[], None]] = {}

    def own(loss: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: loss().backward()

    def parts(batches: Sequence[dict[str, Any]]) -> Callable[[], None]:
        def run() -> None:
            for inputs in batches:
                theirs(**inputs, num_items_in_batch=count).loss.backward()

        return run

    theirs: Any = reference(ours) if any(name.startswith("transformers") for name in names) else None
    by_length = sorted(samples, key=lambda s: len(s.ids))
    for name in names:
        models[name] = theirs if name.startswith("transformers") else ours
        match name:
            case "vlkit":
                made[name] = own(lambda: ours(batch).loss)  # type: ignore[arg-type, return-value]
            case "vlkit, full logits":
                made[name] = own(lambda: full_logits_loss(ours, batch))
            case "transformers, padded":
                made[name] = parts([padded(samples, image)])
            case "transformers, padded, by length":
                made[name] = parts([padded(by_length[i : i + 4], image) for i in range(0, len(samples), 4)])
            case "transformers, one by one":
                made[name] = parts([padded([s], image) for s in samples])
            case "transformers, packed by hand":
                made[name] = parts([packed_by_hand(theirs, samples, image)])
    return made, models


NAMES = [
    "vlkit",
    "vlkit, full logits",
    "transformers, padded",
    "transformers, padded, by length",
    "transformers, one by one",
    "transformers, packed by hand",
]


def agree(num_samples: int = 5) -> float:
    """The largest difference of any gradient from vlkit's, of the largest gradient; raises where the work is not the same."""
    made, models = losses(NAMES, num_samples)
    found: dict[str, dict[str, Tensor]] = {}
    ours: Any = models["vlkit"]
    keys = keys_of(ours.config)
    for name, fill in made.items():
        models[name].zero_grad()
        fill()
        gradients = {n: p.grad.clone() for n, p in models[name].named_parameters() if p.grad is not None}
        if models[name] is ours:
            gradients = keys.to_theirs(gradients)
        found[name] = {_bare(n): g for n, g in gradients.items()}
    want = found["vlkit"]
    largest, worst = max(float(g.abs().max()) for g in want.values()), 0.0
    for name, gradients in found.items():
        missing = set(want) ^ set(gradients)
        assert not missing, f"{name}: gradients of other names: {sorted(missing)[:6]}"
        difference = max(float((gradients[n] - want[n]).abs().max()) for n in want) / largest
        assert difference < 1e-5, f"{name}: gradients differ by {difference:.1e} of the largest"
        worst = max(worst, difference)
    return worst


def _bare(name: str) -> str:
    """Names without the prefixes that differ between releases."""
    return name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")


def step(name: str) -> Callable[[], None]:
    """A step whose optimizer has its state already."""
    made, models = losses([name])
    return _step(made[name], models[name], with_state=True)


def _step(fill: Callable[[], None], model: nn.Module, *, with_state: bool = False) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def run() -> None:
        fill()
        optimizer.step()
        optimizer.zero_grad()

    if with_state:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return run


def describe() -> dict[str, Any]:
    model = build()
    samples = draw_samples(model)
    lengths = [len(s.ids) for s in samples]
    by_length = sorted(lengths)
    fours = sum(4 * max(by_length[i : i + 4]) for i in range(0, len(lengths), 4))
    return {
        "parameters": model.num_parameters(),
        "samples": len(samples),
        "images": sum(len(s.grids) for s in samples),
        "real_tokens": sum(lengths),
        "longest": max(lengths),
        "learnt_tokens": sum(int((s.labels != -100).sum()) for s in samples),
        "padded_tokens": len(lengths) * max(lengths),
        "padded_tokens_by_length": fours,
        "patches": sum(len(s.pixels) for s in samples),
    }


def run(repeats: int) -> dict[str, Any]:
    mix = describe()
    print(f"\n{mix}")
    worst = agree()  # which also warms all of them up
    print(f"gradients of all six differ by at most {worst:.1e} of the largest", flush=True)
    made, models = losses(NAMES)
    timings = compare({n: _step(made[n], models[n]) for n in NAMES}, repeats=repeats, warmup=0)
    print_table("one step", timings, baseline="transformers, padded")
    cpu = {name: statistics.median(timings.cpu_seconds[name]) for name in NAMES}
    rates = {name: mix["real_tokens"] / cpu[name] for name in NAMES}
    for name, rate in rates.items():
        print(f"  {name:34} {rate:8.0f} real tokens per second of CPU time")
    return {
        "mix": mix,
        "largest_difference_of_gradients": worst,
        "median_seconds": {name: timings.median(name) for name in NAMES},
        "median_cpu_seconds": cpu,
        "real_tokens_per_cpu_second": rates,
        "vlkit_faster_than": {name: timings.speedup("vlkit", over=name) for name in NAMES},
        "vlkit_faster_than_by_cpu": {name: timings.cpu_speedup("vlkit", over=name) for name in NAMES},
    }


def run_memory(repeats: int) -> dict[str, Any]:
    """Beyond weights and optimizer state: activations and gradients."""
    del repeats
    found = {}
    print("\npeak memory of a step beyond weights and optimizer state")
    for name in NAMES[:4]:
        found[name] = peak_bytes(step, name) / 2**20
        print(f"  {name:34} {found[name]:7.0f} MiB", flush=True)
    return {"mix": describe(), "peak_mib": found}
