"""The decode loop: one prefill of the packed batch, then one token per sequence and step from the cache.

batch -> embed -> llm (writes the cache) -> last hidden of every sequence -> next ids -> embed -> llm (reads the cache) -> ...
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vlkit.errors import ConfigError, LayoutError, SequenceTooLongError
from vlkit.generation.sampling import Sampler
from vlkit.layers.cache import Cache
from vlkit.llm.output import DecoderOutput
from vlkit.packing import Batch, Layout, Packed


@runtime_checkable
class Generator(Protocol):
    """What the loop needs of a model: a first forward over a batch with its images, and a decoder with a cache."""

    llm: Any

    def decode(self, batch: Batch, *, cache: Cache | None = None) -> DecoderOutput:
        """Hidden states of a batch, images in place; the cache is filled."""
        ...


def _stop_ids(stop: Sequence[int] | Tensor) -> frozenset[int]:
    values = stop.tolist() if isinstance(stop, Tensor) else stop
    try:
        return frozenset(index(value) for value in values)
    except TypeError:
        raise ConfigError(f"stop: expected a list of token ids, found {stop!r}") from None


@torch.no_grad()
def generate(
    model: Generator,
    batch: Batch,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
) -> list[list[int]]:
    """Continue every sequence until a stop id or max_new_tokens.

    Args:
        model: A VisionLanguageModel, or anything with `decode` and `llm`.
        batch: Sequences of any lengths; labels are not looked at.
        max_new_tokens: New tokens per sequence at most.
        temperature: 0 is greedy.
        top_p: Nucleus sampling.
        top_k: Keep the k likeliest; 0 keeps all.
        stop: Ids that end a sequence; the id itself is part of the answer.
        seed: Of the sampling. Every sequence draws by itself, with a seed made of this one and its place in the batch; a list
            gives each its own.

    Returns:
        The new ids of each sequence.

    Raises:
        SequenceTooLongError: A sequence with its answer would pass the decoder's positions.
        ConfigError: A value out of range.
    """
    if not isinstance(batch, Batch):
        raise LayoutError(f"generate takes a Batch, found {type(batch).__name__}; a Processor or model.pack makes one")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be a whole number of at least 1, found {max_new_tokens!r}")
    lengths, limit = batch.ids.layout.lengths, model.llm.config.max_positions
    if max(lengths) + max_new_tokens > limit:
        worst = lengths.index(max(lengths))
        raise SequenceTooLongError(
            f"sequence {worst}: {lengths[worst]} tokens and {max_new_tokens} new ones pass the decoder's {limit} positions; "
            "ask for fewer new tokens or use smaller images"
        )
    answers: list[list[int]] = [[] for _ in lengths]
    running = list(range(len(lengths)))
    sampler = Sampler(len(lengths), temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    stops = _stop_ids(stop)

    weight = model.llm.head_weight
    cache = model.llm.new_cache(len(lengths), max(lengths) + max_new_tokens, dtype=weight.dtype, device=weight.device)
    hidden = model.decode(batch, cache=cache).hidden
    last: Tensor = hidden.tokens[hidden.layout.cu_seqlens(hidden.tokens.device)[1:].long() - 1]  # [sequences, dim]
    furthest = max(cache.next_positions)
    if furthest + max_new_tokens > limit:  # positions that were given, or count time
        raise SequenceTooLongError(
            f"sequence {cache.next_positions.index(furthest)} goes on at position {furthest}, and {max_new_tokens} new "
            f"tokens pass the decoder's {limit} positions; ask for fewer new tokens"
        )
    for step in range(max_new_tokens):
        ids = sampler(model.llm.head(last), running)
        drawn = ids.tolist()
        for sequence, token in zip(running, drawn, strict=True):
            answers[sequence].append(token)
        kept = [row for row, token in enumerate(drawn) if token not in stops]
        if not kept or step == max_new_tokens - 1:
            break
        if len(kept) < len(running):
            cache.select(kept)
            running = [running[row] for row in kept]
            ids = ids[torch.tensor(kept, device=ids.device)]
        layout = Layout((1,) * len(running))
        last = model.llm(Packed(model.llm.embed(ids), layout), cache=cache).hidden.tokens
    return answers
