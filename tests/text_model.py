"""A decoder alone, as the decode loop wants a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlkit.layers.cache import Cache
from vlkit.llm.decoder import Decoder
from vlkit.llm.output import DecoderOutput
from vlkit.packing import Batch, Layout, Packed


class TextModel:
    """Text without images."""

    def __init__(self, llm: Decoder) -> None:
        self.llm = llm

    def decode(self, batch: Batch, *, cache: Cache | None = None) -> DecoderOutput:
        embeddings = batch.ids.with_tokens(self.llm.embed(batch.ids.tokens))
        return self.llm(embeddings, positions=batch.positions, cache=cache)


def batch_of(texts: Sequence[torch.Tensor]) -> Batch:
    """One sequence per text."""
    return Batch(Packed(torch.cat(list(texts)), Layout(tuple(map(len, texts)))))
