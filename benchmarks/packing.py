"""Filling packs: how many rows 20,000 samples of very unequal length need, how full they are, and what it costs to find them.

    python benchmarks/packing.py [--samples 20000] [--tokens 8192] [--repeats 3]

Lengths are log-normal (median 665 tokens, a few percent over 3,000), cut at the budget. In the second table four of five samples
also have up to 3,000 patches, in packs of twice as many patches as tokens; in the third of as many, now the tighter budget.
"cut at will" is the bound: the sums over the budget, rounded up.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import numpy as np

from vlkit.training.packs import Cost, Fill, StreamingPacker, fewest_packs, pack

Packs = list[list[int]]


def neighbours(costs: list[Cost], tokens: int, patches: int | None) -> Packs:
    """The order kept: a row is closed when the next sample does not fit."""
    packs: Packs = [[]]
    used = [0, 0]
    for key, cost in enumerate(costs):
        full = used[0] + cost[0] > tokens or (patches is not None and used[1] + cost[1] > patches)
        if full and packs[-1]:
            packs.append([])
            used = [0, 0]
        packs[-1].append(key)
        used = [used[0] + cost[0], used[1] + cost[1]]
    return packs


def streamed(costs: list[Cost], tokens: int, patches: int | None, open_rows: int) -> Packs:
    packer: StreamingPacker[int] = StreamingPacker(tokens, patches, open_rows=open_rows)
    packs: Packs = []
    for key, cost in enumerate(costs):
        packs += packer.add(key, *cost)
    return packs + packer.flush()


def table(title: str, costs: list[Cost], tokens: int, patches: int | None, repeats: int) -> None:
    ways: dict[str, Callable[[], Packs]] = {
        "one sample per row": lambda: [[key] for key in range(len(costs))],
        "neighbours": lambda: neighbours(costs, tokens, patches),
        "stream, 8 open rows": lambda: streamed(costs, tokens, patches, 8),
        "stream, 32 open rows": lambda: streamed(costs, tokens, patches, 32),
        "stream, 100 open rows": lambda: streamed(costs, tokens, patches, 100),
        "first-fit decreasing": lambda: pack(costs, tokens=tokens, patches=patches),
        "best-fit decreasing": lambda: pack(costs, tokens=tokens, patches=patches, method="best-fit"),
    }
    bound = fewest_packs(costs, tokens=tokens, patches=patches)
    print(f"\n{title}\n{'':24}{'rows':>7}{'tokens':>9}{'patches':>9}{'seconds':>9}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    fills: dict[str, Fill] = {}
    for _ in range(repeats):
        for name, way in random.sample(sorted(ways.items()), len(ways)):
            begun = time.perf_counter()
            packs = way()
            seconds[name].append(time.perf_counter() - begun)
            assert sorted(key for keys in packs for key in keys) == list(range(len(costs)))
            fills[name] = Fill.of([[costs[key] for key in keys] for keys in packs], tokens=tokens, patches=patches)
    print(f"{'cut at will':24}{bound:7}")
    for name in ways:
        fill = fills[name]
        seen = "" if fill.patch_fill is None else f"{fill.patch_fill:.1%}"
        print(f"{name:24}{fill.packs:7}{fill.token_fill:9.1%}{seen:>9}{min(seconds[name]):9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.5, 0.9, options.samples).astype(int).clip(1, options.tokens)
    seen = np.where(rng.random(options.samples) < 0.8, rng.integers(64, 3000, options.samples), 0)
    plain = [(int(length), 0) for length in lengths]
    visual = [(int(length), int(patches)) for length, patches in zip(lengths, seen, strict=True)]
    name = f"{options.samples} samples, {lengths.mean():.0f} tokens on average, packs of {options.tokens} tokens"
    table(name, plain, options.tokens, None, options.repeats)
    for patches in (2 * options.tokens, options.tokens):
        table(f"{name} and {patches} patches", visual, options.tokens, patches, options.repeats)


if __name__ == "__main__":
    main()
