"""Multi-head latent attention: keys and values of all heads are made from one short latent vector per token.

    x -> q [tokens, heads, nope + rope]
    x -> kv_down -> latent c [tokens, kv_rank], k_rope [tokens, rope] (one for all heads); kv_norm(c) -> kv_up -> k_nope, v
    q = [q_nope | rotated q_rope], k = [k_nope | rotated k_rope] -> causal attention -> out

The cache keeps kv_norm(c) and the rotated k_rope only. Decoding never expands them: kv_up is applied to the query and
to the attended latent instead, which is the same product in another order.

Letters: T tokens, H heads, N nope, R rope, V value, C kv_rank.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.layers.attention import Backend, attention
from vlkit.layers.cache import Cache
from vlkit.layers.gqa import host_layout
from vlkit.layers.heads import HeadAxis, Heads, head_columns
from vlkit.layers.norm import RMSNorm
from vlkit.layers.rope import Pairing, Rotary, apply_rotary
from vlkit.packing import Layout, Segments


class LatentAttention(nn.Module):
    """Multi-head latent attention without a low-rank query, causal, without biases.

    Args:
        dim: Width of input and output.
        num_heads: Heads.
        kv_rank: Width of the latent.
        nope_dim: Channels per head of q and k that carry no position.
        rope_dim: Channels per head that are rotated; on the key side shared by all heads.
        value_dim: Channels per head of v.
        kv_norm_eps: Epsilon of the latent's norm. Published code passes none, so it is 1e-6 whatever other norms use.
        pairing: Which channels the rotation pairs; published checkpoints interleave.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; the absorbed form is its appendix on inference.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_rank: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        kv_norm_eps: float = 1e-6,
        pairing: Pairing = "interleaved",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kv_rank, self.nope_dim, self.rope_dim, self.value_dim = kv_rank, nope_dim, rope_dim, value_dim
        self.pairing = pairing
        self.scale = (nope_dim + rope_dim) ** -0.5
        self.causal = True
        self.normalizes_heads = False  # the latent's norm comes before the heads
        self.q = nn.Linear(dim, num_heads * (nope_dim + rope_dim), bias=False)
        self.kv_down = nn.Linear(dim, kv_rank + rope_dim, bias=False)
        self.kv_norm = RMSNorm(kv_rank, eps=kv_norm_eps)
        self.kv_up = nn.Linear(kv_rank, num_heads * (nope_dim + value_dim), bias=False)
        self.out = nn.Linear(num_heads * value_dim, dim, bias=False)

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
            rotary: Of the tokens' positions, rope_dim / 2 pairs.
            layout: The items; with a cache a Layout, whose items are the sequences of the cache.
            cache: What came before; the new latents are added to it.
            layer: Whose rows of the cache to use.
            backend: See vlkit.layers.attention.
        """
        q_nope, q_rope, latent, k_rope = self._project(x, rotary)
        if cache is not None:
            layout = host_layout(layout)
            (stored,) = cache.write(layer, layout, torch.cat([latent, k_rope.squeeze(1)], dim=-1))
            if any(cache.lengths):
                lengths = cache.key_lengths(layout)
                attend = self._absorbed if _is_matrix(self.kv_up) else self._expanded
                return self.out(attend(q_nope, q_rope, stored, layout, lengths, backend).flatten(-2))
        q, k, v = self._expand(q_nope, q_rope, latent, k_rope)
        out = attention(q, k, v, layout=layout, causal=True, scale=self.scale, backend=backend)
        return self.out(out.flatten(-2))

    def queries_and_keys(self, x: Float[Tensor, "tokens dim"], rotary: Rotary) -> tuple[Tensor, Tensor]:
        """What the scores are products of, both [tokens, heads, nope + rope]."""
        q, k, _ = self._expand(*self._project(x, rotary))
        return q, k

    def head_axes(self) -> dict[str, HeadAxis]:
        """The heads in each projection; see vlkit.layers.heads. What is shared by all heads, kv_down, is not among them."""
        q = Heads(self.num_heads, (("q_nope", self.nope_dim), ("q_rope", self.rope_dim)))
        kv = Heads(self.num_heads, (("k_nope", self.nope_dim), ("v", self.value_dim)))
        out = head_columns(self.num_heads, self.value_dim)
        return {"q": HeadAxis(0, (q,)), "kv_up": HeadAxis(0, (kv,)), "out": out}

    def _project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_nope [T, H, N], rotated q_rope [T, H, R], normed latent [T, C], rotated k_rope [T, 1, R]."""
        q_nope, q_rope = self.q(x).unflatten(-1, (self.num_heads, -1)).split([self.nope_dim, self.rope_dim], dim=-1)
        latent, k_rope = self.kv_down(x).split([self.kv_rank, self.rope_dim], dim=-1)
        q_rope, k_rope = (apply_rotary(x, rotary, pairing=self.pairing) for x in (q_rope, k_rope.unsqueeze(1)))
        return q_nope, q_rope, self.kv_norm(latent), k_rope

    def _expand(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k [T, H, N + R] and v [T, H, V] of all heads."""
        up = self.kv_up(latent).unflatten(-1, (self.num_heads, -1))
        k_nope, v = up.split([self.nope_dim, self.value_dim], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, self.num_heads, -1)], dim=-1)
        return torch.cat([q_nope, q_rope], dim=-1), k, v

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, stored: Tensor, layout: Layout, lengths: list[int], backend: Backend
    ) -> Float[Tensor, "tokens heads value_dim"]:
        """Attention over stored rows [sequences, capacity, C + R]; all heads read one key, the row, and its latent as value.

        Per stored token and head this costs C + R + C products instead of N + R + V, and saves expanding the row.
        """
        up = self.kv_up.weight.unflatten(0, (self.num_heads, -1))  # [H, N + V, C]
        up_k, up_v = up.split([self.nope_dim, self.value_dim], dim=1)
        q_latent = torch.bmm(q_nope.transpose(0, 1), up_k).transpose(0, 1)  # [T, H, C]
        q = torch.cat([q_latent, q_rope], dim=-1)
        k = stored.unsqueeze(2)  # [sequences, capacity, 1, C + R]
        out = attention(
            q,
            k,
            k[..., : self.kv_rank],
            layout=layout,
            causal=True,
            scale=self.scale,
            backend=backend,
            key_lengths=lengths,
        )
        return torch.bmm(out.transpose(0, 1), up_v.transpose(1, 2)).transpose(0, 1)

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, stored: Tensor, layout: Layout, lengths: list[int], backend: Backend
    ) -> Float[Tensor, "tokens heads value_dim"]:
        """The same by expanding every stored row, for a kv_up that is more than a matrix, such as one with an adapter."""
        longest = max(lengths)
        latent, k_rope = stored[:, :longest].split([self.kv_rank, self.rope_dim], dim=-1)
        up = self.kv_up(latent).unflatten(-1, (self.num_heads, -1))  # [sequences, longest, H, N + V]
        k_nope, v = up.split([self.nope_dim, self.value_dim], dim=-1)
        k = torch.cat([k_nope, k_rope.unsqueeze(2).expand(*k_nope.shape[:3], -1)], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        return attention(q, k, v, layout=layout, causal=True, scale=self.scale, backend=backend, key_lengths=lengths)


def _is_matrix(module: nn.Module) -> bool:
    """Whether calling the module is a product with its weight and nothing else."""
    watched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not watched
