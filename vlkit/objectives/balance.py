"""Experts that share the work: losses that ask for it, and figures that say how far it is so.

    Routing of a layer (experts [tokens, k], scores and logits [tokens, num_experts]) + Layout -> a loss per sequence
    tokens that each expert got, [layers, experts]                                             -> figures

Balance by the selection bias, without any loss, is `vlkit.training.balance_experts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlkit.errors import ConfigError, LayoutError
from vlkit.objectives.segments import segment_sum
from vlkit.packing import Layout


@runtime_checkable
class Routed(Protocol):
    """What these need of a router's answer; `vlkit.layers.moe.Routing` is one."""

    @property
    def experts(self) -> Tensor: ...
    @property
    def scores(self) -> Tensor: ...
    @property
    def logits(self) -> Tensor | None: ...


def sequence_balance_loss(
    routing: Routed,
    layout: Layout,
    *,
    coefficient: float = 1e-4,
    scores: Literal["normalised", "raw"] = "normalised",
) -> Float[Tensor, " items"]:
    """The balance loss of every sequence in one layer; the loss of a step is the mean over its sequences, added over layers.

    For a sequence of T tokens that choose K of E experts, with scores s_ti,

        coefficient * sum_i f_i P_i,    f_i = E / (K T) * (tokens that chose i),    P_i = 1/T sum_t s'_ti

    and s' the scores of a token divided by their sum. f has no gradient. Uniform routing gives the coefficient. Selections are
    counted as they were made, bias included. With `Layout((tokens,))` it is the loss of the whole batch.

    Args:
        routing: Of one layer.
        layout: The sequences; each has its own balance, also where many are in a pack.
        coefficient: 1e-4 in DeepSeek-V3.
        scores: "raw" leaves s as it is, which is what the published code of DeepSeek-V3 and Moonlight computes.

    Raises:
        ConfigError: Another word.
        LayoutError: Another number of tokens than the layout has.

    Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20.
    """
    if scores not in ("normalised", "raw"):
        raise ConfigError(f"sequence_balance_loss: scores={scores!r} is not one of normalised, raw")
    if routing.scores.shape[0] != layout.num_tokens:
        raise LayoutError(f"the routing is of {routing.scores.shape[0]} tokens, the layout of {layout.num_tokens}")
    device, (num_experts, top_k) = routing.scores.device, (routing.scores.shape[1], routing.experts.shape[1])
    lengths = torch.tensor(layout.lengths, device=device)[:, None]
    place = layout.item_ids(device).long()[:, None] * num_experts + routing.experts  # of (item, expert)
    counts = torch.bincount(place.flatten(), minlength=layout.num_items * num_experts)
    fraction = counts.view(-1, num_experts).to(routing.scores.dtype) * (num_experts / top_k) / lengths
    chance = routing.scores
    if scores == "normalised":
        chance = chance / (chance.sum(-1, keepdim=True) + 1e-20)  # all sigmoids may underflow to 0
    return coefficient * (fraction * segment_sum(chance, layout) / lengths).sum(-1)


def router_z_loss(routing: Routed, *, coefficient: float = 1e-3) -> Float[Tensor, ""]:
    """coefficient * sum_t (logsumexp_i z_ti)^2 over the tokens of one layer, which keeps a router's logits z small.

    A sum: divide by the tokens of all packs and ranks of a step, and add the layers.

    Args:
        routing: Of one layer.
        coefficient: 1e-3 in ST-MoE.

    Raises:
        ConfigError: The routing does not hold its logits.

    Source: ST-MoE, arXiv:2202.08906, equation 5.
    """
    if routing.logits is None:
        raise ConfigError("router_z_loss: this routing holds no logits; vlkit's Router gives them")
    return coefficient * torch.logsumexp(routing.logits, -1).square().sum()


def expert_load(routing: Routed, mask: Bool[Tensor, " tokens"] | None = None) -> Int[Tensor, " experts"]:
    """How many tokens chose each expert of one layer.

    Args:
        routing: Of one layer.
        mask: Which tokens to count, such as those of images; None is all.
    """
    chosen = routing.experts if mask is None else routing.experts[mask]
    return torch.bincount(chosen.flatten(), minlength=routing.scores.shape[1])


def load_figures(
    load: Int[Tensor, "*layers experts"], biases: Sequence[Float[Tensor, " experts"]] = ()
) -> dict[str, float]:
    """What to watch of the balance, over all layers that got tokens.

    Args:
        load: Tokens that each expert got, such as `Output.expert_load` summed over a step, or `expert_load` of some tokens.
        biases: Selection biases of the layers.

    Returns:
        "max_violation" (largest / mean load - 1, mean over layers) and "max_violation_worst" (of the worst layer);
        "entropy" of the load / ln E, mean over layers, 1 where it is even; "dead", the part of all experts without a token;
        "largest_share" and "smallest_share" of a layer's choices that one expert got. Where there are biases, "bias_min" and
        "bias_max". Without any tokens only the latter.

    Source: max violation, arXiv:2408.15664, equation 4.
    """
    figures = {}
    layers = load.detach().reshape(-1, load.shape[-1]).double()
    layers = layers[layers.sum(-1) > 0]
    if len(layers):
        share = layers / layers.sum(-1, keepdim=True)
        violation = share.amax(-1) * share.shape[1] - 1
        entropy = -torch.xlogy(share, share).sum(-1) / math.log(max(share.shape[1], 2))
        figures = {
            "max_violation": violation.mean(),
            "max_violation_worst": violation.max(),
            "entropy": entropy.mean(),
            "dead": (layers == 0).double().mean(),
            "largest_share": share.max(),
            "smallest_share": share.min(),
        }
    if biases:
        together = torch.stack(list(biases)).detach()
        figures |= {"bias_min": together.min(), "bias_max": together.max()}
    return {name: float(figure) for name, figure in figures.items()}
