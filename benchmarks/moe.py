"""Experts against transformers' grouped and eager experts, and against their own matrix products.

    python benchmarks/moe.py [--threads 2] [--repeats 15] [--only fp32 | bf16 | token | small]

Both sides have the same weights, tokens and routing. "products" is just the matrix products that the work consists of, expert by
expert over the same weights; "stream" reads the chosen experts' weights once and sums them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from harness import compare, machine, print_table
from torch import Tensor, nn

from vlkit.layers.moe import Experts


def reference(ours: Experts, kernel: str) -> nn.Module:
    """transformers' DeepSeek-V3 experts with our weights."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    num_experts, mlp_dim, dim = ours.gate.shape
    config = DeepseekV3Config(hidden_size=dim, moe_intermediate_size=mlp_dim, n_routed_experts=num_experts)
    config._experts_implementation = kernel
    with torch.device("meta"):
        theirs = DeepseekV3Experts(config)
    theirs.gate_up_proj = nn.Parameter(torch.cat([ours.gate, ours.up], dim=1).detach())
    theirs.down_proj = nn.Parameter(ours.down.detach().clone())
    return theirs


def products(ours: Experts, experts: Tensor, backward: bool) -> Callable[[], None]:
    """Three products per expert forward, six backward, into buffers that exist already."""
    num_experts, mlp_dim, dim = ours.gate.shape
    counts = torch.bincount(experts.flatten(), minlength=num_experts).tolist()
    gate, up, down = (stack.detach() for stack in (ours.gate, ours.up, ours.down))
    wide, narrow = gate.new_ones(max(counts), dim), gate.new_ones(max(counts), mlp_dim)
    to_wide, to_narrow = torch.empty_like(wide), torch.empty_like(narrow)
    grads = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(down)

    def run() -> None:
        for e, n in enumerate(counts):
            x, h = wide[:n], narrow[:n]
            torch.mm(x, gate[e].t(), out=to_narrow[:n])
            torch.mm(x, up[e].t(), out=to_narrow[:n])
            torch.mm(h, down[e].t(), out=to_wide[:n])
            if backward:
                torch.mm(x, down[e], out=to_narrow[:n])
                torch.mm(h, gate[e], out=to_wide[:n])
                torch.mm(h, up[e], out=to_wide[:n])
                torch.mm(h.t(), x, out=grads[0][e])
                torch.mm(h.t(), x, out=grads[1][e])
                torch.mm(x.t(), h, out=grads[2][e])

    return run


def setting(tokens: int, num_experts: int, top_k: int, dim: int, mlp_dim: int, dtype: torch.dtype) -> tuple:
    torch.manual_seed(0)
    ours = Experts(dim, mlp_dim, num_experts).to(dtype)
    x = torch.randn(tokens, dim).to(dtype)
    experts = torch.rand(tokens, num_experts).topk(top_k).indices
    weights = torch.rand(tokens, top_k)
    return ours, x, experts, weights


def many_tokens(title: str, sizes: tuple[int, ...], dtype: torch.dtype, repeats: int) -> None:
    ours, x, experts, weights = setting(*sizes, dtype)
    modules = {"vlkit": ours, "grouped": reference(ours, "grouped_mm"), "eager loop": reference(ours, "eager")}
    scale = float(ours(x, experts, weights).detach().float().abs().max())
    for name, module in modules.items():
        found = float((module(x, experts, weights) - ours(x, experts, weights)).detach().float().abs().max()) / scale
        assert found < (2e-2 if dtype == torch.bfloat16 else 1e-5), f"{name} differs by {found}"

    def forward(module: nn.Module) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                module(x, experts, weights)

        return run

    x.requires_grad_()
    weights.requires_grad_()
    direction = torch.randn_like(x)

    def both(module: nn.Module) -> Callable[[], object]:
        def run() -> None:
            module(x, experts, weights).backward(direction)
            x.grad = weights.grad = None
            module.zero_grad()

        return run

    for what, backward, made in (("forward", False, forward), ("forward + backward", True, both)):
        runs = {name: made(module) for name, module in modules.items()}
        runs["products"] = products(ours, experts, backward)
        timings = compare(runs, repeats=repeats)
        print_table(f"{title}, {what}", timings, baseline="grouped")
        print(f"  vlkit is at {timings.speedup('vlkit', over='products'):.0%} of the speed of its products alone")


def one_token(dtype: torch.dtype, repeats: int) -> None:
    ours, x, _, weights = setting(1, 64, 6, 1024, 704, dtype)
    theirs = {name: reference(ours, kernel) for name, kernel in (("grouped", "grouped_mm"), ("eager loop", "eager"))}
    choices = [torch.randperm(64)[:6] for _ in range(16)]  # in turn, so that no weight is in a cache from before

    def steps(run: Callable[[Tensor], object]) -> Callable[[], None]:
        def all_steps() -> None:
            with torch.no_grad():
                for chosen in choices:
                    run(chosen[None])

        return all_steps

    def stream(chosen: Tensor) -> None:
        for expert in chosen[0].tolist():
            ours.gate[expert].sum(), ours.up[expert].sum(), ours.down[expert].sum()

    runs = {"vlkit": steps(lambda chosen: ours(x, chosen, weights)), "stream": steps(stream)}
    for name, module in theirs.items():
        runs[name] = steps(lambda chosen, module=module: module(x, chosen, weights))
    timings = compare(runs, repeats=repeats)
    print_table(f"64 experts of 704x1024, top-6, 16 single tokens, {dtype}", timings, baseline="grouped")
    print(f"  vlkit takes {timings.speedup('stream', over='vlkit'):.2f} x the time of reading the chosen experts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=("fp32", "bf16", "token", "small"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    only, repeats = options.only, options.repeats
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if only in (None, name):
            many_tokens(f"64 experts of 704x1024, top-6, 2048 tokens, {name}", (2048, 64, 6, 1024, 704), dtype, repeats)
        if only in (None, "token"):
            one_token(dtype, repeats)
    if only in (None, "small"):
        title = "8 experts of 96x64, top-2, 1000 tokens, fp32"
        many_tokens(title, (1000, 8, 2, 64, 96), torch.float32, 10 * repeats)


if __name__ == "__main__":
    main()
