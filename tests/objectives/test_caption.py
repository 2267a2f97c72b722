"""Parts of the caption loss add up to the mean over all tokens of a step, and only -100 is left out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlkit.errors import LayoutError
from vlkit.objectives import CAPTION_WEIGHT, caption_loss, next_token_targets
from vlkit.packing import Layout

LENGTHS = (3, 1, 5)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return hidden, head, next_token_targets(torch.tensor([1, 0, 5, 2, 0, 0, -100, 3, 4]), Layout(LENGTHS))


def test_packs_add_up_to_the_mean_of_the_step() -> None:
    """Captions of a pack, or each in a pack of its own: one loss and the same gradients, those of torch's mean."""
    hidden, head, targets = inputs()
    assert targets.tolist() == [0, 5, -100, -100, 0, -100, 3, 4, -100]  # id 0 is learnt
    want = F.cross_entropy(hidden @ head.T, targets, ignore_index=-100)
    parts = [
        caption_loss(h, head, t, 5, chunk=2) for h, t in zip(hidden.split(LENGTHS), targets.split(LENGTHS), strict=True)
    ]
    for loss in (caption_loss(hidden, head, targets, torch.tensor(5)), sum(parts, torch.zeros(()))):
        torch.testing.assert_close(loss, want, rtol=1e-13, atol=0)
        got = torch.autograd.grad(loss, (hidden, head))
        torch.testing.assert_close(got, torch.autograd.grad(want, (hidden, head), retain_graph=True))


def test_a_step_without_captions_has_the_loss_zero() -> None:
    hidden, head, targets = inputs()
    loss = caption_loss(hidden, head, torch.full_like(targets, -100), 0)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_captions_count_twice_beside_the_contrastive_loss() -> None:
    assert CAPTION_WEIGHT == 2


def test_a_denominator_of_less_than_this_pack_is_refused() -> None:
    hidden, head, targets = inputs()
    with pytest.raises(LayoutError, match="5 targets, but all packs of the step are said to have 4"):
        caption_loss(hidden, head, targets, 4)
