"""Muon against AdamW where only the optimizer differs: held-out loss against steps and against seconds of CPU time.

    python benchmarks/muon_quality.py                 # what is missing in results/: half an hour of one core
    python benchmarks/muon_quality.py demo --seeds=1  # one task, one seed
    python benchmarks/muon_quality.py --plot          # docs/images/muon-vs-adamw.svg and a table, from the results

Tasks:
    demo     `vlkit demo`'s own: a small Kimi-VL reads strips of handwritten digits; judged by writers it never saw
    decoder  a Qwen3 decoder of 4 layers of width 128 on the bytes of Python's own help texts; every tenth text is held out

Both optimizers see the same batches in the same order, with the same weights to start from, the same number of steps and the
same schedule: a short rise, then a straight fall to zero. Weight decay is 0.05 for both. Muon orthogonalises matrices and gives
everything else to its own AdamW, at 0.4 of its learning rate. The learning rate of each is searched in factors of two with
seed 0 until the best one has a worse neighbour on either side; it then runs with the other seeds.

Seconds are CPU time of forward, backward and step on one thread; making batches and looks at held-out data do not count.
"""

from __future__ import annotations

import itertools
import json
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from harness import machine
from torch import Tensor, nn

from vlkit.demo.digits import load_digits
from vlkit.demo.options import Options
from vlkit.demo.run import build_model
from vlkit.demo.strips import Variation, make_strips
from vlkit.demo.task import StripPacker, image_rule, picture, read
from vlkit.demo.train import balance, longest_strip, rate_factor
from vlkit.layers.moe import Router
from vlkit.llm.qwen3 import Qwen3Config, build_qwen3
from vlkit.objectives import chunked_cross_entropy
from vlkit.optim import Muon, muon_param_groups
from vlkit.packing import Layout, Packed
from vlkit.processing import Processor, ProcessorConfig

Rule = Literal["muon", "adamw"]
RULES: tuple[Rule, ...] = ("muon", "adamw")
FIRST_RATE = {"demo": {"muon": 0.007, "adamw": 0.001}, "decoder": {"muon": 0.007, "adamw": 0.008}}
WEIGHT_DECAY = 0.05
VECTOR_RATE = 0.4
LOOKS = 12  # at held-out data in a run

RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "muon-vs-adamw.svg"


class Task(NamedTuple):
    """What is learnt.

    Attributes:
        steps: Of a run.
        model: Fresh weights from torch's random state.
        learn: The loss of batch number n of a seed after a share of the run, and what is to be done after the step.
        loss: Mean loss on held-out data, in nats.
        score: More to know of the finished model.
        data: Makes the batch that `learn` takes: (seed, number, share of the run).
    """

    steps: int
    model: Callable[[], nn.Module]
    data: Callable[[int, int, float], Any]
    learn: Callable[[nn.Module, Any], tuple[Tensor, Callable[[], None]]]
    loss: Callable[[nn.Module], float]
    score: Callable[[nn.Module], dict[str, float]]


def demo_task() -> Task:
    processor = Processor(ProcessorConfig(image=image_rule(8, 2)))
    pack, digits = StripPacker(processor), load_digits("seen")
    unseen = make_strips(load_digits("unseen"), 400, seed=(0, 1))
    held_out = pack(unseen[:200])

    def data(seed: int, number: int, done: float) -> Any:
        longest = longest_strip(done)
        return pack(make_strips(digits, 64, seed=(seed, 0, number), variation=Variation(), max_digits=longest))

    def learn(model: nn.Module, batch: Any) -> tuple[Tensor, Callable[[], None]]:
        out = model(batch)
        routers = [module for module in model.modules() if isinstance(module, Router) and module.bias is not None]
        return out.loss, lambda: balance(routers, list(out.expert_load))

    def score(model: nn.Module) -> dict[str, float]:
        answers = read(model, processor, [picture(strip) for strip in unseen])  # type: ignore[arg-type]
        right = sum(answer == strip.text for answer, strip in zip(answers, unseen, strict=True))
        return {"strips right": right / len(unseen)}

    return Task(240, lambda: build_model(Options()), data, learn, lambda model: model(held_out).loss.item(), score)


def decoder_task() -> Task:
    length, sequences = 128, 8
    sizes = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "mlp_dim": 384}
    config = Qwen3Config(vocab_size=256, dim=128, theta=1e4, max_positions=length, **sizes)
    texts = [text.encode() for _, text in sorted(pydoc_data.topics.topics.items())]
    seen, unseen = (
        torch.frombuffer(bytearray(b"\n".join(t for i, t in enumerate(texts) if (i % 10 == 9) is held)), dtype=torch.uint8)
        for held in (False, True)
    )  # fmt: skip
    layout = Layout((length,) * sequences)
    starts = torch.arange(0, len(unseen) - length - 1, length)
    looks = [unseen[s : s + length + 1] for s in starts[torch.linspace(0, len(starts) - 1, 64).long()].tolist()]

    def cut(rows: list[Tensor]) -> Tensor:
        return torch.stack(rows).long()

    def data(seed: int, number: int, done: float) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        begins = torch.randint(len(seen) - length - 1, (sequences,), generator=generator).tolist()
        return cut([seen[b : b + length + 1] for b in begins])

    def loss(model: Any, rows: Tensor) -> Tensor:
        hidden = model(Packed(model.embed(rows[:, :-1].flatten()), layout)).hidden.tokens
        total, count = chunked_cross_entropy(hidden, model.head_weight, rows[:, 1:].flatten())
        return total / count

    return Task(
        200,
        lambda: build_qwen3(config),
        data,
        lambda model, rows: (loss(model, rows), lambda: None),
        lambda model: statistics.fmean(
            loss(model, cut(looks[i : i + sequences])).item() for i in range(0, 64, sequences)
        ),
        lambda model: {},
    )


TASKS = {"demo": demo_task, "decoder": decoder_task}


def make_optimizer(model: nn.Module, rule: Rule, lr: float) -> torch.optim.Optimizer:
    if rule == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    groups = muon_param_groups(model)
    for group in groups:
        if group["algorithm"] == "adamw":
            group["lr"] = VECTOR_RATE * lr
    return Muon(groups, lr=lr, weight_decay=WEIGHT_DECAY)


def run(task: Task, rule: Rule, lr: float, seed: int) -> dict[str, Any]:
    """One training: held-out loss at `step`, after `seconds` of CPU time."""
    torch.manual_seed(seed)
    model = task.model().train()
    optimizer = make_optimizer(model, rule, lr)
    peaks = [group["lr"] for group in optimizer.param_groups]
    looks = {round(task.steps * (i + 1) / LOOKS) for i in range(LOOKS)}
    curve: dict[str, list[float]] = {"step": [], "seconds": [], "loss": []}
    seconds = in_step = 0.0
    for number in range(task.steps):
        done = number / task.steps
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_factor(done)
        batch = task.data(seed, number, done)
        begin = time.process_time()
        loss, after = task.learn(model, batch)
        loss.backward()
        begin_step = time.process_time()
        optimizer.step()
        in_step += time.process_time() - begin_step
        optimizer.zero_grad(set_to_none=True)
        after()
        seconds += time.process_time() - begin
        if number + 1 in looks:
            model.eval()
            with torch.no_grad():
                held_out = task.loss(model)
            model.train()
            for key, value in (("step", number + 1), ("seconds", round(seconds, 2)), ("loss", round(held_out, 4))):
                curve[key].append(value)
    model.eval()
    return curve | {"seconds in the optimizer": round(in_step, 2)} | task.score(model)


# ----------------------------------------------------------------------------------------------------------------------
# Which runs, and what they say


def key_of(task: str, rule: str, lr: float, seed: int) -> str:
    return f"{task} {rule} {lr:g} seed {seed}"


class Book:
    """The results, kept after every run; a run that is in it is not run again."""

    def __init__(self, task: str) -> None:
        self.path = path = RESULTS / f"muon_quality_{task}.json"
        self.runs: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def ask(self, name: str, task: Task | None, rule: Rule, lr: float, seed: int) -> dict[str, Any]:
        key = key_of(name, rule, lr, seed)
        if key not in self.runs:
            if task is None:
                raise SystemExit(f"no result of {key!r} in {self.path}; run without --plot first")
            self.runs[key] = run(task, rule, lr, seed)
            self.path.parent.mkdir(exist_ok=True)
            lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.runs.items())
            self.path.write_text(f"{{\n{lines}\n}}\n")
            print(f"{key}: {self.runs[key]['loss'][-1]:.4f} after {self.runs[key]['seconds'][-1]:.0f} s", flush=True)
        return self.runs[key]

    def best_rate(self, name: str, task: Task | None, rule: Rule) -> float:
        """The rate, among powers of two of the first, whose neighbours are both worse with seed 0."""

        def final(lr: float) -> float:
            return self.ask(name, task, rule, lr, 0)["loss"][-1]

        best = FIRST_RATE[name][rule]
        while True:
            better = min((best / 2, best, best * 2), key=final)
            if better == best:
                return best
            best = better


def at_loss(run: dict[str, Any], key: str, loss: float) -> float | None:
    """Where on the axis `key` a run first has this loss, between two looks on a straight line; None if it never does."""
    points = list(zip(run[key], run["loss"], strict=True))
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= loss < y0:
            return x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
    return None


def spread(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(names: Iterable[str], seeds: int) -> None:
    for name in names:
        book = Book(name)
        rates = {rule: book.best_rate(name, None, rule) for rule in RULES}
        runs = {rule: [book.ask(name, None, rule, rates[rule], seed) for seed in range(seeds)] for rule in RULES}
        print(f"\n{name}, {runs['adamw'][0]['step'][-1]} steps, {seeds} seeds")
        for rule in RULES:
            some = runs[rule]
            extra = [k for k in some[0] if isinstance(some[0][k], float) and not k.startswith("seconds")]
            print(f"  {rule} {rates[rule]:g}: loss {spread(r['loss'][-1] for r in some)}", end="")
            print(f", {spread(r['seconds'][-1] for r in some)} s", end="")
            print(
                f", in the optimizer {spread(r['seconds in the optimizer'] / r['seconds'][-1] for r in some)}", end=""
            )
            print("".join(f", {k} {spread(r[k] for r in some)}" for k in extra))
        for key in ("step", "seconds"):
            shares = [
                (at_loss(muon, key, adamw["loss"][-1]) or float("inf")) / adamw[key][-1]
                for muon, adamw in zip(runs["muon"], runs["adamw"], strict=True)
            ]
            print(f"  muon has adamw's final loss after {spread(shares)} of its {key}s".replace("secondss", "seconds"))
        for rule in RULES:
            ours = {
                key.split()[2]: run
                for key, run in book.runs.items()
                if key.split()[1] == rule and key.endswith("seed 0")
            }
            tried = {rate: run["loss"][-1] for rate, run in ours.items()}
            print(f"  {rule}, rates tried: " + ", ".join(f"{r}: {tried[r]:.3f}" for r in sorted(tried, key=float)))


def plot(names: list[str], seeds: int) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vlkit"  # the same file from the same results
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(names), 2, figsize=(8, 3 * len(names)), sharey="row", squeeze=False)
    for row, name in zip(axes, names, strict=True):
        book = Book(name)
        for rule, colour in (("muon", "#0b7285"), ("adamw", "#e8590c")):
            rate = book.best_rate(name, None, rule)  # type: ignore[arg-type]
            for seed in range(seeds):
                one = book.ask(name, None, rule, rate, seed)  # type: ignore[arg-type]
                for axis, key in zip(row, ("step", "seconds"), strict=True):
                    label = {"muon": "Muon", "adamw": "AdamW"}[rule] + f", rate {rate:g}" if seed == 0 else None
                    axis.plot(one[key], one["loss"], color=colour, linewidth=1, label=label)
        row[0].set_ylabel(f"{name}: held-out loss, nats")
        row[0].set_xlabel("steps")
        row[1].set_xlabel("seconds of CPU time, one thread")
        row[0].set_yscale("log")
        row[0].legend(frameon=False)
        for axis in row:
            axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})
    print(f"{PLOT}: {PLOT.stat().st_size / 1000:.0f} kB")


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    seeds = next((int(a.split("=")[1]) for a in arguments if a.startswith("--seeds=")), 3)
    names = [a for a in arguments if not a.startswith("--")] or list(TASKS)
    if "--plot" not in arguments:
        print(machine())
        for name in names:
            task, book = TASKS[name](), Book(name)
            for rule in RULES:
                rate = book.best_rate(name, task, rule)
                for seed in range(1, seeds):
                    book.ask(name, task, rule, rate, seed)
    else:
        plot(names, seeds)
    table(names, seeds)


if __name__ == "__main__":
    main(sys.argv[1:])
