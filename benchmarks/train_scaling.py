"""What a training step's cost grows with: images per sample, image size, pack length. Forward and backward; train_step's model.

CPU time, medians of interleaved rounds. Beside each stands what tells the parts apart: the same number of tokens as text alone,
which is a step without the tower; and one long sample instead of many short ones, which is attention that grows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import compare
from train_step import build

from vlkit.models import VisionLanguageModel
from vlkit.packing import Batch
from vlkit.testing.batches import random_batch

TEXT = 256  # tokens beside the images
NUM_IMAGES = [0, 2, 4, 8, 12]  # of 16 x 16 patches: 64 tokens each
SIDES = [8, 16, 24, 32, 48]  # patches of 14 pixels
PACKS = [512, 1024, 2048, 4096]  # tokens
SHORT = 256  # tokens of a sample in a pack


def step(model: VisionLanguageModel, batch: Batch) -> Callable[[], None]:
    def run() -> None:
        model(batch).loss.backward()  # type: ignore[union-attr]
        model.zero_grad()

    return run


def points(model: VisionLanguageModel) -> dict[tuple[str, str, int], Batch]:
    """(panel, curve, place on the axis) -> what is run there."""

    def text(*lengths: int) -> Batch:
        return random_batch(model, [(length, []) for length in lengths])

    found: dict[tuple[str, str, int], Batch] = {}
    for count in NUM_IMAGES:
        found["images", "with images", count] = random_batch(model, [(TEXT, [(8, 8)] * count)])
        found["images", "as much text", count] = text(TEXT + 64 * count)
    for side in SIDES:
        found["side", "one image", side] = random_batch(model, [(TEXT, [(side // 2, side // 2)])])
        found["side", "as much text", side] = text(TEXT + (side // 2) ** 2)
    for length in PACKS:
        found["pack", f"samples of {SHORT}", length] = text(*[SHORT] * (length // SHORT))
        found["pack", "one sample", length] = text(length)
    return found


def run(repeats: int) -> dict[str, Any]:
    model = build()
    batches = points(model)
    step(model, batches["images", "with images", 2])()  # warms up
    timings = compare({str(k): step(model, b) for k, b in batches.items()}, repeats=min(repeats, 3), warmup=0)
    found: dict[str, dict[str, list[list[float]]]] = {}
    for panel, curve, place in batches:
        seconds = statistics.median(timings.cpu_seconds[str((panel, curve, place))])
        found.setdefault(panel, {}).setdefault(curve, []).append([place, seconds])
    for panel, curves in found.items():
        print(f"\n{panel}")
        for curve, values in curves.items():
            print(f"  {curve:16} " + "  ".join(f"{place}: {1000 * seconds:.0f} ms" for place, seconds in values))
    return {"text_tokens": TEXT, "cpu_seconds": found}


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "vlkit", "font.size": 9}
    panels: Sequence[tuple[str, str, str]] = [
        ("images", f"images of 224x224 pixels beside {found['text_tokens']} tokens of text", "CPU seconds per step"),
        ("side", "side of one image, pixels", "CPU seconds per step"),
        ("pack", "tokens of a pack", "CPU milliseconds per token"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for axis, (panel, label, unit) in zip(axes, panels, strict=True):
        for (curve, values), style in zip(found["cpu_seconds"][panel].items(), ("o-", "s--"), strict=True):
            places = [place * 14 if panel == "side" else place for place, _ in values]
            heights = [1000 * s / place if panel == "pack" else s for place, s in values]
            axis.plot(places, heights, style, label=curve)
        axis.set(xlabel=label, ylabel=unit)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(1)
