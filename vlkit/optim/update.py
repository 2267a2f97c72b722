"""The stages of one Muon step, as functions on lists of tensors.

    gradient -> momentum, Nesterov -> orthogonalise -> weight decay, then subtract lr * factor * unit

All but the orthogonalisation are elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vlkit.optim.newton_schulz import BATCH_BYTES, BATCHED_BELOW, NewtonSchulz

AdjustLr: TypeAlias = Literal["match_rms_adamw", "original", "spectral_unclamped", "none"]

ADJUST_LR: dict[str, Callable[[int, int, float], float]] = {
    # An orthogonal matrix has elements of size 1 / sqrt(max(rows, cols)); AdamW's updates are 0.2 to 0.4.
    "match_rms_adamw": lambda rows, cols, rms: rms * math.sqrt(max(rows, cols)),
    "original": lambda rows, cols, rms: math.sqrt(max(1.0, rows / cols)),
    "spectral_unclamped": lambda rows, cols, rms: math.sqrt(rows / cols),
    "none": lambda rows, cols, rms: 1.0,
}


@dataclass
class Block:
    """Units of one parameter that are treated together, as views [count, rows, cols]."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor


def batches(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Blocks of equal unit shape, device and dtypes: small units as many together as stay near the caches, large
    ones one by one.
    """
    waiting: dict[tuple[object, ...], list[Block]] = {}
    for block in blocks:
        count, rows, cols = block.weight.shape
        if min(rows, cols) >= BATCHED_BELOW:
            for i in range(count):
                part = slice(i, i + 1)
                yield [Block(block.weight[part], block.grad[part], block.momentum[part])]
        else:
            key = (rows, cols, block.weight.device, block.weight.dtype, block.grad.dtype, block.momentum.dtype)
            waiting.setdefault(key, []).append(block)
    for equal in waiting.values():
        batch: list[Block] = []
        size = 0
        for block in equal:
            if batch and size + block.weight.numel() * 2 > BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(block)
            size += block.weight.numel() * 2
        yield batch


def update_momentum(blocks: list[Block], momentum: float, nesterov: bool) -> list[Tensor]:
    """Move the running means towards the gradients, and return the directions; elementwise, so exact on any slice of
    a unit.
    """
    state = [block.momentum for block in blocks]
    wide = torch.promote_types(state[0].dtype, torch.float32)
    means = _cast(state, wide)
    grads = _cast([block.grad for block in blocks], wide)
    torch._foreach_lerp_(means, grads, 1 - momentum)
    if means[0] is not state[0]:
        torch._foreach_copy_(state, means)
    return list(torch._foreach_lerp(grads, means, momentum)) if nesterov else means


def orthogonalize_units(directions: list[Tensor], newton_schulz: NewtonSchulz) -> list[Tensor]:
    """The orthogonalised units, in the dtype of the directions; one batched product for all."""
    dtype = newton_schulz.compute_dtype(directions[0].device)
    if len(directions) == 1:
        return [newton_schulz(directions[0].to(dtype)).to(directions[0].dtype)]
    counts = [len(direction) for direction in directions]
    stacked = directions[0].new_empty(sum(counts), *directions[0].shape[1:], dtype=dtype)
    torch._foreach_copy_(list(stacked.split(counts)), directions)
    return list(newton_schulz(stacked).to(directions[0].dtype).split(counts))


def apply_update(weights: list[Tensor], updates: list[Tensor], decay: float, scale: float) -> None:
    """weight <- decay * weight + scale * update, rounded once."""
    wide = _cast(weights, updates[0].dtype)
    if decay != 1.0:
        torch._foreach_mul_(wide, decay)
    torch._foreach_add_(wide, updates, alpha=scale)
    if wide[0] is not weights[0]:
        torch._foreach_copy_(weights, wide)


def adamw_update(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> None:
    """One step of AdamW on weights and state, in the dtype of the state; elementwise."""
    weights = [parameter.to(state["exp_avg"].dtype) for parameter, state in zip(parameters, states, strict=True)]
    grads = [grad.to(state["exp_avg"].dtype) for grad, state in zip(grads, states, strict=True)]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    adamw(
        weights,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        foreach=False if fused else None,
        fused=fused,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    for parameter, weight in zip(parameters, weights, strict=True):
        if weight is not parameter:
            parameter.copy_(weight)


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return tensors if tensors[0].dtype == dtype else [tensor.to(dtype) for tensor in tensors]


def global_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm over all gradients, accumulated in fp32 (or fp64), on the device of the first."""
    wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    norms = torch._foreach_norm(grads, 2, dtype=wide)
    return torch.linalg.vector_norm(torch.stack([norm.to(grads[0].device) for norm in norms]))
