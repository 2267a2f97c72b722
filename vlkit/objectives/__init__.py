"""Losses."""

from vlkit.objectives.balance import expert_load, load_figures, router_z_loss, sequence_balance_loss
from vlkit.objectives.caption import CAPTION_WEIGHT, caption_loss
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
    "CAPTION_WEIGHT",
    "IGNORE",
    "RewardShift",
    "SigLIP",
    "answer_weights",
    "bco_loss",
    "caption_loss",
    "chunked_cross_entropy",
    "dpo_loss",
    "expert_load",
    "group_advantages",
    "implicit_rewards",
    "informative",
    "kl_estimate",
    "length_reward",
    "load_figures",
    "mirror_descent_loss",
    "mpo_loss",
    "next_token_targets",
    "overlong_penalty",
    "policy_loss",
    "repeated_pairs",
    "router_z_loss",
    "segment_mean",
    "segment_sum",
    "sequence_balance_loss",
    "siglip_loss",
    "tilted_advantages",
    "token_log_probs",
    "token_weights",
]
