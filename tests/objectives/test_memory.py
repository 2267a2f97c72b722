"""No loss makes a tensor of [tokens, vocab] or of [pairs, all pairs]; counted, not timed.

Measured with 48 tokens, dim 2, vocabulary 152064 and chunk 6, in MB alive at once: logits in full 87.6; chunked cross-entropy
4.87, which is one chunk and the gradient of the head; in bf16 6.69; log-probabilities 4.87, with entropies 9.43.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.objectives.memory import Made
from vlkit.objectives import chunked_cross_entropy, siglip_loss, token_log_probs

TOKENS, DIM, VOCAB, CHUNK = 48, 2, 152_064, 6
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def in_full(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ head.T, targets, reduction="sum")


def in_chunks(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return chunked_cross_entropy(hidden, head, targets, z_coefficient=1e-4, chunk=CHUNK)[0]


def log_probs(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_log_probs(hidden, head, targets, temperature=0.7, chunk=CHUNK).sum()


def entropies(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_log_probs(hidden, head, targets, temperature=0.7, chunk=CHUNK, entropy=True)[1].sum()


def made(loss: Loss, dtype: torch.dtype = torch.float32) -> Made:
    """By the loss and its backward, inputs left out."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, DIM, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCAB, DIM, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    with Made() as found:
        loss(hidden, head, targets).backward()
    return found


def test_one_chunk_of_logits_is_all_that_the_loss_holds() -> None:
    """Beside the head's gradient; of bf16 logits for a moment in both types, and the gradient too."""
    full, found = made(in_full), made(in_chunks)
    narrow = made(in_chunks, torch.bfloat16)
    assert full.largest == TOKENS * VOCAB
    assert found.largest == narrow.largest == CHUNK * VOCAB
    assert found.peak < 1.05 * 4 * (CHUNK + DIM) * VOCAB
    assert narrow.peak < 1.05 * (6 * CHUNK + 4 * DIM) * VOCAB
    assert found.peak < full.peak / 5


@pytest.mark.parametrize(("loss", "chunks"), [(log_probs, 1), (entropies, 2)])
def test_log_probs_hold_one_chunk_of_logits_and_entropies_two(loss: Loss, chunks: int) -> None:
    found = made(loss)
    assert found.largest == CHUNK * VOCAB
    assert found.peak < (1.2 * 4 * chunks * CHUNK + 4 * DIM) * VOCAB  # a fifth: which probabilities are 0, as bytes


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_pairs_are_met_by_chunks_and_not_kept(exchange: Any) -> None:
    given = [torch.randn(30, 2, requires_grad=True), torch.randn(30, 2, requires_grad=True)]
    scalars = [torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)]
    kept: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t)
    with Made() as found:
        with hooks:
            loss = siglip_loss(given[0], given[1], scalars[0], scalars[1], exchange=exchange, chunk=4)
        loss.backward()
    assert found.largest == 4 * 30
    assert max(kept) == 30 * 2
