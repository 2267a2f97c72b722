"""Causal self-attention with fewer key than query heads.

x -> q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] -> (RMSNorm per head) -> RoPE -> attention -> out
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from vlkit.errors import ConfigError, LayoutError
from vlkit.layers.attention import Backend, attention
from vlkit.layers.cache import Cache
from vlkit.layers.heads import HeadAxis, head_columns, head_rows
from vlkit.layers.norm import RMSNorm
from vlkit.layers.rope import Pairing, Rotary, apply_rotary
from vlkit.packing import Layout, Segments


class GroupedQueryAttention(nn.Module):
    """Query head h reads key head h // (num_heads / num_kv_heads).

    Args:
        dim: Width of input and output.
        num_heads: Query heads; a multiple of num_kv_heads.
        num_kv_heads: Key and value heads.
        head_dim: Channels of a head; need not be dim / num_heads.
        qkv_bias: Biases of the q, k and v projections.
        out_bias: Bias of the output projection.
        qk_norm_eps: If given, q and k pass an RMSNorm over each head before the rotation; one weight for all heads.
        pairing: Which channels the rotation pairs.

    Raises:
        ConfigError: num_heads is not a multiple of num_kv_heads.

    Source: Ainslie et al., arXiv:2305.13245; norms of q and k: Qwen3, arXiv:2505.09388.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
        pairing: Pairing = "half",
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ConfigError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5
        self.causal = True
        self.pairing = pairing
        self.q = nn.Linear(dim, num_heads * head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=out_bias)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, eps=qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, eps=qk_norm_eps)

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        rotary: Rotary,
        layout: Layout | Segments,
        cache: Cache | None = None,
        layer: int = 0,
        *,
        backend: Backend = "auto",
    ) -> Float[Tensor, "tokens dim"]:
        """Attend to the item's own tokens so far.

        Args:
            rotary: Of the tokens' positions.
            layout: The items; with a cache a Layout, whose items are the sequences of the cache.
            cache: What came before; the new keys and values are added to it.
            layer: Whose rows of the cache to use.
            backend: See vlkit.layers.attention.
        """
        q, k = self.queries_and_keys(x, rotary)
        v = self.v(x).unflatten(-1, (-1, self.head_dim))
        if cache is None:
            out = attention(q, k, v, layout=layout, causal=True, backend=backend)
        else:
            layout = host_layout(layout)
            stored_k, stored_v = cache.write(layer, layout, k, v)
            if any(cache.lengths):
                lengths = cache.key_lengths(layout)
                out = attention(q, stored_k, stored_v, layout=layout, causal=True, backend=backend, key_lengths=lengths)
            else:  # nothing came before: what has just been computed is all there is
                out = attention(q, k, v, layout=layout, causal=True, backend=backend)
        return self.out(out.flatten(-2))

    def queries_and_keys(self, x: Float[Tensor, "tokens dim"], rotary: Rotary) -> tuple[Tensor, Tensor]:
        """What the scores are products of: [tokens, heads, head_dim] and [tokens, kv_heads, head_dim]."""
        q, k = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, rotary, pairing=self.pairing), apply_rotary(k, rotary, pairing=self.pairing)
        if rotary.query_scale is not None:
            q = q * rotary.query_scale.to(q.dtype)[:, None, None]
        return q, k

    @property
    def normalizes_heads(self) -> bool:
        """Whether q and k are brought to one length, whatever their projections give."""
        return self.q_norm is not None

    def head_axes(self) -> dict[str, HeadAxis]:
        """The heads in each projection; see vlkit.layers.heads."""
        return {
            "q": head_rows("q", self.num_heads, self.head_dim),
            "k": head_rows("k", self.num_kv_heads, self.head_dim),
            "v": head_rows("v", self.num_kv_heads, self.head_dim),
            "out": head_columns(self.num_heads, self.head_dim),
        }


def host_layout(layout: Layout | Segments) -> Layout:
    """The layout, where a cache needs one.

    Raises:
        LayoutError: Segments were passed.
    """
    if not isinstance(layout, Layout):
        raise LayoutError("attention with a cache needs a Layout, whose lengths are on the host; Segments were passed")
    return layout
