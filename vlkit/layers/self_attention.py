"""Multi-head self-attention of a tower.

x [tokens, dim] -> q, k, v [tokens, heads, head_dim] -> RoPE on q and k -> attention in each item -> out [tokens, dim]
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from vlkit.layers.attention import Backend, attention
from vlkit.layers.heads import HeadAxis, head_columns, head_rows
from vlkit.layers.rope import Pairing, Rotary, apply_rotary
from vlkit.packing import Layout, Segments


class SelfAttention(nn.Module):
    """Multi-head attention of a tower: every patch sees all patches of its item.

    Args:
        dim: Width of input and output.
        num_heads: Must divide dim.
        bias: Whether the four projections have one.
        pairing: Which channels the rotary embedding turns together, see `apply_rotary`.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool = True, pairing: Pairing = "half") -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.pairing = num_heads, dim // num_heads, pairing
        self.scale = self.head_dim**-0.5
        self.causal = False
        self.normalizes_heads = False
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(dim, dim, bias=bias)
        self.v = nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        rotary: Rotary | None,
        layout: Layout | Segments,
        *,
        backend: Backend = "auto",
    ) -> Float[Tensor, "tokens dim"]:
        q, k = self.queries_and_keys(x, rotary)
        v = self.v(x).unflatten(-1, (self.num_heads, -1))
        return self.out(attention(q, k, v, layout=layout, backend=backend).flatten(-2))

    def queries_and_keys(self, x: Float[Tensor, "tokens dim"], rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """What the scores are products of, both [tokens, heads, head_dim]."""
        q, k = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q, self.k))
        if rotary is not None:
            q, k = apply_rotary(q, rotary, pairing=self.pairing), apply_rotary(k, rotary, pairing=self.pairing)
        return q, k

    def head_axes(self) -> dict[str, HeadAxis]:
        """The heads in each projection; see vlkit.layers.heads."""
        rows = {role: head_rows(role, self.num_heads, self.head_dim) for role in ("q", "k", "v")}
        return {**rows, "out": head_columns(self.num_heads, self.head_dim)}
