"""Policy objectives on sampled answers: rewards in, advantages out; log-probs in, losses of tokens or answers out.

    rewards [answers] --group_advantages--> advantages [answers]
    log-probs [tokens], old ones, advantages of tokens --policy_loss--> [tokens] --times answer_weights--> loss      (GRPO, ...)
    log-probs [answers], old ones, advantages         --mirror_descent_loss--> [answers]                       (Kimi k1.5)

GRPO, Dr.GRPO, DAPO and BNPO are one routine: they differ in how rewards are scaled and in what a token weighs.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlkit.errors import ConfigError, LayoutError
from vlkit.packing import Layout

Scale = Literal["group", "batch", "none"]
Aggregate = Literal["answer", "constant", "tokens", "local"]
KL = Literal["k1", "k2", "k3"]


class Variant(NamedTuple):
    """A published member of the family.

    Attributes:
        scale: What the advantages are divided by; see `group_advantages`.
        aggregate: What a token weighs; see `answer_weights`.
        clip: How far the ratio may fall below 1 and rise above it.
        drop_equal: Leave out groups whose rewards are all equal.
    """

    scale: Scale
    aggregate: Aggregate
    clip: tuple[float, float] = (0.2, 0.2)
    drop_equal: bool = False


VARIANTS = {
    "grpo": Variant("group", "answer"),  # DeepSeekMath, arXiv:2402.03300
    "dr-grpo": Variant("none", "constant"),  # Dr. GRPO, arXiv:2503.20783
    "dapo": Variant("group", "tokens", (0.2, 0.28), drop_equal=True),  # DAPO, arXiv:2503.14476
    "bnpo": Variant("group", "local"),  # as TRL names it: the tokens of this process
}


# Rewards


def group_means(rewards: Float[Tensor, " answers"], groups: Int[Tensor, " answers"]) -> Float[Tensor, " answers"]:
    """For every answer the mean reward of its group, in fp64."""
    _, index, count = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(count), dtype=torch.float64, device=rewards.device).index_add(0, index, rewards.double())
    return (sums / count)[index]


def group_advantages(
    rewards: Float[Tensor, " answers"],
    groups: Int[Tensor, " answers"],
    scale: Scale = "group",
    eps: float = 1e-4,
) -> Float[Tensor, " answers"]:
    """How much better an answer is than the others to its prompt.

    Args:
        rewards: One per answer.
        groups: The prompt of each answer, any whole numbers.
        scale: "group" divides by the standard deviation (n - 1) of the group plus eps, "batch" by that of all rewards plus eps,
            "none" leaves the difference.
        eps: Added to the deviation.

    Returns:
        In fp32. An answer that is alone in its group, or whose group has equal rewards, gets exactly 0.

    Source: arXiv:2402.03300, section 4.1.2; "none" arXiv:2503.20783.
    """
    _check_answers(rewards, groups)
    if scale not in ("group", "batch", "none"):
        raise ConfigError(f"advantages are scaled by 'group', 'batch' or 'none', found {scale!r}")
    centred = rewards.double() - group_means(rewards, groups)
    # Of equal rewards the mean may be off by a rounding, which eps alone would blow up.
    centred = centred.masked_fill(~informative(rewards, groups), 0.0)
    if scale == "group":
        _, index, count = groups.unique(return_inverse=True, return_counts=True)
        squares = torch.zeros(len(count), dtype=torch.float64, device=rewards.device).index_add(0, index, centred**2)
        centred = centred / ((squares / (count - 1).clamp(min=1)).sqrt()[index] + eps)
    elif scale == "batch" and len(rewards) > 1:
        centred = centred / (rewards.double().std() + eps)
    return centred.float()


def informative(rewards: Float[Tensor, " answers"], groups: Int[Tensor, " answers"]) -> Bool[Tensor, " answers"]:
    """Which answers belong to a group whose rewards are not all equal: the others teach nothing."""
    _check_answers(rewards, groups)
    _, index, count = groups.unique(return_inverse=True, return_counts=True)
    found = rewards.new_zeros(len(count))
    lowest = found.scatter_reduce(0, index, rewards, "amin", include_self=False)
    highest = found.scatter_reduce(0, index, rewards, "amax", include_self=False)
    return (lowest != highest)[index]


def tilted_advantages(
    rewards: Float[Tensor, " answers"], groups: Int[Tensor, " answers"], tau: float
) -> Float[Tensor, " answers"]:
    """Rewards minus tau * log mean exp(reward / tau) of their group, an estimate of tau * log Z.

    With it the optimum of `mirror_descent_loss` is the old policy times exp(reward / tau). The mean reward, which the report
    uses, is its limit for large tau.

    Source: Kimi k1.5, arXiv:2501.12599, section 2.3.2.
    """
    _check_answers(rewards, groups)
    _check_tau(tau)
    _, index, count = groups.unique(return_inverse=True, return_counts=True)
    scaled = rewards.double() / tau
    highest = scaled.new_zeros(len(count)).scatter_reduce(0, index, scaled, "amax", include_self=False)
    sums = torch.zeros_like(highest).index_add(0, index, (scaled - highest[index]).exp())
    found = (rewards - tau * (highest + (sums / count).log())[index]).float()
    return found.masked_fill(~informative(rewards, groups), 0.0)  # of equal rewards roundings may be left


def length_reward(
    lengths: Int[Tensor, " answers"], correct: Bool[Tensor, " answers"], groups: Int[Tensor, " answers"]
) -> Float[Tensor, " answers"]:
    """From 0.5 for the shortest answer of a group to -0.5 for the longest; a wrong answer gets nothing above 0.

    Source: Kimi k1.5, arXiv:2501.12599, section 2.3.3. A group of equal lengths gets 0.
    """
    _check_answers(lengths, groups)
    _, index, count = groups.unique(return_inverse=True, return_counts=True)
    given = lengths.double()
    found = given.new_zeros(len(count))
    shortest = found.scatter_reduce(0, index, given, "amin", include_self=False)[index]
    longest = found.scatter_reduce(0, index, given, "amax", include_self=False)[index]
    reward = 0.5 - (given - shortest) / (longest - shortest).clamp(min=1)
    reward = torch.where(correct, reward, reward.clamp(max=0.0))
    return reward.masked_fill(longest == shortest, 0.0).float()


def overlong_penalty(lengths: Int[Tensor, " answers"], max_tokens: int, margin: int) -> Float[Tensor, " answers"]:
    """0 up to max_tokens - margin, from there linearly down to -1 at max_tokens, and -1 beyond.

    Source: DAPO, arXiv:2503.14476, equation 13.
    """
    if not 0 < margin <= max_tokens:
        raise ConfigError(f"the margin must lie between 1 and max_tokens = {max_tokens}, found {margin}")
    return ((max_tokens - margin - lengths.float()) / margin).clamp(-1.0, 0.0)


# Losses


class PolicyTerms(NamedTuple):
    """Of every token, [tokens] each.

    Attributes:
        loss: To be minimised, with gradients; 0 where no token is learnt.
        clipped: Whether the clip holds the ratio, so that the token teaches nothing.
        kl: Estimate of how far the policy is from the reference, in nats, without gradients; 0 without a reference.
    """

    loss: Tensor
    clipped: Tensor
    kl: Tensor


def policy_loss(
    log_probs: Float[Tensor, " tokens"],
    old: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    reference: Float[Tensor, " tokens"] | None = None,
    kl_weight: float = 0.0,
    kl: KL = "k3",
) -> PolicyTerms:
    """The clipped policy-gradient loss of every token, and its distance from a reference.

        -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) + kl_weight * kl,    ratio = exp(log_probs - old)

    Args:
        log_probs: Of the tokens of the answers under the policy, in nats.
        old: The same under the policy that the answers are compared with; a constant.
        advantages: Of the answer that each token belongs to.
        clip: How far the ratio may fall below 1, and rise above it.
        reference: Log-probs under the frozen reference; needed where kl_weight is not 0.
        kl_weight: Weight of the distance.
        kl: How it is estimated from the sampled tokens; with d = reference - log_probs: "k1" -d, "k2" d^2 / 2,
            "k3" exp(d) - d - 1. On answers of the policy itself k1 and k3 have the right mean, but what a loss needs is a
            gradient: that of k1 has mean 0, that of k2 is the gradient of KL(policy || reference), that of k3 the gradient of
            KL(reference || policy).

    Source: arXiv:2402.03300, equations 3 and 4; two clips arXiv:2503.14476; estimators by J. Schulman, Approximating KL
    divergence, 2020.
    """
    if not (log_probs.shape == old.shape == advantages.shape) or log_probs.ndim != 1:
        raise LayoutError(
            "policy_loss takes one log-prob, one old log-prob and one advantage per token, found "
            f"{list(log_probs.shape)}, {list(old.shape)} and {list(advantages.shape)}"
        )
    low, high = clip
    if not (0 <= low <= 1 and 0 <= high < math.inf):
        raise ConfigError(f"clip = (low, high) with low from 0 to 1 and high of at least 0, found {clip}")
    ratio = (log_probs - old.detach()).exp()
    free, held = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    loss, distance = -torch.minimum(free, held), torch.zeros_like(log_probs)
    if kl_weight:
        if reference is None:
            raise ConfigError(f"kl_weight = {kl_weight} needs the log-probs of a reference")
        distance = kl_estimate(log_probs, reference, kl)
        loss = loss + kl_weight * distance
    elif reference is not None:
        distance = kl_estimate(log_probs, reference, kl)
    return PolicyTerms(loss, (held < free).detach(), distance.detach())


def kl_estimate(
    log_probs: Float[Tensor, " tokens"], reference: Float[Tensor, " tokens"], kl: KL = "k3"
) -> Float[Tensor, " tokens"]:
    """One of three estimates of KL(policy || reference) per token; see `policy_loss`."""
    d = reference.detach() - log_probs
    if kl == "k1":
        return -d
    if kl == "k2":
        return d.square() / 2
    if kl == "k3":
        return torch.expm1(d) - d
    raise ConfigError(f"kl is 'k1', 'k2' or 'k3', found {kl!r}")


def answer_weights(
    mask: Bool[Tensor, " tokens"],
    layout: Layout,
    aggregate: Aggregate,
    *,
    num_answers: int | float,
    num_tokens: int | float,
    max_tokens: int | None = None,
) -> Float[Tensor, " tokens"]:
    """What a token weighs, so that the sum of losses times weights over all packs and ranks is the loss of the step.

    Args:
        mask: Tokens that are learnt.
        layout: One item per answer, its prompt included.
        aggregate: "answer": the mean over the tokens of an answer, then over answers. "constant": the sum of an answer's tokens
            over max_tokens, then the mean over answers. "tokens": the mean over all tokens of the step. "local": the mean over
            the tokens of every part of the step, then over parts: the only one that depends on how a step is divided.
        num_answers: Answers of the whole step, empty ones included.
        num_tokens: Learnt tokens of the whole step; for "local" those of this part times the number of parts.
        max_tokens: The most tokens of an answer; of "constant" alone.

    Returns:
        fp32, 0 where the mask is False.
    """
    if mask.shape != (layout.num_tokens,):
        raise LayoutError(f"the mask has shape {list(mask.shape)} for {layout.num_tokens} tokens")
    learnt = mask.float()
    if aggregate == "answer":
        items = layout.item_ids(mask.device).long()
        counts = torch.zeros(layout.num_items, device=mask.device).index_add(0, items, learnt)
        return learnt / (counts.clamp(min=1.0)[items] * max(num_answers, 1.0))
    if aggregate == "constant":
        if max_tokens is None or max_tokens < 1:
            raise ConfigError(f"aggregate = 'constant' divides by max_tokens of at least 1, found {max_tokens}")
        return learnt / (max(num_answers, 1.0) * max_tokens)
    if aggregate in ("tokens", "local"):
        return learnt / max(num_tokens, 1.0)
    raise ConfigError(f"aggregate is 'answer', 'constant', 'tokens' or 'local', found {aggregate!r}")


def mirror_descent_loss(
    log_probs: Float[Tensor, " answers"],
    old: Float[Tensor, " answers"],
    advantages: Float[Tensor, " answers"],
    tau: float,
) -> Float[Tensor, " answers"]:
    """Of every answer -A * log pi + tau / 2 * (log pi - log pi_old)^2; the mean over answers is the loss.

    It is the report's ascent direction with its sign turned. The squared surrogate (A - tau * log pi / pi_old)^2 has 2 tau
    times this gradient: here the learning rate means the same for every tau.

    Args:
        log_probs: Of whole answers: sums over their tokens, in nats, not means.
        old: The same under the policy that the iteration began with; a constant.
        advantages: Rewards minus their group's mean (`group_advantages(..., "none")`), or see `tilted_advantages`.
        tau: Price of leaving the old policy, above 0, in units of reward per nat.

    Source: Kimi k1.5, arXiv:2501.12599, equation 3.
    """
    if not (log_probs.shape == old.shape == advantages.shape) or log_probs.ndim != 1:
        raise LayoutError(
            "mirror_descent_loss takes one log-prob, one old log-prob and one advantage per answer, found "
            f"{list(log_probs.shape)}, {list(old.shape)} and {list(advantages.shape)}"
        )
    _check_tau(tau)
    return -advantages * log_probs + tau / 2 * (log_probs - old.detach()).square()


def _check_answers(values: Tensor, groups: Tensor) -> None:
    if values.shape != groups.shape or values.ndim != 1:
        raise LayoutError(f"expected one group per answer, found {list(groups.shape)} for {list(values.shape)} answers")


def _check_tau(tau: float) -> None:
    if not 0 < tau < math.inf:
        raise ConfigError(f"tau must be above 0, found {tau}")
