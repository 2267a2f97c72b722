"""One optimizer step of Muon against torch's and timm's, and against the matrix products that it consists of.

    python benchmarks/muon.py                   # all sets, 2 threads
    python benchmarks/muon.py S demo --threads=1

Sets of weights:
    T     2 of the 12 layers of a transformer of width 768: 2304x768, 768x768, 3072x768, 768x3072 each (14 M parameters)
    E     12 expert matrices of 512x1408, as a stack, and one by one for the other optimizers (9 M)
    S     256 matrices of 64x64
    demo  the matrices of a small vision-language model with experts (0.8 M)

"products" is the time of the standard form's matrix products alone, in bf16: five steps of X X^T, R R and Z X for every
matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from harness import compare, machine, matmul_only, print_table
from torch import nn

from vlkit.optim import Muon

SETS: dict[str, list[tuple[int, ...]]] = {
    "T": [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 2,
    "E": [(12, 512, 1408)],
    "S": [(64, 64)] * 256,
    "demo": [(96, 96)] * 28 + [(256, 96), (96, 256)] * 4 + [(8, 64, 96)] * 6 + [(8, 96, 64)] * 2,
}
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


def run(name: str) -> None:
    shapes = SETS[name]
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
    candidates |= {
        "vlkit keller": Muon(parameters(shapes), 1e-3, **KELLER).step,
        "vlkit keller, standard form": Muon(parameters(shapes), 1e-3, ns_form="standard", **KELLER).step,
        "vlkit default": Muon(parameters(shapes), 1e-3).step,
        "vlkit ps4 schatten8": Muon(parameters(shapes), 1e-3, **FASTEST).step,
        "torch.optim.AdamW, fused": torch.optim.AdamW(parameters(shapes), 1e-3, fused=True).step,
        "products": products(shapes),
    }
    timings = compare(candidates, repeats=REPEATS[name], warmup=1)
    numel = sum(weight.numel() for weight in flat)
    print_table(f"set {name}: {len(flat)} matrices, {numel / 1e6:.1f} M", timings, baseline="torch.optim.Muon")
    for vlkit_name in ("vlkit keller", "vlkit default", "vlkit ps4 schatten8"):
        share = timings.cpu_speedup("products", over=vlkit_name)
        print(f"  {vlkit_name}: {share:.2f} times the CPU time of the products")


if __name__ == "__main__":
    options = [argument for argument in sys.argv[1:] if argument.startswith("--threads=")]
    torch.set_num_threads(int(options[-1].split("=")[1]) if options else 2)
    print(machine())
    for name in [argument for argument in sys.argv[1:] if not argument.startswith("--")] or list(SETS):
        run(name)
