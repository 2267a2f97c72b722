"""What the examples come to over several seeds: readings and retrieval on strips by writers that were never trained on.

    python benchmarks/objectives_quality.py                    # what is missing in results/: a quarter of an hour of one core
    python benchmarks/objectives_quality.py dpo --seeds=1      # one example, one seed; others that it needs come first
    python benchmarks/objectives_quality.py --plot             # docs/images/{contrast,preference,policy}.svg and a table

The configs are those of examples/, but for the seed: of weights, order, and everything drawn. Strips and their split by writers
are the same for all seeds. Every model is the one at the end of its run: none is chosen by what is measured here.

    sft              reads strips of one to three digits; stopped early
    dpo              from sft, on pairs of a right reading and a wrong one that the sft model of the same seed drew
    grpo             from sft, with 1 for an exact reading as the reward
    mirror_descent   the same with Kimi's online policy mirror descent
    contrast         SigLIP and captions on strips of three to five digits, from random weights
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import machine

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES / "evaluation"))

import readings  # noqa: E402
import retrieval  # noqa: E402
from pairs import write_pairs  # noqa: E402

from vlkit.training import read_train_config, train  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "objectives_quality.json"
IMAGES = ROOT / "docs" / "images"
UNSEEN = EXAMPLES / "digits" / "unseen"
NEEDS = {"sft": None, "dpo": "sft", "grpo": "sft", "mirror_descent": "sft", "contrast": None}
CURVES = ("loss", "contrastive", "caption", "accuracy", "margin", "reward")  # of metrics.jsonl, where they are there


def model_of(name: str, seed: int) -> Path:
    return EXAMPLES / "runs" / "quality" / f"{name}-{seed}" / "model"


def evaluate(name: str, seed: int) -> dict[str, float]:
    """Held-out figures of a finished run."""
    if name == "contrast":
        return retrieval.evaluate(model_of(name, seed), UNSEEN)
    return readings.evaluate(model_of(name, seed), UNSEEN, pairs=f"pairs-{seed}.jsonl")


def run(name: str, seed: int) -> dict[str, Any]:
    """One training and its held-out figures."""
    config = read_train_config(EXAMPLES / f"{name}.toml")
    folder = model_of(name, seed).parent
    config = config.replace(run=str(folder), seed=seed, picture=False)
    if NEEDS[name]:
        config = config.replace(model=config.model.replace(folder=str(model_of("sft", seed))))
    if name == "dpo":
        config = config.replace(data=config.data.replace(files=(str(EXAMPLES / f"digits/seen/pairs-{seed}.jsonl"),)))
    if train(config).stopped_by:
        raise SystemExit(f"{name} seed {seed} was stopped; the same command goes on from there")
    if name == "sft":
        for part in ("seen", "unseen"):
            write_pairs(model_of(name, seed), EXAMPLES / "digits" / part, seed=seed, name=f"pairs-{seed}.jsonl")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = {key: [round(line[key], 4) for line in lines] for key in ("step", *CURVES) if key in lines[-1]}
    return {"held out": evaluate(name, seed), "curves": curves}


class Book:
    """The results, kept after every run; a run that is in it is not run again."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        self.runs |= json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def ask(self, name: str, seed: int) -> dict[str, Any]:
        key = f"{name} seed {seed}"
        needed = NEEDS[name]
        if needed and not model_of(needed, seed).exists():
            self.runs.pop(f"{needed} seed {seed}", None)
            self.ask(needed, seed)
        if key not in self.runs:
            found = run(name, seed)
            self.read()  # others may run beside this one
            self.runs[key] = found
            lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(self.runs.items()))
            RESULTS.write_text(f"{{\n{lines}\n}}\n")
            print(f"{key}: {self.runs[key]['held out']}", flush=True)
        return self.runs[key]


def table(book: Book, seeds: int) -> None:
    for name in NEEDS:
        rows = [book.runs.get(f"{name} seed {seed}") for seed in range(seeds)]
        found = [row for row in rows if row]
        if not found:
            continue
        print(f"\n{name}, {len(found)} seeds")
        for key in found[0]["held out"]:
            values = [row["held out"][key] for row in found]
            print(f"  {key}: {statistics.fmean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")


# Pictures


def _axes(columns: int) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vlkit"  # the same file from the same results
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(3.6 * columns, 3), squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _curves(axis: Any, book: Book, names: dict[str, str], key: str, label: str, seeds: int) -> None:
    """A line per seed over the training, each point the mean of the last four."""
    for name, colour in names.items():
        for seed in range(seeds):
            curves = book.runs[f"{name} seed {seed}"]["curves"]
            axis.plot(
                curves["step"],
                curves[key],
                color=colour,
                linewidth=0.8,
                label=name.replace("_", " ") if not seed else None,
            )
    axis.set_xlabel("steps")
    axis.set_ylabel(label)
    if len(names) > 1:
        axis.legend(frameon=False, fontsize=8)


def _change(axis: Any, book: Book, names: dict[str, str], key: str, label: str, seeds: int) -> None:
    """A line per seed from the model before to the model after."""
    for name, colour in names.items():
        for seed in range(seeds):
            values = [100 * book.runs[f"{each} seed {seed}"]["held out"][key] for each in (NEEDS[name], name)]
            axis.plot(
                (0, 1),
                values,
                "o-",
                color=colour,
                linewidth=1,
                markersize=4,
                label=name.replace("_", " ") if not seed else None,
            )
    axis.set_xticks((0, 1), ("sft", "after"))
    axis.set_xlim(-0.3, 1.3)
    axis.set_ylabel(label)


def _contrast(book: Book, seeds: int) -> Any:
    figure, axes = _axes(3)
    _curves(axes[0], book, {"contrast": "#0b7285"}, "contrastive", "SigLIP loss of a step, nats", seeds)
    _curves(axes[1], book, {"contrast": "#0b7285"}, "caption", "caption loss, nats per token", seeds)
    keys = [f"{way}, recall at {k}" for k in (1, 5) for way in ("image to text", "text to image")]
    for seed in range(seeds):
        figures = book.runs[f"contrast seed {seed}"]["held out"]
        axes[2].plot(range(4), [100 * figures[key] for key in keys], "o", color="#0b7285", markersize=4)
    chances = [100 * figures[f"chance at {k}"] for k in (1, 1, 5, 5)]
    axes[2].plot(range(4), chances, "_", color="#868e96", markersize=14, label="chance")
    axes[2].set_xticks(range(4), ["I-T @1", "T-I @1", "I-T @5", "T-I @5"])
    axes[2].set_ylim(0, 100)
    axes[2].set_ylabel(f"recall among {figures['texts']} texts, %")
    axes[2].legend(frameon=False, fontsize=8)
    return figure


def _preference(book: Book, seeds: int) -> Any:
    figure, axes = _axes(3)
    names = {"dpo": "#0b7285"}
    _curves(axes[0], book, names, "loss", "DPO loss of a step, nats", seeds)
    _change(axes[1], book, names, "preferred", "held-out pairs preferred, %", seeds)
    _change(axes[2], book, names, "exact", "held-out strips right, %", seeds)
    return figure


def _policy(book: Book, seeds: int) -> Any:
    figure, axes = _axes(3)
    names = {"grpo": "#0b7285", "mirror_descent": "#e8590c"}
    _curves(axes[0], book, names, "reward", "reward of a step", seeds)
    _change(axes[1], book, names, "drawn", "held-out drawn readings right, %", seeds)
    _change(axes[2], book, names, "exact", "held-out strips right, %", seeds)
    return figure


PICTURES: dict[str, tuple[tuple[str, ...], Callable[[Book, int], Any]]] = {
    "contrast": (("contrast",), _contrast),
    "preference": (("sft", "dpo"), _preference),
    "policy": (("sft", "grpo", "mirror_descent"), _policy),
}


def plot(book: Book, seeds: int) -> None:
    for name, (needed, draw) in PICTURES.items():
        missing = [
            f"{each} seed {seed}" for each in needed for seed in range(seeds) if f"{each} seed {seed}" not in book.runs
        ]
        if missing:
            print(f"{name}: no result of {', '.join(missing)}; run without --plot first")
            continue
        figure = draw(book, seeds)
        figure.tight_layout()
        path = IMAGES / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    seeds = next((range(int(a.split("=")[1])) for a in arguments if a.startswith("--seeds=")), range(3))
    seeds = next(
        (range(int(a.split("=")[1]), int(a.split("=")[1]) + 1) for a in arguments if a.startswith("--seed=")), seeds
    )
    names = [a for a in arguments if not a.startswith("--")] or list(NEEDS)
    book = Book()
    if "--plot" not in arguments:
        print(machine())
        if not UNSEEN.exists():
            subprocess.run([sys.executable, "digits.py"], cwd=EXAMPLES, check=True)
        for seed in seeds:
            for name in names:
                book.ask(name, seed)
    else:
        plot(book, len(seeds))
    table(book, max(seeds) + 1)


if __name__ == "__main__":
    main(sys.argv[1:])
