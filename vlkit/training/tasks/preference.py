"""dpo and mpo: a chosen and a rejected answer to each prompt, against the model that the stage began with.

{"messages": prompt, "chosen": [...], "rejected": [...]} --prepare--> Item of two sequences, chosen first
begin: log-probs under the reference, and for MPO the running mean of rewards -> loss of every pair
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlkit.config import Config, Positive
from vlkit.errors import ConfigError, SampleError
from vlkit.llm.output import DecoderOutput
from vlkit.models import VisionLanguageModel
from vlkit.objectives.log_probs import token_log_probs
from vlkit.objectives.preference import MPO_WEIGHTS, Rewards, RewardShift, implicit_rewards, mpo_loss
from vlkit.objectives.segments import segment_sum
from vlkit.packing import Batch
from vlkit.training.options import Factor
from vlkit.training.reflection import as_prompt
from vlkit.training.samples import kind_of
from vlkit.training.tasks.answers import learnt, log_probs_of, num_learnt, refuse_dropout, targets_of
from vlkit.training.tasks.task import Draw, Figures, Item, Setup
from vlkit.training.writing import Writer


class DPOOptions(Config):
    """DPO, arXiv:2305.18290.

    Attributes:
        beta: How dear it is to leave the reference.
    """

    beta: Positive = 0.1

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of MPO, whose first term DPO is."""
        return (1.0, 0.0, 0.0)


class MPOOptions(Config):
    """MPO, arXiv:2411.10442.

    Attributes:
        beta: How dear it is to leave the reference.
        weights: Of preference (DPO), quality (BCO) and generation (cross-entropy of the chosen answer).
    """

    beta: Positive = 0.1
    weights: tuple[Factor, Factor, Factor] = MPO_WEIGHTS

    def check(self) -> None:
        if not any(self.weights):
            raise ConfigError("MPOOptions.weights: all are 0, so nothing would be learnt; give one of them above 0")


class Preference:
    """Pairs of answers, by DPO, BCO and cross-entropy in given weights.

    The running mean of BCO takes in all pairs of a step, those of all ranks, under the policy before the step, and does so
    before the step's loss: it depends neither on packs nor on ranks. Where BCO has a weight, that costs a forward.

    Raises:
        ConfigError: The data's labels are to be of prompts too, pairs are to be cut, or adapters drop inputs.
    """

    modules = None
    one_pack = False
    resets_optimizer = False
    lack = "no pair"
    remedy = "look at data.labels"

    def __init__(self, options: DPOOptions | MPOOptions, setup: Setup) -> None:
        self.options, self.setup = options, setup
        self.writer = Writer.of(setup, whole="what is cut from one answer of a pair would count for the other")
        self.shift = RewardShift()
        refuse_dropout(setup)
        if setup.config.data.labels.on == "all":
            raise ConfigError("pairs compare answers, not their prompts: data.labels.on = 'all' does not go with them")

    def prepare(self, sample: dict[str, Any], draw: Draw) -> Item:
        sample, pixels = self.writer.drawn(sample, draw)
        sides = [self.writer.batch(side, **beside, max_pixels=pixels) for side, beside in _sides(sample)]
        _check_sides(sides)
        return Item(Batch.concat(sides))

    def measure(self, sample: dict[str, Any], draw: Draw) -> tuple[int, int]:
        sample, pixels = self.writer.drawn(sample, draw)
        found = [self.writer.measure(side, **beside, max_pixels=pixels) for side, beside in _sides(sample)]
        return sum(tokens for tokens, _ in found), sum(patches for _, patches in found)

    def begin(self, items: list[Item], seed: int) -> tuple[list[list[Item]], dict[str, float]]:
        frozen = self._answers(self.setup.reference(), items)
        items = [Item(item.batch, {**item.extra, "reference": pair}) for item, pair in zip(items, frozen, strict=True)]
        if not self.options.weights[1]:
            return [items], {}
        ours = torch.tensor(self._answers(self.setup.model, items), dtype=torch.float64).reshape(-1, 2)
        rewards = self._rewards(ours, items)
        return [items], {"reward_shift": self.shift.update(rewards, self.setup.ranks.group)}

    def totals(self, items: list[Item]) -> dict[str, float]:
        pairs = float(len(items))
        tokens = sum(int(learnt(item.batch)[: item.batch.ids.layout.lengths[0]].sum()) for item in items)
        return {"pairs": pairs, "tokens": float(tokens), "accuracy": pairs, "margin": pairs, "reward_chosen": pairs}

    def loss(
        self, model: VisionLanguageModel, items: list[Item], batch: Batch, totals: Mapping[str, float]
    ) -> tuple[Tensor, Figures]:
        targets = targets_of(batch)

        def objective(decoded: DecoderOutput, head: Tensor) -> tuple[Tensor, Figures]:
            log_probs = token_log_probs(decoded.hidden.tokens, head, targets, chunk=model.config.loss_chunk)
            sums = segment_sum(log_probs, batch.ids.layout)
            if not items:
                return 0.0 * sums.sum(), {}
            answers = sums.view(-1, 2)
            rewards = self._rewards(answers, items)
            found = mpo_loss(
                rewards,
                answers[:, 0],
                shift=self.shift.value,
                num_pairs=totals["pairs"],
                num_tokens=totals["tokens"],
                weights=self.options.weights,
            )
            margin = rewards.margin.detach()
            # A tie is no success and no failure: at the start the policy is the reference.
            right = (margin > 0).sum() + 0.5 * (margin == 0).sum()
            figures: Figures = {
                "accuracy": right,
                "margin": margin.sum(),
                "reward_chosen": rewards.chosen.detach().sum(),
            }
            return found.total, figures

        loss, figures = model(batch, objective=objective).value
        return loss, figures

    def state_dict(self) -> dict[str, Any]:
        return {"reward_shift": self.shift.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shift.load_state_dict(state["reward_shift"])

    def _answers(self, model: VisionLanguageModel, items: list[Item]) -> list[list[float]]:
        """Log-probabilities of the chosen and the rejected answer of every pair, without gradients."""
        found = log_probs_of(model, items, self.setup)
        return [segment_sum(own, item.batch.ids.layout).tolist() for own, item in zip(found, items, strict=True)]

    def _rewards(self, answers: Tensor, items: list[Item]) -> Rewards:
        """Of [pairs, 2] log-probs of the answers under the policy."""
        reference = answers.new_tensor([item.extra["reference"] for item in items]).reshape(-1, 2)
        return implicit_rewards(answers[:, 0], answers[:, 1], reference[:, 0], reference[:, 1], self.options.beta)


def _sides(sample: dict[str, Any]) -> list[tuple[list[Any], dict[str, Any]]]:
    """The two conversations of a pair, the chosen one first, and what goes with each. No answer in the prompt is learnt.

    Raises:
        SampleError: The sample is no pair.
    """
    if "chosen" not in sample or "rejected" not in sample:
        raise SampleError(
            f"a pair is expected ('messages', and the answers 'chosen' and 'rejected'), and this is a {kind_of(sample)}"
        )
    prompt = as_prompt(sample["messages"])
    beside = {name: sample.get(name) for name in ("images", "videos", "tools")}
    return [([*prompt, *sample[side]], beside) for side in ("chosen", "rejected")]


def _check_sides(sides: list[Batch]) -> None:
    """Refuse a pair that teaches nothing: its gradient would be roundings, which an optimizer may scale up to full steps.

    Raises:
        SampleError: An answer without a token that is learnt, or the same answer twice.
    """
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if not num_learnt(side):
            raise SampleError(f"{name!r} has no token that is learnt: a pair compares two answers")
    chosen, rejected = (side.ids.tokens for side in sides)
    if torch.equal(chosen, rejected):
        raise SampleError("'chosen' and 'rejected' are the same tokens: a pair compares two answers")
