"""A small text encoder for contrastive training, packed as everything else: texts of any length end to end, no padding.

ids -> embedding -> blocks(norm, attention in both directions with rotary, norm, MLP) -> norm -> features of every token
"""

from __future__ import annotations

import torch
from torch import nn

from vlkit.config import Config, Positive, Size
from vlkit.errors import ConfigError, LayoutError, TokenError
from vlkit.layers.mlp import MLP
from vlkit.layers.norm import LayerNorm
from vlkit.layers.rope import make_rotary, rotary_angles, rotary_frequencies
from vlkit.layers.self_attention import SelfAttention
from vlkit.packing import Packed
from vlkit.vision.tower import TowerBlock, run_blocks


class TextEncoderConfig(Config):
    """Sizes of a text encoder.

    Attributes:
        vocab_size: Rows of the embedding.
        dim: Width of the residual stream.
        num_layers: Blocks.
        num_heads: Attention heads; a head has an even number of channels.
        mlp_dim: Hidden width of the MLP.
        theta: Base of the rotary wavelengths.
        norm_eps: Added to the variance in every norm.
    """

    vocab_size: Size
    dim: Size = 768
    num_layers: Size = 12
    num_heads: Size = 12
    mlp_dim: Size = 3072
    theta: Positive = 10000.0
    norm_eps: Positive = 1e-6

    def check(self) -> None:
        if self.dim % (2 * self.num_heads):
            raise ConfigError(
                f"TextEncoderConfig: dim={self.dim} is not a multiple of 2 * num_heads={2 * self.num_heads}; rotary embedding "
                "turns pairs of a head's channels"
            )


class TextEncoder(nn.Module):
    """The encoder: every token sees all tokens of its text.

    SigLIP's text encoder has learned positions up to a length; the rotary embedding here has no longest text.

    Attributes:
        gradient_checkpointing: Recompute each block's activations in the backward instead of keeping them.

    Source: the bidirectional text encoder of SigLIP, arXiv:2303.15343; rotary positions: Su et al., arXiv:2104.09864.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(
            TowerBlock(
                LayerNorm(config.dim, eps=config.norm_eps),
                SelfAttention(config.dim, config.num_heads),
                LayerNorm(config.dim, eps=config.norm_eps),
                MLP(config.dim, config.mlp_dim),
            )
            for _ in range(config.num_layers)
        )
        self.norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings start normal with a deviation of 0.02."""
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids: Packed) -> Packed:
        """Features of every token.

        Args:
            ids: [tokens], one item per text.

        Returns:
            [tokens, dim] with the same layout.

        Raises:
            LayoutError: Ids that are not one-dimensional integers.
            TokenError: An id outside the vocabulary (checked on the CPU).
        """
        tokens, layout = ids.tokens, ids.layout
        if tokens.ndim != 1 or tokens.dtype not in (torch.int32, torch.int64):
            raise LayoutError(f"a text encoder takes ids [tokens], found {tokens.dtype} {tuple(tokens.shape)}")
        size = self.config.vocab_size
        if tokens.device.type == "cpu" and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise TokenError(
                f"ids from {int(tokens.min())} to {int(tokens.max())} lie outside the vocabulary of {size}"
            )
        x = self.embed(tokens)
        frequencies = rotary_frequencies(self.config.dim // self.config.num_heads, self.config.theta, device=x.device)
        rotary = make_rotary(rotary_angles(layout.positions(x.device), frequencies), x.dtype)
        x = run_blocks(
            self.blocks,
            x,
            rotary,
            layout.segments(x.device),
            recompute=self.gradient_checkpointing,
            backend="auto",
        )
        return ids.with_tokens(self.norm(x))
