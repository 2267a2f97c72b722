"""The caption loss beside a contrastive one: a text decoder that sees the image writes the caption.

    decoder states [tokens, dim] of all captions end to end --head--> -sum log p(next token) / captions' tokens of the step

    loss = contrastive + CAPTION_WEIGHT * caption

Source: CoCa, arXiv:2205.01917, equations 2 and 4; as Kimi-VL pre-trains its tower, arXiv:2504.07491, section 2.3.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from vlkit.errors import LayoutError
from vlkit.objectives.cross_entropy import chunked_cross_entropy

CAPTION_WEIGHT = 2.0
"""Of the caption loss beside the contrastive loss, whose weight is 1 (CoCa, and lambda of Kimi-VL)."""


def caption_loss(
    hidden: Float[Tensor, "tokens dim"],
    head: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, " tokens"],
    num_targets: int | float | Tensor,
    *,
    chunk: int = 512,
) -> Float[Tensor, ""]:
    """This pack's part of the mean over all caption tokens of a step: the parts of all packs and ranks add up to it.

    Only -100 carries no loss. Id 0 is a token like others, also where a tokenizer pads with it.

    Args:
        hidden: States of the text decoder, behind its last norm.
        head: Weight of its output head.
        targets: Id to predict after each token, see `next_token_targets`.
        num_targets: How many targets all packs and ranks of the step have; 0 gives 0.
        chunk: Tokens whose logits exist at once.

    Raises:
        LayoutError: Fewer targets in the step than in this pack.
        TokenError: A target outside the vocabulary (checked on the CPU).
    """
    total, count = chunked_cross_entropy(hidden, head, targets, chunk=chunk)
    if num_targets < count:
        raise LayoutError(f"this pack has {count} targets, but all packs of the step are said to have {num_targets}")
    return total / max(float(num_targets), 1.0)
