"""What a decoder gives."""

from __future__ import annotations

from typing import NamedTuple

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
