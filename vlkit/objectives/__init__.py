"""Losses."""

from vlkit.objectives.cross_entropy import IGNORE, chunked_cross_entropy, next_token_targets
from vlkit.objectives.log_probs import token_log_probs
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
from vlkit.objectives.segments import segment_mean, segment_sum
from vlkit.objectives.siglip import SigLIP, repeated_pairs, siglip_loss
from vlkit.objectives.weights import token_weights

__all__ = [
    "IGNORE",
    "RewardShift",
    "SigLIP",
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
    "repeated_pairs",
    "segment_mean",
    "segment_sum",
    "siglip_loss",
    "tilted_advantages",
    "token_log_probs",
    "token_weights",
]
