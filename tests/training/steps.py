"""A few training steps on every rank and on one process, and how far they end apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlkit.models import VisionLanguageModel
from vlkit.models.factory import create_model
from vlkit.objectives import next_token_targets
from vlkit.optim import Muon, muon_param_groups
from vlkit.packing import Batch
from vlkit.testing import random_batch

Sequences = Sequence[tuple[int, Sequence[tuple[int, ...]]]]

# What each rank sees: rank 1 no image at all, rank 3 nothing to learn. Counts of tokens differ everywhere.
SHARES: tuple[Sequences, ...] = (
    ((5, [(1, 2)]), (3, [])),
    ((7, []), (4, [])),
    ((6, [(2, 1), (1, 1)]),),
    ((1, [(1, 1)]),),
)

Optimizer = Callable[[VisionLanguageModel], torch.optim.Optimizer]


def adamw(model: VisionLanguageModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def muon(model: VisionLanguageModel) -> torch.optim.Optimizer:
    """Products in the dtype of the weights: in bf16, gradients that differ in the last bit would be rounded apart."""
    return Muon(muon_param_groups(model), lr=1e-3, ns_dtype=next(model.parameters()).dtype)


def make(name: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> VisionLanguageModel:
    """The same weights at every call."""
    torch.manual_seed(0)
    return create_model(name, dtype=dtype, **overrides)


def shares(model: VisionLanguageModel, num_ranks: int, step: int) -> list[Batch]:
    """What every rank sees in a step."""
    return [random_batch(model, SHARES[rank % len(SHARES)], seed=10 * step + rank) for rank in range(num_ranks)]


def num_targets(batches: Iterable[Batch]) -> int:
    found = 0
    for batch in batches:
        assert batch.labels is not None
        found += int((next_token_targets(batch.labels, batch.ids.layout) != -100).sum())
    return found


def backward(model: VisionLanguageModel, batch: Batch, share: float) -> Tensor:
    """Gradients of the summed loss, divided by `share`. Returns the sum."""
    out = model(batch)
    assert out.loss is not None
    total: Tensor = out.loss * out.num_targets
    (total / share).backward()
    return total.detach()


def train_whole(
    model: VisionLanguageModel, num_ranks: int, *, steps: int = 5, optimizer: Optimizer = adamw
) -> VisionLanguageModel:
    """One process sees what all ranks see, as one batch."""
    chosen = optimizer(model)
    for step in range(steps):
        batches = shares(model, num_ranks, step)
        backward(model, Batch.concat(batches), num_targets(batches))
        chosen.step()
        chosen.zero_grad()
    return model


def train_share(
    model: VisionLanguageModel, rank: int, num_ranks: int, *, steps: int = 5, optimizer: Optimizer = adamw
) -> VisionLanguageModel:
    """One of many ranks; the mean over ranks is taken of gradients, so each divides by its share of the count."""
    chosen = optimizer(model)
    for step in range(steps):
        batches = shares(model, num_ranks, step)
        backward(model, batches[rank], num_targets(batches) / num_ranks)
        chosen.step()
        chosen.zero_grad()
    return model


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, whether it is sharded or not."""
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def furthest(ours: nn.Module, theirs: nn.Module, *, of: Callable[[Tensor], Tensor | None] = lambda p: p) -> float:
    """Largest difference of two models' parameters, or of their gradients."""
    found = 0.0
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        one, two = of(a), of(b)
        assert (one is None) == (two is None), f"{name} has a gradient on one side only"
        if one is not None and two is not None:
            found = max(found, float((whole(one) - whole(two)).abs().max()))
    return found


def gradient(parameter: Tensor) -> Tensor | None:
    return parameter.grad
