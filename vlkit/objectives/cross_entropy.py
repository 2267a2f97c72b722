"""Next-token cross-entropy without ever holding the logits of all tokens.

    hidden [tokens, dim] --rows that have a target--> chunks of rows --@ head^T--> logits [chunk, vocab] --> sum of losses

The gradient of a chunk's logits is known as soon as the logits are, so it is folded into the gradients of the hidden rows and of
the head at once, and the logits are dropped: the peak is one chunk, not tokens x vocab.

torch 2.14 has `torch.nn.functional.linear_cross_entropy`, which the tests compare this with. It is not used, because weights per
token would need its unreduced form, which computes all logits again in the backward (1.3 to 1.6 times the time), it has no
z-loss, multiplies rows without a target too, and older versions of torch have none. Measured on one thread of a CPU, 1024 tokens,
width 256, chunks of 256 rows, both given the sum to compute: at vocabulary 32k 0.79 s here and 0.85 s there; at 152k with 512
tokens 2.14 s and 2.15 s. Memory above the inputs at 152k: in fp32 301 MB both (1785 MB with logits in full), in bf16 373 MB here
and 821 MB there. In bf16 its sum is rounded to bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def chunked_cross_entropy(
    hidden: Float[Tensor, "tokens dim"],
    head: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, " tokens"],
    *,
    weights: Float[Tensor, " tokens"] | None = None,
    z_coefficient: float = 0.0,
    chunk: int = 512,
) -> tuple[Float[Tensor, ""], int]:
    """The weighted sum of the cross-entropies of the tokens that have a target, and how many they are.

    With logits z = hidden @ head^T and log Z = logsumexp(z), a token with target y and weight w adds

        w * (log Z - z[y] + z_coefficient * (log Z)^2)

    Only rows with a target meet the head. Logits exist for `chunk` rows at a time, in fp32 (fp64 for fp64 inputs), and the
    head's gradient is added up in that type. Without any target the sum is 0 and every gradient is 0, not NaN. What needs no
    gradient costs none: a frozen head has no gradient buffer, and without recorded gradients only the sum is computed.
    First derivatives only.

    Args:
        hidden: Output of the decoder's last norm.
        head: Weight of the output head.
        targets: Id to predict after each token; -100 for none. See `next_token_targets`.
        weights: Factor of each token, see `token_weights`; None is 1 for all.
        z_coefficient: Of the squared logsumexp, which keeps logits from drifting; such as 1e-4.
        chunk: Rows per step.

    Returns:
        The sum in nats, and the count. Divide by the count, or by the sum of the weights, of all packs and ranks of a step.

    Raises:
        LayoutError: Another number of targets or weights than rows, or a chunk below 1.
        TokenError: A target outside the vocabulary (checked on the CPU).

    Source: the z-loss, PaLM, arXiv:2204.02311, section 5; with squared logsumexp of a router, ST-MoE, arXiv:2202.08906, eq. 5.
    """
    rows = rows_with_target(hidden, head, targets, chunk)
    if weights is not None and weights.shape != targets.shape:
        raise LayoutError(f"expected one weight per target, found {list(weights.shape)} for {list(targets.shape)}")
    kept = targets[rows]
    weights = hidden.new_ones(kept.shape, dtype=wide(hidden.dtype)) if weights is None else weights[rows]
    total: Tensor = _FusedCrossEntropy.apply(
        take_rows(hidden, rows),
        head,
        kept,
        weights.to(wide(hidden.dtype)),
        z_coefficient,
        chunk,
        torch.is_grad_enabled(),
        product_dtype(hidden, head),
    )
    return total, rows.numel()


def rows_with_target(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Int[Tensor, " rows"]:
    """The places of the tokens that have a target, after a look at all that can be wrong with them.

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
    return rows


def take_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """The rows, without a copy where that is all of them."""
    return hidden if rows.numel() == hidden.shape[0] else hidden.index_select(0, rows)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What losses are computed in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """What the products with the head are computed in: what autocast says, or the head's type."""
    device = hidden.device.type
    if hidden.is_meta or hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return head.dtype
    return torch.get_autocast_dtype(device)


def logits_of(rows: Tensor, head: Tensor) -> Float[Tensor, "rows vocab"]:
    """Products with the head, in its type, as what losses are computed in; autocast has been heard already."""
    with torch.autocast(rows.device.type, enabled=False):
        return (rows.to(head.dtype) @ head.T).to(wide(rows.dtype))


def add_gradients(grad: Tensor, rows: Tensor, head: Tensor, grad_rows: Tensor | None, grad_head: Tensor | None) -> None:
    """What a chunk's gradient of logits [rows, vocab] adds to the two gradients that are wanted.

    The head's is multiplied and added up in its own, wide type: rounding the product of every chunk to bf16 would bias the sum.
    A GPU multiplies in the narrow type and gives the wide one (not run here); the CPU widens the rows, the small operand.
    """
    with torch.autocast(grad.device.type, enabled=False):
        if grad_head is not None and grad.is_cuda and head.dtype != grad_head.dtype:
            grad_head += torch.mm(grad.to(head.dtype).T, rows.to(head.dtype), out_dtype=grad_head.dtype)
        elif grad_head is not None:
            grad_head.addmm_(grad.T, rows.to(grad_head.dtype))
        if grad_rows is not None:
            grad_rows.copy_(grad.to(head.dtype) @ head)


class _FusedCrossEntropy(torch.autograd.Function):
    """The sum over rows, with both gradients made on the way. With p = softmax(z), row t of the logits has the gradient

    w * ((1 + 2 * z_coefficient * log Z) * p - onehot(y)).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        z_coefficient: float,
        chunk: int,
        learns: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        needs_hidden, needs_head = (learns and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Many chunks add up in the head's gradient: in bf16 the small ones would be rounded away.
        grad_head = torch.zeros(head.shape, dtype=weights.dtype, device=head.device) if needs_head else None
        losses = torch.empty_like(weights)
        narrow = head.to(dtype)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            losses[part] = _chunk_losses(
                hidden[part],
                narrow,
                targets[part, None],
                weights[part, None],
                z_coefficient,
                None if grad_hidden is None else grad_hidden[part],
                grad_head,
            )
        ctx.save_for_backward(grad_hidden, grad_head, losses if learns and ctx.needs_input_grad[3] else None)
        ctx.head_dtype = head.dtype
        return (weights * losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head, losses = ctx.saved_tensors
        # The head's gradient is the largest tensor of a step: a second one beside it would be the peak of memory.
        scale = torch.mul if graph_is_kept() else Tensor.mul_
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_head is None else scale(grad_head, grad).to(ctx.head_dtype),
            None,
            None if losses is None else losses * grad,
            *[None] * 4,
        )


def _chunk_losses(
    rows: Tensor,
    head: Tensor,
    target: Tensor,
    weight: Tensor,
    z_coefficient: float,
    grad_rows: Tensor | None,
    grad_head: Tensor | None,
) -> Float[Tensor, " rows"]:
    """Losses without their weights, and what the chunk adds to the gradients. Its logits are the only tensor of their size, and
    end with this function, before those of the next chunk are made."""
    logits = logits_of(rows, head)
    chosen = logits.gather(1, target)
    p, log_sum = softmax_in_place(logits)
    if grad_rows is not None or grad_head is not None:
        grad = p.mul_(weight * (1 + 2 * z_coefficient * log_sum)).scatter_add_(1, target, -weight)
        add_gradients(grad, rows, head, grad_rows, grad_head)
    return (log_sum - chosen + z_coefficient * log_sum.square()).squeeze(1)


def graph_is_kept() -> bool:
    """Whether another backward may run through this graph (`retain_graph=True`); yes where torch does not say."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


def softmax_in_place(
    logits: Float[Tensor, "rows vocab"],
) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "rows 1"]]:
    """The probabilities, written over the logits, and the logsumexp of each row; no other tensor of this size."""
    largest = logits.amax(-1, keepdim=True)
    p = logits.sub_(largest).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), total.log().add_(largest)
