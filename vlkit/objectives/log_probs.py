"""Log-probabilities of given tokens, and the entropy of what the model would have said, without the logits of all tokens.

    hidden [tokens, dim] --rows that have a target--> chunks of rows --@ head^T / temperature--> log softmax at the target

A loss on these (preference, policy) gives every token a gradient of its own, known only in the backward. So a chunk's logits are
made once in the forward, for the numbers, and once more in the backward; in between only [tokens] numbers are kept.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlkit.errors import ConfigError
from vlkit.objectives.cross_entropy import (
    add_gradients,
    logits_of,
    product_dtype,
    rows_with_target,
    softmax_in_place,
    take_rows,
    wide,
)


@overload
def token_log_probs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 512,
    entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def token_log_probs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 512,
    entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def token_log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk: int = 512, entropy: bool
) -> Tensor | tuple[Tensor, Tensor]: ...


def token_log_probs(
    hidden: Float[Tensor, "tokens dim"],
    head: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, " tokens"],
    *,
    temperature: float = 1.0,
    chunk: int = 512,
    entropy: bool = False,
) -> Float[Tensor, " tokens"] | tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """log p(target) of every token, with p = softmax(hidden @ head^T / temperature), in nats; 0 where there is no target.

    Only rows with a target meet the head. Logits exist for `chunk` rows at a time, in fp32 (fp64 for fp64 inputs), also in
    the backward, which makes them again. First derivatives only.

    Args:
        hidden: Output of the decoder's last norm.
        head: Weight of the output head.
        targets: Id to predict after each token; -100 for none. See `next_token_targets`.
        temperature: What logits are divided by; that of the rollout, where these are its tokens.
        chunk: Rows per step.
        entropy: Give -sum p log p of every token with a target too, with its gradient; 0 elsewhere.

    Returns:
        The log-probabilities; or those and the entropies. Both are fp32 (fp64 for fp64 inputs).

    Raises:
        ConfigError: A temperature that is not above 0.
        LayoutError: Another number of targets than rows, or a chunk below 1.
        TokenError: A target outside the vocabulary (checked on the CPU).
    """
    if not temperature > 0:
        raise ConfigError(
            f"expected a temperature above 0, found {temperature}; greedy choice has no log-probabilities"
        )
    rows = rows_with_target(hidden, head, targets, chunk)
    found = _TokenLogProbs.apply(
        take_rows(hidden, rows), head, targets[rows], temperature, chunk, entropy, product_dtype(hidden, head)
    )
    blank = torch.zeros(targets.shape, dtype=found.dtype, device=found.device)
    log_probs, *rest = (blank.index_copy(0, rows, row) for row in found)
    return (log_probs, rest[0]) if entropy else log_probs


class _TokenLogProbs(torch.autograd.Function):
    """[log-probabilities (, entropies)] of rows. With l = log softmax(z / T) and p = exp(l), the logits z have the gradients

    (onehot(y) - p) / T   of log p(y), and   -p * (l + entropy) / T   of the entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        temperature: float,
        chunk: int,
        entropy: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        found = torch.empty(1 + entropy, hidden.shape[0], dtype=wide(hidden.dtype), device=hidden.device)
        narrow = head.to(dtype)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            found[:, part] = _chunk_numbers(hidden[part], narrow, targets[part, None], temperature, entropy)
        ctx.save_for_backward(hidden, head, targets, found[1] if entropy else None)
        ctx.options = temperature, chunk, dtype
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, entropy = ctx.saved_tensors
        temperature, chunk, dtype = ctx.options
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros(head.shape, dtype=grads.dtype, device=head.device) if needs_head else None
        narrow = head.to(dtype)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            _chunk_gradients(
                hidden[part],
                narrow,
                targets[part, None],
                temperature,
                grads[:, part, None] / temperature,
                None if entropy is None else entropy[part, None],
                None if grad_hidden is None else grad_hidden[part],
                grad_head,
            )
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), *[None] * 5


# A chunk's logits end with these functions, before those of the next chunk are made.


def _chunk_numbers(
    rows: Tensor, head: Tensor, target: Tensor, temperature: float, entropy: bool
) -> Float[Tensor, "numbers rows"]:
    """Log-probabilities and, if asked for, entropies."""
    logits = logits_of(rows, head).div_(temperature)
    chosen = logits.gather(1, target)
    scaled = logits.clone() if entropy else None
    p, log_sum = softmax_in_place(logits)
    found = [chosen - log_sum]
    if scaled is not None:
        # Where p rounds to 0 the logit may be -inf, and 0 * -inf would be NaN.
        found.append(log_sum - scaled.masked_fill_(p == 0, 0).mul_(p).sum(1, keepdim=True))
    return torch.cat(found, 1).T


def _chunk_gradients(
    rows: Tensor,
    head: Tensor,
    target: Tensor,
    temperature: float,
    upstream: Float[Tensor, "numbers rows 1"],
    entropy: Float[Tensor, "rows 1"] | None,
    grad_rows: Tensor | None,
    grad_head: Tensor | None,
) -> None:
    """Add what the chunk gives to the gradients."""
    logits = logits_of(rows, head).div_(temperature)
    if entropy is None:
        grad = softmax_in_place(logits)[0].mul_(-upstream[0])
    else:
        log_p = logits.clone()
        p, log_sum = softmax_in_place(logits)
        # -p * (g + h (l + entropy)), with g and h the gradients of the two numbers
        log_p.sub_(log_sum - entropy).masked_fill_(p == 0, 0).mul_(upstream[1]).add_(upstream[0])
        grad = p.mul_(log_p.neg_())
        del log_p
    grad.scatter_add_(1, target, upstream[0])
    add_gradients(grad, rows, head, grad_rows, grad_head)
