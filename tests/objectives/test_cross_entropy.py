"""The chunked loss equals torch's cross-entropy on full logits, and never trains across a boundary."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlkit.errors import TokenError
from vlkit.objectives import chunked_cross_entropy, next_token_targets
from vlkit.packing import Layout


def full_logits(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ head.T).float(), targets, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_equals_full_logits_with_gradients(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, -100, 10, 3, 3, -100, -100, 7, 1, 2, 0, -100, 4])
    ours, count = chunked_cross_entropy(hidden, head, targets, chunk=chunk)
    got = torch.autograd.grad(ours * 0.5, (hidden, head))
    theirs = F.cross_entropy(hidden @ head.T, targets, ignore_index=-100, reduction="sum")
    want = torch.autograd.grad(theirs * 0.5, (hidden, head))
    assert count == 9
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_bf16_head_gradient_is_accumulated_in_fp32() -> None:
    """512 chunks of one row: adding them up in bf16 would stop growing after 256 equal summands."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = chunked_cross_entropy(hidden, head, torch.zeros(512, dtype=torch.long), chunk=1)
    loss.backward()
    assert head.grad is not None
    assert head.grad.flatten().tolist() == [-256.0, 256.0]


def test_no_targets_give_zero_loss_and_zero_gradients() -> None:
    hidden, head = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss, count = chunked_cross_entropy(hidden, head, torch.full((4,), -100))
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert hidden.grad is not None
    assert head.grad is not None
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_last_token_of_an_item_has_no_target() -> None:
    labels = torch.tensor([1, 2, 3, 4, 5, 6])
    assert next_token_targets(labels, Layout((2, 1, 3))).tolist() == [2, -100, -100, 5, 6, -100]


@pytest.mark.parametrize("bad", [-1, 5])
def test_target_outside_the_vocabulary_is_named(bad: int) -> None:
    with pytest.raises(TokenError, match=str(bad)):
        chunked_cross_entropy(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, bad]))
