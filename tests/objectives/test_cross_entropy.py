"""The chunked loss equals torch's cross-entropy on full logits, and never trains across a boundary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlkit.errors import LayoutError, TokenError
from vlkit.objectives import chunked_cross_entropy, next_token_targets
from vlkit.packing import Layout

TARGETS = torch.tensor([0, -100, 10, 3, 3, -100, -100, 7, 1, 2, 0, -100, 4])


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 5, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.randn(11, 5, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, head, torch.rand(13, generator=generator, dtype=dtype)


def full_logits(
    hidden: torch.Tensor, head: torch.Tensor, weights: torch.Tensor | float = 1.0, z_coefficient: float = 0.0
) -> torch.Tensor:
    """torch's cross-entropy of logits in full, and the squared logsumexp beside it."""
    logits = hidden @ head.T
    losses = F.cross_entropy(logits, TARGETS, ignore_index=-100, reduction="none")
    squares = torch.where(TARGETS == -100, 0, logits.logsumexp(-1).square())
    return (weights * (losses + z_coefficient * squares)).sum()


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("z_coefficient", [0.0, 0.03])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_full_logits_with_gradients(chunk: int, z_coefficient: float, weighted: bool) -> None:
    hidden, head, weights = inputs()
    given = weights if weighted else None
    ours, count = chunked_cross_entropy(hidden, head, TARGETS, weights=given, z_coefficient=z_coefficient, chunk=chunk)
    got = torch.autograd.grad(ours * 0.5, (hidden, head))
    theirs = full_logits(hidden, head, weights if weighted else 1.0, z_coefficient)
    want = torch.autograd.grad(theirs * 0.5, (hidden, head))
    assert count == 9
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_equals_torchs_own_chunked_operation() -> None:
    hidden, head, _ = inputs()
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=4)
    theirs = F.linear_cross_entropy(hidden, head, TARGETS, reduction="sum", options=options)
    want = torch.autograd.grad(theirs, (hidden, head))
    ours, _ = chunked_cross_entropy(hidden, head, TARGETS, chunk=4)
    got = torch.autograd.grad(ours, (hidden, head))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_finite_differences_agree() -> None:
    hidden, head, weights = inputs()
    weights.requires_grad_()
    assert gradcheck(
        lambda h, w, f: chunked_cross_entropy(h, w, TARGETS, weights=f, z_coefficient=0.1, chunk=4)[0],
        (hidden, head, weights),
    )


def test_every_token_with_a_target_may_have_one() -> None:
    hidden, head, _ = inputs()
    targets = TARGETS.clamp(min=0)
    ours, count = chunked_cross_entropy(hidden, head, targets, chunk=5)
    assert count == 13
    torch.testing.assert_close(ours, F.cross_entropy(hidden @ head.T, targets, reduction="sum"), rtol=1e-12, atol=0)


def test_what_is_frozen_costs_no_gradient() -> None:
    """The other gradient is the same; and without recorded gradients no product but the logits is computed."""
    hidden, head, _ = inputs()
    want = torch.autograd.grad(chunked_cross_entropy(hidden, head, TARGETS)[0], (hidden, head))
    with CountProducts() as of_hidden:
        loss, _ = chunked_cross_entropy(hidden, head.detach(), TARGETS, chunk=3)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], want[0], rtol=1e-12, atol=1e-14)
    with CountProducts() as of_head:
        loss, _ = chunked_cross_entropy(hidden.detach(), head, TARGETS, chunk=3)
    torch.testing.assert_close(torch.autograd.grad(loss, head)[0], want[1], rtol=1e-12, atol=1e-14)
    with CountProducts() as of_none, torch.no_grad():
        chunked_cross_entropy(hidden, head, TARGETS, chunk=3)
    assert (of_hidden.products, of_head.products, of_none.products) == (6, 6, 3)


class CountProducts(TorchDispatchMode):
    def __enter__(self) -> CountProducts:
        self.products = 0
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


def test_products_in_bf16_are_not_rounded_before_they_are_added() -> None:
    """256 chunks of one row, whose gradient 1 + 2^-6 + 2^-9 no bf16 holds: rounded one by one they would add up to 260."""
    hidden, head = torch.ones(256, 1), torch.zeros(2, 1, requires_grad=True)
    weights = torch.full((256,), 2 * (1 + 2**-6 + 2**-9))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = chunked_cross_entropy(hidden, head, torch.zeros(256, dtype=torch.long), weights=weights, chunk=1)
    loss.backward()
    assert head.grad is not None
    assert head.grad.flatten().tolist() == [-260.5, 260.5]


def test_autocast_computes_products_narrow_and_the_rest_wide() -> None:
    hidden, head, _ = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = chunked_cross_entropy(hidden, head, TARGETS)
    want, _ = chunked_cross_entropy(hidden.bfloat16(), head.bfloat16(), TARGETS)
    assert found.dtype == torch.float32
    assert torch.equal(found, want)
    found.backward()
    assert head.grad is not None
    assert head.grad.dtype == torch.float32


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


def test_other_numbers_of_weights_are_mistakes() -> None:
    hidden, head, weights = inputs()
    with pytest.raises(LayoutError, match="one weight per target"):
        chunked_cross_entropy(hidden, head, TARGETS, weights=weights[1:])


def test_a_kept_graph_gives_the_same_gradients_again() -> None:
    hidden, head, _ = inputs()
    loss = chunked_cross_entropy(hidden, head, TARGETS, chunk=4)[0] * 0.3
    first = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    last = torch.autograd.grad(loss, (hidden, head))
    for once, before, again in zip(first, kept, last, strict=True):
        assert torch.equal(once, before)
        assert torch.equal(once, again)


def test_the_head_has_one_gradient_and_no_copy() -> None:
    """What the backward gives is the memory that the forward filled."""
    _, head, _ = inputs()
    hidden = inputs()[0].detach()
    loss = chunked_cross_entropy(hidden, head, TARGETS, chunk=4)[0]
    saved = loss.grad_fn.saved_tensors[1].data_ptr()
    (loss * 0.3).backward()
    assert head.grad is not None
    assert head.grad.data_ptr() == saved
