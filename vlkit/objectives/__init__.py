"""Losses."""

from vlkit.objectives.cross_entropy import chunked_cross_entropy, next_token_targets
from vlkit.objectives.policy import (
    answer_weights,
    group_advantages,
    informative,
    kl_estimate,
    length_reward,
    mirror_descent_loss,
    overlong_penalty,
    policy_loss,
    tilted_advantages,
)
from vlkit.objectives.preference import RewardShift, bco_loss, dpo_loss, implicit_rewards, mpo_loss

__all__ = [
    "RewardShift",
    "answer_weights",
    "bco_loss",
    "chunked_cross_entropy",
    "dpo_loss",
    "group_advantages",
    "implicit_rewards",
    "informative",
    "kl_estimate",
    "length_reward",
    "mirror_descent_loss",
    "mpo_loss",
    "next_token_targets",
    "overlong_penalty",
    "policy_loss",
    "tilted_advantages",
]
