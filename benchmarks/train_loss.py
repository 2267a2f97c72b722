"""The loss of a large vocabulary: memory and time, forward and backward, of four ways to compute it.

full logits    hidden @ head^T, then torch's cross_entropy
vlkit          chunked_cross_entropy, logits of a few hundred tokens at a time
torch          torch.nn.functional.linear_cross_entropy, with its own choice of chunks and with ours
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import compare, print_table
from peak import peak_bytes
from torch import Tensor

from vlkit.objectives import chunked_cross_entropy

VOCABULARY = 151_936  # of Qwen2 and Qwen3


def full(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ head.T, targets, reduction="sum")


def own(chunk: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda hidden, head, targets: chunked_cross_entropy(hidden, head, targets, chunk=chunk)[0]


def torchs(chunk: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    options = torch.nn.LinearCrossEntropyOptions()
    if chunk is not None:
        options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=chunk)
    return lambda hidden, head, targets: F.linear_cross_entropy(hidden, head, targets, reduction="sum", options=options)


def ways() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    made = {"full logits": full}
    made |= {f"vlkit, {chunk} tokens": own(chunk) for chunk in (512, 256)}
    if hasattr(F, "linear_cross_entropy"):
        made |= {"torch, 256 tokens": torchs(256), "torch, its own chunks": torchs(None)}
    return made


def inputs(tokens: int, dim: int, vocabulary: int, learns_head: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator).requires_grad_()
    head = (torch.randn(vocabulary, dim, generator=generator) * 0.02).requires_grad_(learns_head)
    return hidden, head, torch.randint(vocabulary, (tokens,), generator=generator)


def step(name: str, tokens: int, dim: int, vocabulary: int, learns_head: bool) -> Callable[[], Tensor]:
    """Forward and backward; gradients are made anew each time."""
    hidden, head, targets = inputs(tokens, dim, vocabulary, learns_head)
    loss_of = ways()[name]

    def run() -> Tensor:
        hidden.grad = head.grad = None
        loss = loss_of(hidden, head, targets)
        loss.backward()
        return loss.detach()

    return run


def agree(tokens: int = 600, dim: int = 64, vocabulary: int = 5000) -> None:
    """All ways give the same loss and gradients, before any is timed."""
    found = {}
    for name, loss_of in ways().items():
        hidden, head, targets = inputs(tokens, dim, vocabulary, True)
        loss = loss_of(hidden, head, targets)
        found[name] = (loss.detach(), *torch.autograd.grad(loss, [hidden, head]))
    for name, tensors in found.items():
        for ours, theirs in zip(tensors, found["full logits"], strict=True):
            difference = float((ours - theirs).abs().max() / theirs.abs().max())
            assert difference < 2e-6, f"{name} differs by {difference:.1e}"


def run(repeats: int, tokens: int = 3072, dim: int = 512) -> dict[str, Any]:
    """Memory in fresh processes at the full vocabulary; time at a smaller one, interleaved."""
    agree()
    memory: dict[str, dict[str, float]] = {}
    left_out = {
        "head learns": ["torch, its own chunks"],
        "head is frozen": ["torch, its own chunks", "torch, 256 tokens"],
    }
    for title, learns_head in (("head learns", True), ("head is frozen", False)):
        memory[title] = {}
        print(f"\nloss of {tokens} tokens of {dim}, vocabulary {VOCABULARY}, fp32, forward + backward, {title}")
        for name in ways():
            if name in left_out[title]:
                continue
            memory[title][name] = peak_bytes(step, name, tokens, dim, VOCABULARY, learns_head) / 2**20
            share = memory[title][name] / memory[title]["full logits"]
            print(f"  {name:22}  {memory[title][name]:7.0f} MiB  {share:6.3f} of full logits", flush=True)
    timed = {"tokens": 1024, "dim": 256, "vocabulary": 32_000}
    steps = {name: step(name, *timed.values(), True) for name in ways()}
    timings = compare(steps, repeats=repeats, warmup=1)
    print_table(f"time: {timed}", timings, baseline="full logits")
    return {
        "tokens": tokens,
        "dim": dim,
        "vocabulary": VOCABULARY,
        "peak_mib": memory,
        "timed": timed,
        "median_seconds": {name: timings.median(name) for name in steps},
        "faster_than_full_logits_by_cpu": {name: timings.cpu_speedup(name, over="full logits") for name in steps},
    }
