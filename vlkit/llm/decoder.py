"""What all decoders share: embedding, a stack of blocks, norm and head.

    ids [tokens] -> embed -> Packed [tokens, dim] -> blocks(norm, causal attention, norm, MLP or MoE) -> norm -> hidden
    hidden -> head -> logits [tokens, vocab]

A decoder's own file gives its config, its blocks and its published names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlkit.errors import LayoutError, SequenceTooLongError, TokenError
from vlkit.layers.attention import Backend
from vlkit.layers.cache import Cache
from vlkit.layers.moe import MoE, Routing
from vlkit.layers.norm import RMSNorm
from vlkit.layers.rope import Rotary
from vlkit.llm.output import DecoderOutput, Deep
from vlkit.llm.rope import Rope
from vlkit.packing import Layout, Packed, Segments


@runtime_checkable
class DecoderConfig(Protocol):
    """The fields that every decoder's config has."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def tied(self) -> bool: ...


class DecoderBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)).

    Args:
        attn: `(x, rotary, layout, cache, layer, backend=) -> x`, such as GroupedQueryAttention or LatentAttention.
        mlp: `x -> x`, or `x -> (x, Routing)`.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, *, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = RMSNorm(dim, eps=norm_eps)
        self.mlp = mlp

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        rotary: Rotary,
        layout: Layout | Segments,
        cache: Cache | None = None,
        layer: int = 0,
        *,
        backend: Backend = "auto",
    ) -> tuple[Float[Tensor, "tokens dim"], Routing | None]:
        x = x + self.attn(self.norm1(x), rotary, layout, cache, layer, backend=backend)
        out = self.mlp(self.norm2(x))
        out, routing = out if isinstance(self.mlp, MoE) else (out, None)
        return x + out, routing


class Decoder(nn.Module):
    """Embedding, blocks, norm and head. Each decoder is this class with its own blocks.

    Args:
        blocks: One per layer, called as DecoderBlock is.
        rope: Makes rotary angles of positions.
        cache_rows: Shape of each row that a layer keeps of a token.

    Attributes:
        gradient_checkpointing: Recompute each block's activations in the backward instead of keeping them.
        attention_backend: See vlkit.layers.attention.
    """

    def __init__(
        self,
        config: DecoderConfig,
        blocks: Iterable[nn.Module],
        *,
        rope: Rope,
        cache_rows: tuple[tuple[int, ...], ...],
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention_backend: Backend = "auto"
        self.rope = rope
        self.cache_rows = cache_rows
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw embedding and linear layers from a normal of width 0.02; experts and norms have their own rules."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens dim"]:
        """Embeddings of token ids.

        Raises:
            TokenError: An id outside the vocabulary. Looked for on the CPU only: elsewhere it would wait for the device,
                whose own look-up fails anyway.
        """
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise TokenError(
                    f"token id {low if low < 0 else high} lies outside the vocabulary of {self.config.vocab_size}; "
                    "was the text tokenised for another model?"
                )
        return self.embedding(ids)

    def forward(
        self,
        embeddings: Packed,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        deep: Deep | None = None,
    ) -> DecoderOutput:
        """Run the blocks over packed sequences.

        Args:
            embeddings: [tokens, dim], one item per sequence.
            positions: [tokens], or [tokens, 3] as (time, row, column) for decoders with rope_sections; on any device. None
                counts from 0 in every sequence, or goes on where the cache ends, on all axes alike.
            cache: What came before; the new tokens are added to it. The items are its sequences, in order.
            deep: Features that join the first layers' outputs.

        Raises:
            SequenceTooLongError: A position beyond max_positions.
            LayoutError: Positions, items or deep features that do not fit.
        """
        x, layout = embeddings.tokens, embeddings.layout
        positions, next_positions = self._positions(layout, positions, cache, x.device)
        rotary = self.rope(
            positions,
            layout,
            cache.prompt_lengths if cache is not None and any(cache.lengths) else layout.lengths,
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
            training=self.training,
        )
        if deep is not None:
            self._check_deep(deep, layout)
        if cache is None:
            x, routing = self.forward_blocks(x, rotary, layout.segments(x.device), deep=deep)
        else:
            x, routing = self._run_blocks(x, rotary, layout, cache, deep)  # lengths are on the host: never compiled
            cache.advance(layout, next_positions)
        return DecoderOutput(Packed(self.norm(x), layout), routing)

    def forward_blocks(
        self,
        x: Float[Tensor, "tokens dim"],
        rotary: Rotary,
        segments: Segments,
        deep: Deep | None = None,
    ) -> tuple[Float[Tensor, "tokens dim"], tuple[Routing, ...]]:
        """The block stack without a cache. All that depends on lengths is tensors: it compiles once for all lengths."""
        return self._run_blocks(x, rotary, segments, None, deep)

    def _run_blocks(
        self, x: Tensor, rotary: Rotary, layout: Layout | Segments, cache: Cache | None, deep: Deep | None
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        routings = []
        for layer, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled() and cache is None:
                made = checkpoint(block, x, rotary, layout, backend=self.attention_backend, use_reentrant=False)
            else:
                made = block(x, rotary, layout, cache, layer, backend=self.attention_backend)
            x, routing = made
            if deep is not None and layer < len(deep.features):
                x = x.index_add(0, deep.rows, deep.features[layer].to(x.dtype))
            if routing is not None:
                routings.append(routing)
        return x, tuple(routings)

    def head(self, hidden: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens vocab"]:
        """Logits, in the dtype of the weights."""
        return F.linear(hidden, self.head_weight) if self.lm_head is None else self.lm_head(hidden)

    @property
    def head_weight(self) -> Float[Tensor, "vocab dim"]:
        """The matrix of the head; the embedding's when they are tied."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    def new_cache(
        self, num_sequences: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> Cache:
        """An empty cache for so many sequences of `capacity` tokens; it grows when they get longer."""
        return Cache(len(self.blocks), num_sequences, capacity, self.cache_rows, dtype=dtype, device=device)

    def inactive_parameters(self) -> int:
        """Parameters that one token does not use: the experts that were not chosen."""
        return sum(module.inactive_parameters() for module in self.modules() if isinstance(module, MoE))

    def _positions(
        self, layout: Layout, positions: Tensor | None, cache: Cache | None, device: torch.device
    ) -> tuple[Tensor, list[int]]:
        """Positions on the device, and where each sequence goes on after them."""
        limit = self.config.max_positions
        ends = list(layout.lengths) if cache is None else cache.key_lengths(layout)
        if max(ends, default=0) > limit:
            raise SequenceTooLongError(
                f"sequence {ends.index(max(ends))} has {max(ends)} tokens, the decoder {limit} positions; "
                "cut the text, use fewer or smaller images, or raise max_positions if the weights were trained for it"
            )
        if positions is not None:
            # Without a cache nobody asks where they end, and looking would wait for the device.
            on_host = cache is not None or positions.device.type == "cpu"
            return positions.to(device), _next_positions(layout, positions, limit) if on_host else []
        if cache is None or not any(cache.lengths):
            return layout.positions(device), list(layout.lengths)
        starts = cache.next_positions
        following = [start + new for start, new in zip(starts, layout.lengths, strict=True)]
        if max(following) > limit:
            raise SequenceTooLongError(
                f"sequence {following.index(max(following))} goes on to position {max(following) - 1}, the decoder has "
                f"0 to {limit - 1}"
            )
        first = torch.tensor(starts, device=device)
        if all(new == 1 for new in layout.lengths):
            return first, following
        return layout.positions(device) + first[layout.item_ids(device).long()], following

    def _check_deep(self, deep: Deep, layout: Layout) -> None:
        """Raise a LayoutError for features that do not fit."""
        shapes = [tuple(features.shape) for features in deep.features]
        wanted = (len(deep.rows), self.config.dim)
        if deep.rows.ndim != 1 or len(shapes) > len(self.blocks) or any(shape != wanted for shape in shapes):
            raise LayoutError(
                f"deep features {shapes} for {tuple(deep.rows.shape)} rows; expected at most {len(self.blocks)} of shape "
                f"{wanted}, one per decoder layer"
            )


def _next_positions(layout: Layout, positions: Tensor, limit: int) -> list[int]:
    """One more than the highest of the given positions in each sequence."""
    if positions.shape not in ((layout.num_tokens,), (layout.num_tokens, 3)):
        raise LayoutError(
            f"positions have shape {tuple(positions.shape)}; expected one per token, {layout.num_tokens}, or "
            "(time, row, column) of each"
        )
    parts = positions.flatten().split([positions[0].numel() * length for length in layout.lengths])
    bounds = torch.stack([torch.stack(part.aminmax()) for part in parts])  # [sequences, 2]
    lowest, highest = bounds.T.tolist()
    if min(lowest) < 0 or max(highest) >= limit:
        raise SequenceTooLongError(
            f"positions run from {min(lowest)} to {max(highest)}, the decoder has 0 to {limit - 1}"
        )
    return [most + 1 for most in highest]
