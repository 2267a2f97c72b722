"""Timing that can be trusted on a busy machine: everything that is compared runs interleaved in one process.

    timings = compare({"vlkit": ours, "transformers": theirs}, repeats=10, warmup=2)
    print_table("forward, 3 images", timings, baseline="transformers")

A benchmark is a plain script: `python benchmarks/NAME.py`. It should also print what the matrix products alone cost, so
that a ratio to another implementation is not mistaken for a ratio to what the machine can do:

    ceiling = matmul_ceiling([(tokens, dim, 3 * dim), (tokens, dim, dim)], torch.float32)     # seconds
    compare({"vlkit": ours, "matrix products": matmul_only([(tokens, dim, 3 * dim)], torch.float32)}, ...)
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timings:
    """Seconds of every repetition, by name; repetition i of all names ran within the same round.

    Attributes:
        seconds: Wall time of each call.
        cpu_seconds: CPU time of each call, over all threads of the process. It is the steadier number where other
            processes want the same cores, and says nothing about a GPU.
    """

    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def min(self, name: str) -> float:
        return min(self.seconds[name])

    def speedup(self, name: str, *, over: str) -> float:
        """How many times faster `name` is than `over`: the median over rounds of the ratio within a round."""
        return _median_ratio(self.seconds[over], self.seconds[name])

    def cpu_speedup(self, name: str, *, over: str) -> float:
        """The same from CPU time."""
        return _median_ratio(self.cpu_seconds[over], self.cpu_seconds[name])


def compare(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 10,
    warmup: int = 2,
    setup: Callable[[], object] | None = None,
) -> Timings:
    """Time functions in turn, A B C A B C ..., so that all of them see the same moods of the machine.

    Args:
        functions: What to time, by name.
        repeats: Timed rounds.
        warmup: Rounds before that, not counted.
        setup: Called before every single call, outside the timing (for example to put gradients back).
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_ in range(-warmup, repeats):
            first = round_ % len(names)  # who goes first changes: nobody always inherits the same caches
            for name in names[first:] + names[:first]:
                if setup is not None:
                    setup()
                _wait_for_device()
                cpu, wall = time.process_time(), time.perf_counter()
                functions[name]()
                _wait_for_device()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                if round_ >= 0:
                    seconds[name].append(wall)
                    cpu_seconds[name].append(cpu)
    finally:
        if collecting:
            gc.enable()
    return Timings(seconds, cpu_seconds)


def matmul_only(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: str = "cpu") -> Callable[[], None]:
    """A function that does just these (m, k) @ (k, n) products, to be timed beside what contains them."""
    operands = {
        (m, k, n): (torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype))
        for m, k, n in set(shapes)
    }
    results = {shape: a @ b for shape, (a, b) in operands.items()}

    def run() -> None:
        for shape in shapes:
            torch.mm(*operands[shape], out=results[shape])

    return run


def matmul_ceiling(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: str = "cpu", repeats: int = 5
) -> float:
    """Seconds that just these (m, k) @ (k, n) products take on this machine, median of a few runs."""
    return compare({"products": matmul_only(shapes, dtype, device)}, repeats=repeats, warmup=1).median("products")


def machine() -> str:
    """CPU, threads, torch; with a GPU its name too. Every printed figure belongs to such a line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((s.split(":")[1].strip() for s in cpuinfo.read_text().splitlines() if "model name" in s), model)
        flags = cpuinfo.read_text()
        model += "".join(f", {flag}" for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    gpu = f" | {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model} | {torch.get_num_threads()} threads | torch {torch.__version__}{gpu}"


def print_table(title: str, timings: Timings, *, baseline: str | None = None) -> None:
    """Median and best time per name, and how many times faster than the baseline each is, by wall and by CPU time."""
    width = max(len(name) for name in timings.seconds)
    print(f"\n{title}")
    header = f"  {'':{width}}  {'median':>10}  {'best':>10}"
    print(header + (f"  {'speedup':>8}  {'by cpu':>7}  (over {baseline})" if baseline else ""))
    for name in timings.seconds:
        row = f"  {name:{width}}  {readable(timings.median(name)):>10}  {readable(timings.min(name)):>10}"
        if baseline is not None:
            row += f"  {timings.speedup(name, over=baseline):7.2f}x  {timings.cpu_speedup(name, over=baseline):6.2f}x"
        print(row, flush=True)


def readable(seconds: float) -> str:
    """0.01234 -> '12.34 ms'."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"


def _median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True) if b > 0)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
