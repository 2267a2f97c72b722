"""What a decoder gives, and what it can be given besides embeddings."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vlkit.layers.moe import Routing
from vlkit.packing import Packed


class DecoderOutput(NamedTuple):
    """Output of a decoder before its head.

    Attributes:
        hidden: After the last norm, [tokens, dim].
        routing: Which experts each token chose, one per MoE layer; empty for dense decoders.
    """

    hidden: Packed
    routing: tuple[Routing, ...] = ()


class Deep(NamedTuple):
    """Features of a tower's inner layers that join the residual stream of the first decoder layers.

    Attributes:
        rows: Tokens that they are added to, int64 [n].
        features: [n, dim] each; number k is added to the output of decoder layer k.

    Source: DeepStack, arXiv:2406.04334.
    """

    rows: Tensor
    features: tuple[Tensor, ...]
