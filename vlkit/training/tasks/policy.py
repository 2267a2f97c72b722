"""grpo and mirror-descent: the policy answers, a verifier judges, and the answers teach the policy.

{"messages": prompt, "answer": "42"} --prepare--> Item of the prompt
begin: `group` answers to every prompt -> rewards -> advantages (of all ranks together) -> Items of prompt and answer,
       in `updates` mini-batches; log-probs under the policy before the step, and under the reference where asked for
loss:  of tokens (GRPO and its variants), or of whole answers (mirror descent)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from vlkit.config import Count, Positive
from vlkit.errors import ConfigError
from vlkit.llm.output import DecoderOutput
from vlkit.models import VisionLanguageModel
from vlkit.objectives.log_probs import token_log_probs
from vlkit.objectives.policy import (
    KL,
    VARIANTS,
    answer_weights,
    group_advantages,
    informative,
    length_reward,
    mirror_descent_loss,
    overlong_penalty,
    policy_loss,
    tilted_advantages,
)
from vlkit.objectives.segments import segment_sum
from vlkit.packing import Batch
from vlkit.training.options import Factor, Share
from vlkit.training.tasks.answers import IGNORE, log_probs_of, num_learnt, targets_of
from vlkit.training.tasks.judged import LACK, REMEDY, Pull, RolloutOptions, Rollouts
from vlkit.training.tasks.task import Draw, Figures, Item, Setup


class GRPOOptions(RolloutOptions):
    """GRPO, arXiv:2402.03300, and its variants; see `vlkit.objectives.policy.VARIANTS`.

    Attributes:
        variant: How rewards are scaled, what a token weighs, where the ratio is clipped, and whether groups of equal rewards
            are left out.
        clip: How far the ratio may fall below 1 and rise above it; None is the variant's.
        kl_weight: Weight of the distance from the model that the stage began with; 0 does not build it.
        kl: How the distance is estimated; see `vlkit.objectives.policy.policy_loss`.
        eps: Added to the deviation of rewards that they are divided by.
        overlong_margin: Tokens before max_new_tokens from which on length is punished, up to -1; 0 never.
    """

    variant: Literal["grpo", "dr-grpo", "dapo", "bnpo"] = "grpo"
    clip: tuple[Factor, Factor] | None = None
    kl_weight: Factor = 0.0
    kl: KL = "k3"
    eps: Positive = 1e-4
    overlong_margin: Count = 0

    def check(self) -> None:
        super().check()
        if self.overlong_margin > self.max_new_tokens:
            raise ConfigError(
                f"GRPOOptions.overlong_margin: {self.overlong_margin} is more than max_new_tokens = {self.max_new_tokens}"
            )


class GRPO:
    """The clipped policy gradient on tokens.

    The first mini-batch of a step is compared with itself, so its ratios are exactly 1; the others with the log-probs that the
    training forward gave before the step, never with those of the sampler.
    """

    modules = None
    one_pack = False
    resets_optimizer = False
    lack, remedy = LACK, REMEDY

    def __init__(self, options: GRPOOptions, setup: Setup) -> None:
        self.options, self.setup = options, setup
        self.rollouts = Rollouts(options, setup)
        self.rates = self.rollouts.rates  # for draws by success
        self.variant = VARIANTS[options.variant]
        self.moved = False  # whether the policy has left the model that the stage began with

    def prepare(self, sample: dict[str, Any], draw: Draw) -> Item:
        return self.rollouts.prepare(sample, draw)

    def measure(self, sample: dict[str, Any], draw: Draw) -> tuple[int, int]:
        return self.rollouts.measure(sample, draw)

    def begin(self, items: list[Item], seed: int) -> tuple[list[list[Item]], dict[str, float]]:
        options, setup = self.options, self.setup
        judged = self.rollouts.judge(items, seed)
        rewards = judged.rewards
        if options.overlong_margin:
            rewards = rewards + overlong_penalty(judged.lengths, options.max_new_tokens, options.overlong_margin)
        advantages = group_advantages(rewards, judged.groups, self.variant.scale, options.eps)
        kept = informative(rewards, judged.groups) if self.variant.drop_equal else torch.ones_like(judged.groups) > 0
        # Until something was learnt, the reference is the old policy, and the distance from it a rounding.
        pull: Pull = "none" if not options.kl_weight else "reference" if self.moved else "old"
        updates = self.rollouts.divided(judged, advantages, kept, pull=pull)
        self.moved |= bool((advantages * kept).any())
        if options.kl_weight:
            updates = with_log_probs(updates, "reference", setup.reference(), setup, options.temperature)
        updates[1:] = with_log_probs(updates[1:], "old", setup.model, setup, options.temperature)
        return updates, judged.figures

    def totals(self, items: list[Item]) -> dict[str, float]:
        tokens = float(sum(num_learnt(item.batch) for item in items))
        per_token = {"clip_fraction": tokens, "entropy": tokens} | ({"kl": tokens} if self.options.kl_weight else {})
        return {"answers": float(len(items)), "tokens": tokens, "parts": float(tokens > 0), **per_token}

    def loss(
        self, model: VisionLanguageModel, items: list[Item], batch: Batch, totals: Mapping[str, float]
    ) -> tuple[Tensor, Figures]:
        options, layout = self.options, batch.ids.layout
        targets = targets_of(batch)
        taught = targets != IGNORE
        num_tokens = totals["tokens"]
        if self.variant.aggregate == "local" and items:
            num_tokens = items[0].extra["local_tokens"] * totals["parts"]
        weights = answer_weights(
            taught,
            layout,
            self.variant.aggregate,
            num_answers=totals["answers"],
            num_tokens=num_tokens,
            max_tokens=options.max_new_tokens,
        )

        def objective(decoded: DecoderOutput, head: Tensor) -> tuple[Tensor, Figures]:
            log_probs, entropy = _log_probs(decoded, head, targets, options.temperature, model)
            if not items:
                return 0.0 * log_probs.sum(), {}
            advantages = log_probs.new_tensor([item.extra["advantage"] for item in items])
            terms = policy_loss(
                log_probs,
                known(items, "old", log_probs),
                advantages[layout.item_ids(log_probs.device).long()] * taught,
                clip=options.clip or self.variant.clip,
                reference=known(items, "reference", log_probs) if options.kl_weight else None,
                kl_weight=options.kl_weight,
                kl=options.kl,
            )
            figures: Figures = {
                "clip_fraction": (terms.clipped & taught).sum(),
                "entropy": entropy.detach().sum(),
            }
            if options.kl_weight:
                figures["kl"] = (terms.kl * taught).sum()
            return (terms.loss * weights).sum(), figures

        loss, figures = model(batch, objective=objective).value
        return loss, figures

    def state_dict(self) -> dict[str, Any]:
        return {**self.rollouts.state_dict(), "moved": self.moved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rollouts.load_state_dict(state)
        self.moved = state.get("moved", True)


class MirrorDescentOptions(RolloutOptions):
    """Online policy mirror descent, Kimi k1.5, arXiv:2501.12599, section 2.3.

    Attributes:
        tau: Price of leaving the policy that the step began with, in units of reward per nat. The report names none. The first
            mini-batch of a step has not left it yet, so tau acts from the second on: with updates = 1 it is the policy gradient
            alone, whatever tau is.
        baseline: What rewards are compared with: the "mean" of their group, as in the report; or "log-mean-exp", an estimate of
            tau * log Z, of which the mean is the limit for large tau.
        length_weight: Of the reward for short answers; 0 has none.
        length_from: Progress of the stage from which on there is one.
    """

    tau: Positive
    baseline: Literal["mean", "log-mean-exp"] = "mean"
    length_weight: Factor = 0.0
    length_from: Share = 0.0


class MirrorDescent:
    """Whole answers, compared with the policy that the step began with; no ratio, no clip, and a fresh optimizer every step."""

    modules = None
    one_pack = False
    resets_optimizer = True
    lack, remedy = LACK, REMEDY

    def __init__(self, options: MirrorDescentOptions, setup: Setup) -> None:
        self.options, self.setup = options, setup
        self.rollouts = Rollouts(options, setup)
        self.rates = self.rollouts.rates  # for draws by success

    def prepare(self, sample: dict[str, Any], draw: Draw) -> Item:
        return self.rollouts.prepare(sample, draw)

    def measure(self, sample: dict[str, Any], draw: Draw) -> tuple[int, int]:
        return self.rollouts.measure(sample, draw)

    def begin(self, items: list[Item], seed: int) -> tuple[list[list[Item]], dict[str, float]]:
        options = self.options
        judged = self.rollouts.judge(items, seed)
        rewards = judged.rewards
        if options.length_weight:
            shorter = length_reward(judged.lengths, judged.correct, judged.groups)
            rewards = rewards + options.length_weight * shorter * (judged.progress >= options.length_from)
        if options.baseline == "mean":
            advantages = group_advantages(rewards, judged.groups, "none")
        else:
            advantages = tilted_advantages(rewards, judged.groups, options.tau)
        updates = self.rollouts.divided(judged, advantages, torch.ones_like(judged.groups) > 0, pull="old")
        updates[1:] = with_log_probs(updates[1:], "old", self.setup.model, self.setup, options.temperature)
        return updates, judged.figures

    def totals(self, items: list[Item]) -> dict[str, float]:
        answers, tokens = float(len(items)), float(sum(num_learnt(item.batch) for item in items))
        return {"answers": answers, "tokens": tokens, "log_ratio": answers, "entropy": tokens}

    def loss(
        self, model: VisionLanguageModel, items: list[Item], batch: Batch, totals: Mapping[str, float]
    ) -> tuple[Tensor, Figures]:
        options, layout = self.options, batch.ids.layout
        targets = targets_of(batch)

        def objective(decoded: DecoderOutput, head: Tensor) -> tuple[Tensor, Figures]:
            log_probs, entropy = _log_probs(decoded, head, targets, options.temperature, model)
            if not items:
                return 0.0 * log_probs.sum(), {}
            ours = segment_sum(log_probs, layout)
            old = segment_sum(known(items, "old", log_probs), layout)
            advantages = ours.new_tensor([item.extra["advantage"] for item in items])
            losses = mirror_descent_loss(ours, old, advantages, options.tau)
            figures: Figures = {"log_ratio": (ours - old).detach().sum(), "entropy": entropy.detach().sum()}
            return losses.sum() / max(totals["answers"], 1.0), figures

        loss, figures = model(batch, objective=objective).value
        return loss, figures

    def state_dict(self) -> dict[str, Any]:
        return self.rollouts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rollouts.load_state_dict(state)


def with_log_probs(
    updates: list[list[Item]], name: str, model: VisionLanguageModel, setup: Setup, temperature: float
) -> list[list[Item]]:
    """The items with the log-probs of their tokens under a model."""
    found = []
    for items in updates:
        values = log_probs_of(model, items, setup, temperature)
        found.append([Item(item.batch, {**item.extra, name: own}) for item, own in zip(items, values, strict=True)])
    return found


def _log_probs(
    decoded: DecoderOutput, head: Tensor, targets: Tensor, temperature: float, model: VisionLanguageModel
) -> tuple[Tensor, Tensor]:
    """Log-prob of every target and entropy of its distribution, [tokens] each, under the policy that answers were drawn from."""
    return token_log_probs(
        decoded.hidden.tokens,
        head,
        targets,
        temperature=temperature,
        chunk=model.config.loss_chunk,
        entropy=True,
    )


def known(items: list[Item], name: str, log_probs: Tensor) -> Tensor:
    """The log-probs that the items of a pack bring; those of the policy itself, as constants, where they bring none."""
    if any(name not in item.extra for item in items):
        return log_probs.detach()
    return torch.cat([item.extra[name] for item in items]).to(log_probs)
