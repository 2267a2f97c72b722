"""One optimizer step of Muon against torch's and timm's, and against the matrix products that it consists of.

    python benchmarks/muon.py                   # all sets, 2 threads
    python benchmarks/muon.py S demo --threads=1
    python benchmarks/muon.py T E --layers=12 --experts=64 --repeats=3    # whole, instead of a sixth: 5 GB, minutes

Sets of weights:
    T     layers of a transformer of width 768: 2304x768, 768x768, 3072x768, 768x3072 each (2 layers, 14 M parameters)
    E     expert matrices of 512x1408, as a stack, and one by one for the other optimizers (12 experts, 9 M)
    S     256 matrices of 64x64
    demo  the matrices of a small vision-language model with experts (0.8 M)

Besides torch's and timm's Muon runs a plain one, the equations written out. "products" is the time of the standard form's matrix
products alone, in bf16: five steps of X X^T, R R and Z X for every matrix. "... products" are exactly those that one step of
vlkit did, recorded and repeated: what is above their time is copies, elementwise work and Python.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import compare, machine, matmul_only, print_table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlkit.optim import Muon


def weights_of(name: str, layers: int, experts: int) -> list[tuple[int, ...]]:
    """The shapes of a set."""
    return {
        "T": [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * layers,
        "E": [(experts, 512, 1408)],
        "S": [(64, 64)] * 256,
        "demo": [(96, 96)] * 28 + [(256, 96), (96, 256)] * 4 + [(8, 64, 96)] * 6 + [(8, 96, 64)] * 2,
    }[name]


REPEATS = {"T": 5, "E": 5, "S": 20, "demo": 20}
KELLER = {"ns": "keller"}
FASTEST = {"ns": "ps4", "ns_norm": "schatten8"}


def parameters(shapes: Sequence[tuple[int, ...]], *, flat: bool = False) -> list[nn.Parameter]:
    """Parameters with gradients; flat gives the experts of a stack one by one, for optimizers that know only
    matrices.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        weights, grads = (torch.randn(shape, generator=generator) for _ in range(2))
        pairs = zip(weights, grads, strict=True) if flat and len(shape) == 3 else [(weights, grads)]
        for weight, grad in pairs:
            made.append(nn.Parameter(weight.clone()))
            made[-1].grad = grad.clone()
    return made


def products(shapes: Sequence[tuple[int, ...]], steps: int = 5) -> Callable[[], None]:
    calls = []
    for shape in shapes:
        short, long = sorted(shape[-2:])
        one_step = [(short, long, short), (short, short, short), (short, short, long)]
        calls += one_step * steps * (shape[0] if len(shape) == 3 else 1)
    return matmul_only(calls, torch.bfloat16)


class Recorder(TorchDispatchMode):
    """Notes the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        place = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(func._schema.name.removeprefix("aten::"))
        if place is not None:
            self.shapes.append((args[place].shape, args[place + 1].shape))
        return func(*args, **(kwargs or {}))


def own_products(step: Callable[[], object]) -> Callable[[], None]:
    """A function that does the products of one step, and nothing else."""
    with Recorder() as recorder:
        step()
    operands = {pair: tuple(torch.randn(shape).bfloat16() for shape in pair) for pair in set(recorder.shapes)}
    results = {pair: a @ b for pair, (a, b) in operands.items()}

    def run() -> None:
        for pair in recorder.shapes:
            torch.matmul(*operands[pair], out=results[pair])

    return run


def plain(parameters: Sequence[nn.Parameter], lr: float) -> Callable[[], None]:
    """Muon as its equations say it."""
    momenta = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step() -> None:
        for weight, momentum in zip(parameters, momenta, strict=True):
            assert weight.grad is not None
            momentum.lerp_(weight.grad, 0.05)
            x: Tensor = weight.grad.lerp(momentum, 0.95).bfloat16()
            tall = x.shape[0] > x.shape[1]
            x = x.mT if tall else x
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                r = x @ x.mT
                x = 3.4445 * x + (-4.7750 * r + 2.0315 * r @ r) @ x
            weight.mul_(1 - 0.1 * lr).add_(x.mT if tall else x, alpha=-0.2 * lr * max(weight.shape) ** 0.5)

    return step


def run(name: str, shapes: list[tuple[int, ...]], repeats: int) -> None:
    flat = parameters(shapes, flat=True)
    candidates: dict[str, Callable[[], object]] = {
        "torch.optim.Muon": torch.optim.Muon(flat, 1e-3, adjust_lr_fn="match_rms_adamw").step
    }
    try:
        from timm.optim import Muon as TimmMuon
    except ImportError:
        pass
    else:
        candidates["timm Muon"] = TimmMuon(parameters(shapes, flat=True), 1e-3).step
    candidates["plain"] = plain(parameters(shapes, flat=True), 1e-3)
    ours = {"vlkit keller": KELLER, "vlkit default": {}, "vlkit ps4 schatten8": FASTEST}
    for own, options in ours.items():
        candidates[own] = step = Muon(parameters(shapes), 1e-3, **options).step
        candidates[f"{own} products"] = own_products(step)
    candidates["torch.optim.AdamW, fused"] = torch.optim.AdamW(parameters(shapes), 1e-3, fused=True).step
    candidates["products"] = products(shapes)
    timings = compare(candidates, repeats=repeats, warmup=1)
    numel = sum(weight.numel() for weight in flat)
    print_table(f"set {name}: {len(flat)} matrices, {numel / 1e6:.1f} M", timings, baseline="torch.optim.Muon")
    for own in ours:
        share = timings.cpu_speedup("products", over=own)
        floor = timings.cpu_speedup(f"{own} products", over=own)
        best = min(timings.cpu_seconds[own]) / min(timings.cpu_seconds[f"{own} products"])
        print(
            f"  {own}: {share:.2f} times the CPU time of the standard form's products, "
            f"{floor:.2f} times its own (best to best {best:.2f})"
        )
    best_peer = min(timings.cpu_seconds["torch.optim.Muon"])
    ratios = ", ".join(f"{own} {best_peer / min(timings.cpu_seconds[own]):.2f}" for own in ours)
    print(f"  best CPU time to best: {ratios}", flush=True)


def option(name: str, default: int) -> int:
    found = [argument for argument in sys.argv[1:] if argument.startswith(f"--{name}=")]
    return int(found[-1].split("=")[1]) if found else default


if __name__ == "__main__":
    torch.set_num_threads(option("threads", 2))
    print(machine())
    for name in [argument for argument in sys.argv[1:] if not argument.startswith("--")] or list(REPEATS):
        run(name, weights_of(name, option("layers", 2), option("experts", 12)), option("repeats", REPEATS[name]))
