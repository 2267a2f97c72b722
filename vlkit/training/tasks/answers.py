"""Log-probabilities of labelled tokens: inside of a loss, and beforehand under a model that does not learn from them.

Items --pack by the run's budget--> forwards without gradients --token_log_probs--> [tokens] of every item, on the host
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlkit.errors import ConfigError
from vlkit.llm.output import DecoderOutput
from vlkit.models import VisionLanguageModel
from vlkit.objectives.cross_entropy import IGNORE, next_token_targets
from vlkit.objectives.log_probs import token_log_probs
from vlkit.packing import Batch
from vlkit.training.packs import pack_items
from vlkit.training.tasks.task import Item, Setup
from vlkit.training.update import autocast, blank_batch


def refuse_dropout(setup: Setup) -> None:
    """Refuse what makes two forwards of the same weights differ: the difference would pass for something learnt.

    Raises:
        ConfigError: Adapters with dropout.
    """
    lora = setup.config.lora
    if lora is not None and lora.dropout:
        raise ConfigError(
            f"lora.dropout = {lora.dropout}: this objective compares log-probs of answers with those of another forward, which "
            "would drop other inputs; set lora.dropout = 0"
        )


def targets_of(batch: Batch) -> Int[Tensor, " tokens"]:
    """The token that each is followed by, where that is learnt."""
    assert batch.labels is not None
    return next_token_targets(batch.labels, batch.ids.layout)


def learnt(batch: Batch) -> Bool[Tensor, " tokens"]:
    """Tokens behind which something is learnt."""
    return targets_of(batch) != IGNORE


def num_learnt(batch: Batch) -> int:
    return int(learnt(batch).sum())


@torch.no_grad()
def log_probs_of(
    model: VisionLanguageModel, items: Sequence[Item], setup: Setup, temperature: float = 1.0
) -> list[Float[Tensor, " tokens"]]:
    """Of the tokens of every item, on the host, 0 where nothing is learnt. Collective where the model is sharded.

    The precision and the packs are those of training.

    Args:
        model: A frozen one, or the policy.
        items: Of this rank; ranks may have different numbers of them, or none.
        setup: Of the task that asks.
        temperature: That the logits are divided by.
    """
    config, ranks = setup.config, setup.ranks
    packs = pack_items(
        items,
        tokens=config.micro_batch_tokens or config.data.pack_tokens,
        patches=config.data.pack_patches,
        most=config.micro_batch,
    )
    found: dict[int, Tensor] = {}

    def forward(batch: Batch) -> Tensor:
        targets = targets_of(batch)

        def objective(decoded: DecoderOutput, head: Tensor) -> Tensor:
            return token_log_probs(
                decoded.hidden.tokens, head, targets, temperature=temperature, chunk=model.config.loss_chunk
            )

        with autocast(config, ranks.device, model.parts_are_sharded):
            value: Tensor = model(batch, objective=objective).value
        return value.cpu()

    forwards = len(packs)
    if model.parts_are_sharded:  # the others wait for this rank's share of the weights
        forwards = max(count for (count,) in ranks.gather(forwards))
    for pack in packs:
        values = forward(Batch.concat([item.batch for item in pack]).to(ranks.device))
        for item, own in zip(pack, values.split([item.num_tokens for item in pack]), strict=True):
            found[id(item)] = own
    for _ in range(forwards - len(packs)):
        forward(blank_batch(model).to(ranks.device))
    return [found[id(item)] for item in items]
