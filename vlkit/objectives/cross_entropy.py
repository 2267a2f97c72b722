"""Next-token cross-entropy without ever holding the logits of all tokens.

    hidden [tokens, dim] --rows that have a target--> chunks of rows --@ head^T--> logits [chunk, vocab] --> sum of losses

The gradient of a chunk's logits is softmax - onehot. It is known as soon as the logits are, so it is folded into the gradients
of the hidden rows and of the head at once, and the logits are dropped: the peak is one chunk, not tokens x vocab.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlkit.errors import LayoutError, TokenError
from vlkit.packing import Layout

IGNORE = -100
"""The label of a token that carries no loss, as on the Hub."""


def next_token_targets(labels: Int[Tensor, " tokens"], layout: Layout) -> Int[Tensor, " tokens"]:
    """Shift labels by one inside every item: the target of token t is labels[t + 1], the last token of an item has none.

    Args:
        labels: Aligned with the ids; -100 where nothing is to be learnt.
        layout: One item per sequence, so that no sequence predicts the next one's first token.
    """
    targets = torch.full_like(labels, IGNORE)
    targets[:-1] = labels[1:]
    ends = layout.cu_seqlens(labels.device)[1:].long() - 1
    targets[ends] = IGNORE
    return targets


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log softmax(hidden @ head^T)[target], with both gradients made on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Tensor:
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Many chunks add up in the head's gradient: in bf16 the small ones would be rounded away.
        grad_head = torch.zeros(head.shape, dtype=accumulate, device=head.device) if needs_head else None
        total = hidden.new_zeros((), dtype=accumulate)
        for start in range(0, hidden.shape[0], chunk):
            rows, target = hidden[start : start + chunk], targets[start : start + chunk, None]
            logits = (rows @ head.T).to(accumulate)  # [chunk, vocab]
            log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (log_sum - logits.gather(1, target)).sum()
            if not (needs_hidden or needs_head):
                continue
            grad = logits.sub_(log_sum).exp_()  # softmax
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            grad = grad.to(head.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[start : start + chunk])
            if grad_head is not None:
                if grad.dtype == accumulate:
                    grad_head.addmm_(grad.T, rows)
                else:
                    grad_head += grad.T @ rows
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grad_outputs
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * grad).to(ctx.head_dtype),
            None,
            None,
        )


def chunked_cross_entropy(
    hidden: Float[Tensor, "tokens dim"],
    head: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, " tokens"],
    *,
    chunk: int = 1024,
) -> tuple[Float[Tensor, ""], int]:
    """The summed cross-entropy of the tokens that have a target, and how many they are.

    Only rows with a target meet the head. Logits exist for `chunk` rows at a time, in fp32 (fp64 for fp64 inputs). Without
    any target the sum is 0 and every gradient is 0, not NaN. First derivatives only.

    Args:
        hidden: Output of the decoder's last norm.
        head: Weight of the output head.
        targets: Id to predict after each token; -100 for none. See `next_token_targets`.
        chunk: Rows per step.

    Returns:
        The sum in nats (divide by the count for the mean), and the count.

    Raises:
        LayoutError: Another number of targets than rows, or a chunk below 1.
        TokenError: A target outside the vocabulary (checked on the CPU).
    """
    if targets.shape != hidden.shape[:1] or chunk < 1:
        raise LayoutError(
            f"expected one target per row and a chunk of at least 1, found {list(targets.shape)} targets for "
            f"{hidden.shape[0]} rows and chunk {chunk}"
        )
    rows = (targets != IGNORE).nonzero().squeeze(1)
    kept = targets[rows]
    if kept.device.type == "cpu" and kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= head.shape[0]):
        bad = int(kept.min()) if int(kept.min()) < 0 else int(kept.max())
        raise TokenError(
            f"target {bad} lies outside the vocabulary of {head.shape[0]}; tokens without loss are marked {IGNORE}"
        )
    total: Tensor = _ChunkedCrossEntropy.apply(hidden[rows], head, kept, chunk)
    return total, rows.numel()
