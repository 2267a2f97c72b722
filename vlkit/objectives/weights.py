"""How much each token counts in a loss: tokens alike, answers alike, or something between."""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

from vlkit.errors import ConfigError
from vlkit.objectives.cross_entropy import IGNORE
from vlkit.objectives.segments import segment_sum
from vlkit.packing import Layout

Normalise = Literal["token", "sample", "square"]


def token_weights(targets: Int[Tensor, " tokens"], layout: Layout, normalise: Normalise) -> Float[Tensor, " tokens"]:
    """The weight w of every token that has a target, 0 elsewhere; the loss is sum(w * loss) / sum(w).

    Of an item with x targets: "token" 1, "sample" 1 / x, "square" 1 / sqrt(x). So an answer of 1000 tokens beside one of 10 has
    99 %, 50 % and 91 % of the loss. Both sums are to run over all packs and ranks of a step: a mean of the packs' means is
    another loss.

    Args:
        targets: Id to predict after each token; -100 for none.
        layout: One item per sample.
        normalise: Which of the three.

    Raises:
        ConfigError: Another word.
        LayoutError: Another number of targets than the layout has tokens.

    Source: square averaging, InternVL 2.5, arXiv:2412.05271 (loss reweighting).
    """
    if normalise not in get_args(Normalise):
        raise ConfigError(f"token_weights: {normalise!r} is not one of {', '.join(get_args(Normalise))}")
    has_target = (targets != IGNORE).float()
    counts = segment_sum(has_target, layout).clamp(min=1)
    power = {"token": 0.0, "sample": -1.0, "square": -0.5}[normalise]
    return has_target * counts.pow(power)[layout.item_ids(targets.device).long()]
