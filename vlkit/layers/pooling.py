"""One vector per item of a pack, by attention from a learned probe.

x [tokens, dim] -> keys, values -> softmax over the item's tokens, per head -> out -> x + mlp(norm(x)) -> [items, dim]
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.errors import ConfigError
from vlkit.layers.mlp import MLP
from vlkit.layers.norm import LayerNorm
from vlkit.packing import Layout, Packed


class AttentionPool(nn.Module):
    """The pooling head of SigLIP for items of any length: a learned probe attends to the tokens of each item.

    Args:
        dim: Width of the tokens and of the pooled vectors.
        num_heads: Must divide dim.
        mlp_dim: Hidden width of the MLP behind the attention; None means 4 * dim.
        eps: Added to the variance in the norm.

    Raises:
        ConfigError: Heads that do not divide the width.

    Source: SigLIP, arXiv:2303.15343; the head is that of Zhai et al., arXiv:2106.04560, section 3.2.
    Matches: transformers' SiglipMultiheadAttentionPoolingHead item by item, to 1e-6 in fp32.
    """

    def __init__(self, dim: int, num_heads: int, *, mlp_dim: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"AttentionPool: dim={dim} is not a multiple of num_heads={num_heads}")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.probe = nn.Parameter(torch.empty(dim))
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, 4 * dim if mlp_dim is None else mlp_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The probe starts normal with a variance of 1 / dim."""
        nn.init.normal_(self.probe, std=self.probe.shape[0] ** -0.5)

    def forward(self, x: Packed) -> Float[Tensor, "items dim"]:
        """Pool every item.

        Args:
            x: [tokens, dim].

        Returns:
            One vector per item; none where the pack has no items.
        """
        probe = self.q(self.probe).view(self.num_heads, -1)
        k, v = (project(x.tokens).unflatten(-1, (self.num_heads, -1)) for project in (self.k, self.v))
        scores = (k * probe).sum(-1) * self.head_dim**-0.5  # [tokens, heads]
        pooled = self.out(weighted_means(scores, v, x.layout).flatten(-2))
        return pooled + self.mlp(self.norm(pooled))


def weighted_means(
    scores: Float[Tensor, "tokens heads"], values: Float[Tensor, "tokens heads head_dim"], layout: Layout
) -> Float[Tensor, "items heads head_dim"]:
    """Mean of each item's values, weighted by the softmax of its scores; summed in fp32, or fp64 for such values.

    Args:
        scores: One per token and head.
        values: What is averaged.
        layout: The items.
    """
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    item = layout.item_ids(scores.device).long()
    scores = scores.to(wide)
    heads = scores.shape[1]
    peaks = scores.new_full((layout.num_items, heads), -torch.inf)
    peaks.scatter_reduce_(0, item[:, None].expand(-1, heads), scores.detach(), "amax")
    weights = (scores - peaks[item]).exp()
    sums = weights.new_zeros(layout.num_items, heads).index_add(0, item, weights)
    totals = weights.new_zeros(layout.num_items, *values.shape[1:]).index_add(
        0, item, weights[:, :, None] * values.to(wide)
    )
    return (totals / sums[:, :, None]).to(values.dtype)
