"""next-token: cross-entropy of the supervised tokens, by any of three normalisations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from vlkit.config import Config
from vlkit.llm.output import DecoderOutput
from vlkit.models import VisionLanguageModel
from vlkit.objectives.cross_entropy import IGNORE, chunked_cross_entropy, next_token_targets
from vlkit.packing import Batch
from vlkit.training.tasks.task import Draw, Figures, Item, Setup


class NextTokenOptions(Config):
    """What the loss is.

    Attributes:
        normalise: The weight of a token in a sample with x supervised tokens: "token" 1, "sample" 1/x, "square" 1/sqrt(x).
    """

    normalise: Literal["token"] = "token"


class NextToken:
    """Sum over tokens of weight * cross-entropy, divided by the sum of the weights of the whole step.

    Source: the normalisations are those of InternVL's published code, arXiv:2412.05271.
    """

    modules = None
    one_pack = False
    resets_optimizer = False

    def __init__(self, options: NextTokenOptions, setup: Setup) -> None:
        self.options, self.processor = options, setup.processor

    def prepare(self, sample: dict[str, Any], draw: Draw) -> Item:
        return Item(
            self.processor(
                sample["messages"], sample.get("images"), sample.get("videos"), tools=sample.get("tools"), labels=True
            )
        )

    def measure(self, sample: dict[str, Any], draw: Draw) -> tuple[int, int]:
        item = self.prepare(sample, draw)
        return item.num_tokens, item.num_patches

    def begin(self, items: list[Item], seed: int) -> tuple[list[list[Item]], dict[str, float]]:
        return [items], {}

    def totals(self, items: list[Item]) -> dict[str, float]:
        return {"weight": math.fsum(weight for item in items for weight in self._weights(item.batch))}

    def loss(
        self, model: VisionLanguageModel, items: list[Item], batch: Batch, totals: Mapping[str, float]
    ) -> tuple[Tensor, Figures]:
        assert batch.labels is not None
        targets = next_token_targets(batch.labels, batch.ids.layout)
        own = math.fsum(weight for item in items for weight in self._weights(item.batch))

        def objective(decoded: DecoderOutput, head: Tensor) -> Tensor:
            total, _ = chunked_cross_entropy(decoded.hidden.tokens, head, targets, chunk=model.config.loss_chunk)
            return total / (own or 1.0) * (own / (totals["weight"] or 1.0))

        return model(batch, objective=objective).value, {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _weights(self, batch: Batch) -> list[float]:
        """Sum of the weights of every sequence."""
        return [float(count) for count in num_targets(batch)]


def num_targets(batch: Batch) -> list[int]:
    """Supervised tokens of every sequence: those with a label, but for the first."""
    assert batch.labels is not None
    taught = next_token_targets(batch.labels, batch.ids.layout) != IGNORE
    return [int(each.sum()) for each in taught.split(list(batch.ids.layout.lengths))]
