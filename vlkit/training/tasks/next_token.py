"""next-token: cross-entropy of the supervised tokens, by any of three normalisations, with the losses that keep it steady."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlkit.config import Config
from vlkit.errors import SampleError
from vlkit.llm.output import DecoderOutput
from vlkit.models import VisionLanguageModel
from vlkit.objectives.balance import router_z_loss, sequence_balance_loss
from vlkit.objectives.cross_entropy import IGNORE, chunked_cross_entropy, next_token_targets
from vlkit.objectives.weights import Normalise, token_weights
from vlkit.packing import Batch
from vlkit.training.options import Factor
from vlkit.training.samples import kind_of
from vlkit.training.tasks.task import Draw, Figures, Item, Setup
from vlkit.training.writing import Writer


class NextTokenOptions(Config):
    """What the loss is.

    Attributes:
        normalise: The weight of a token in a sample with x supervised tokens: "token" 1, "sample" 1/x, "square" 1/sqrt(x).
        z_loss: Coefficient of the squared logsumexp of the logits, weighted as the token is; such as 1e-4.
        sequence_balance: Of the experts' balance in every sequence; such as 1e-4.
        router_z_loss: Of the squared logsumexp of the routers' logits; such as 1e-3.
    """

    normalise: Normalise = "token"
    z_loss: Factor = 0.0
    sequence_balance: Factor = 0.0
    router_z_loss: Factor = 0.0


class NextToken:
    """The sum over tokens of weight * cross-entropy, divided by the sum of the weights of the whole step; the mean over its
    sequences of their balance losses, and over its tokens of the routers' z-losses, added over layers.

    Source: the normalisations are those of InternVL 2.5, arXiv:2412.05271.
    """

    modules = None
    one_pack = False
    resets_optimizer = False
    lack = "no supervised token"
    remedy = "look at data.labels, and with data.too_long = 'cut' at data.max_tokens"

    def __init__(self, options: NextTokenOptions, setup: Setup) -> None:
        self.options, self.writer = options, Writer.of(setup)

    def prepare(self, sample: dict[str, Any], draw: Draw) -> Item:
        sample, pixels = self.writer.drawn(sample, draw)
        return Item(self.writer.batch(*_conversation(sample), tools=sample.get("tools"), max_pixels=pixels))

    def measure(self, sample: dict[str, Any], draw: Draw) -> tuple[int, int]:
        sample, pixels = self.writer.drawn(sample, draw)
        return self.writer.measure(*_conversation(sample), tools=sample.get("tools"), max_pixels=pixels)

    def begin(self, items: list[Item], seed: int) -> tuple[list[list[Item]], dict[str, float]]:
        return [items], {}

    def totals(self, items: list[Item]) -> dict[str, float]:
        totals = {"cross_entropy": self._weight(items)}
        if self.options.sequence_balance:
            totals["balance"] = float(sum(item.batch.ids.layout.num_items for item in items))
        if self.options.router_z_loss:
            totals["router_z"] = float(sum(item.num_tokens for item in items))
        return totals

    def loss(
        self, model: VisionLanguageModel, items: list[Item], batch: Batch, totals: Mapping[str, float]
    ) -> tuple[Tensor, Figures]:
        assert batch.labels is not None
        options, layout = self.options, batch.ids.layout
        targets = next_token_targets(batch.labels, layout)
        weights = None if options.normalise == "token" else token_weights(targets, layout, options.normalise)
        own, whole = self._weight(items), totals["cross_entropy"]

        def objective(decoded: DecoderOutput, head: Tensor) -> tuple[Tensor, Figures]:
            total, _ = chunked_cross_entropy(
                decoded.hidden.tokens,
                head,
                targets,
                weights=weights,
                z_coefficient=options.z_loss,
                chunk=model.config.loss_chunk,
            )
            loss = total / (own or 1.0) * (own / (whole or 1.0))  # the mean of the pack, times its part of the step
            figures: Figures = {"cross_entropy": total.detach()}
            for name, total in self._of_routers(decoded, batch).items():
                figures[name] = total.detach()
                loss = loss + total * (bool(items) / (totals[name] or 1.0))
            return loss, figures if items else {}

        loss, figures = model(batch, objective=objective).value
        return loss, figures

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _of_routers(self, decoded: DecoderOutput, batch: Batch) -> dict[str, Tensor]:
        """Sums over the sequences and tokens of a pack, added over layers."""
        options, found = self.options, {}
        if decoded.routing and options.sequence_balance:
            terms = [
                sequence_balance_loss(routing, batch.ids.layout, coefficient=options.sequence_balance).sum()
                for routing in decoded.routing
            ]
            found["balance"] = torch.stack(terms).sum()
        if decoded.routing and options.router_z_loss:
            terms = [router_z_loss(routing, coefficient=options.router_z_loss) for routing in decoded.routing]
            found["router_z"] = torch.stack(terms).sum()
        return found

    def _weight(self, items: list[Item]) -> float:
        """The sum of the weights of all tokens."""
        of = {"token": float, "sample": lambda count: float(count > 0), "square": math.sqrt}[self.options.normalise]
        return math.fsum(of(count) for item in items for count in num_targets(item.batch))


def _conversation(sample: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Messages, images and videos.

    Raises:
        SampleError: A caption or a pair of answers, of which nothing or too little would be learnt.
    """
    kind = kind_of(sample)
    if kind in ("caption", "pair"):
        objectives = "contrast" if kind == "caption" else "dpo or mpo"
        raise SampleError(
            f"a conversation is expected, and this is a {kind}: choose objective.kind = {objectives} to learn from it"
        )
    return sample["messages"], sample.get("images"), sample.get("videos")


def num_targets(batch: Batch) -> list[int]:
    """Supervised tokens of every sequence: those with a label, but for the first."""
    assert batch.labels is not None
    taught = next_token_targets(batch.labels, batch.ids.layout) != IGNORE
    return [int(each.sum()) for each in taught.split(list(batch.ids.layout.lengths))]
