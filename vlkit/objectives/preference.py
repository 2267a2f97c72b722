"""Preference losses on pairs: one log-probability per answer in, one loss per pair out.

    log-probs of tokens --segment_sum--> of answers: chosen, rejected [pairs] --minus the reference's--> rho
    rewards beta * rho -> DPO of their difference, BCO of each against a running mean, MPO of both and the chosen answer's loss

Nothing here knows of rows or padding, so pairs may share a pack with each other and with anything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlkit.errors import ConfigError, LayoutError

MPO_WEIGHTS = (0.8, 0.2, 1.0)
"""Of preference, quality and generation, as published with MPO."""


class Rewards(NamedTuple):
    """Implicit rewards of the two answers of every pair, [pairs] each: beta * (log pi - log pi_ref)."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """By how much the chosen answer is preferred."""
        return self.chosen - self.rejected


def implicit_rewards(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    beta: float,
) -> Rewards:
    """What the policy says each answer is worth, up to a number that both answers of a prompt share.

    Args:
        chosen: Log-probability of each chosen answer, summed over its tokens, in nats.
        rejected: The same of the rejected ones.
        reference_chosen: The same under the frozen reference.
        reference_rejected: The same.
        beta: How dear it is to leave the reference; above 0.

    Raises:
        LayoutError: Not one number of each kind per pair.
        ConfigError: A beta that is not above 0.

    Source: DPO, arXiv:2305.18290, equation 5.
    """
    shapes = [tuple(each.shape) for each in (chosen, rejected, reference_chosen, reference_rejected)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise LayoutError(
            f"one log-probability per pair is expected of chosen, rejected and their references, found {shapes}"
        )
    _check_beta(beta)
    return Rewards(beta * (chosen - reference_chosen.detach()), beta * (rejected - reference_rejected.detach()))


def dpo_loss(rewards: Rewards) -> Float[Tensor, " pairs"]:
    """-log sigmoid of how much more the chosen answer is rewarded than the rejected one.

    Source: arXiv:2305.18290, equation 7.
    """
    return -logsigmoid(rewards.margin)


def bco_loss(rewards: Rewards, shift: float) -> Float[Tensor, " pairs"]:
    """The two answers as yes and no of a classifier whose threshold is `shift`.

    Args:
        rewards: See `implicit_rewards`.
        shift: Mean reward so far, a constant of the loss. See `RewardShift`.

    Source: BCO, arXiv:2404.04656, on pairs as MPO uses it.
    """
    return -logsigmoid(rewards.chosen - shift) - logsigmoid(shift - rewards.rejected)


class MPOLoss(NamedTuple):
    """The three terms of MPO, each a sum without weight; `total` is weighted and divided."""

    total: Tensor
    preference: Tensor
    quality: Tensor
    generation: Tensor


def mpo_loss(
    rewards: Rewards,
    chosen: Float[Tensor, " pairs"],
    *,
    shift: float,
    num_pairs: int | float,
    num_tokens: int | float,
    weights: Sequence[float] = MPO_WEIGHTS,
) -> MPOLoss:
    """Preference, quality and generation together: weighted DPO and BCO per pair, and cross-entropy per chosen token.

    Args:
        rewards: See `implicit_rewards`.
        chosen: Log-probability of each chosen answer, with gradients.
        shift: See `RewardShift`; already updated with these pairs.
        num_pairs: Pairs of the whole step, over all packs and ranks; what the first two terms are divided by.
        num_tokens: Tokens of all chosen answers of the whole step; what the third is divided by.
        weights: Of the three.

    Returns:
        Totals of several packs add up to the loss of the step.

    Source: MPO, arXiv:2411.10442, with the weights 0.8, 0.2 and 1 of its published scripts.
    """
    if len(weights) != 3 or any(not math.isfinite(each) or each < 0 for each in weights):
        raise ConfigError(f"MPO weighs preference, quality and generation; expected three weights, found {weights!r}")
    preference, quality, generation = dpo_loss(rewards).sum(), bco_loss(rewards, shift).sum(), -chosen.sum()
    total = (weights[0] * preference + weights[1] * quality) / max(num_pairs, 1.0)
    return MPOLoss(total + weights[2] * generation / max(num_tokens, 1.0), preference, quality, generation)


class RewardShift:
    """The threshold of BCO: the mean over all updates so far of the mean reward of the answers of an update.

    Update it before the loss of the same pairs is taken. It is part of a run: `state_dict` is JSON, and exact.

    Attributes:
        value: The mean of the updates; 0 before the first.
        updates: How many there were.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self.updates = 0

    def update(self, rewards: Rewards, group: dist.ProcessGroup | None = None) -> float:
        """Collective over `group`. Take the rewards of one step in, those of all ranks as if they were on one.

        A step without any pair, or with a reward that is not finite, changes nothing.

        Args:
            rewards: This rank's; it may have none, and ranks need not have equally many.
            group: The ranks that share the step; None is this process alone.

        Returns:
            The new value.
        """
        both = torch.cat([each.detach().double() for each in rewards])
        found = torch.stack([both.sum(), torch.tensor(float(both.numel()), dtype=both.dtype, device=both.device)])
        if group is not None:
            dist.all_reduce(found, group=group)
        total, count = found.tolist()
        if count and math.isfinite(total):
            self.updates += 1
            self.value += (total / count - self.value) / self.updates
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.updates = float(state["value"]), int(state["updates"])


def _check_beta(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise ConfigError(f"beta must be above 0, found {beta}")
