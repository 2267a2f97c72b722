"""Resampler: one cross-attention turns the patches of an image, however many, into a fixed number of tokens.

    features [patches, in_dim] -> linear -> norm -> keys (with positions), values (without) ┐
    learned queries [side * side, out_dim] -> norm -> queries (with positions) -------------┴-> attention -> norm -> linear

There is no residual and no MLP. Positions are fixed sines and cosines on a grid of side x side; the keys get them resampled
to the grid of their own image, so images of any size and shape go through.

Source: Qwen-VL, arXiv:2308.12966, section 2.1; constants from the published code of Qwen/Qwen-VL-Chat.
Matches: an independent version of the published code's equations, to 1e-6 relative in fp32.
"""

from __future__ import annotations

import math
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.config import Config, Positive, Size
from vlkit.errors import ConfigError, LayoutError
from vlkit.hub.keymap import KeyMap, rename, reshape, split
from vlkit.layers.attention_sdpa import attend_rows
from vlkit.layers.heads import HeadAxis, head_columns, head_rows
from vlkit.layers.norm import LayerNorm
from vlkit.layers.position import PositionTable, list_to_table, table_to_cells
from vlkit.packing import Layout, Packed
from vlkit.registry import register_component


class ResamplerConfig(Config):
    """Sizes of a resampler; the defaults are Qwen-VL's.

    Attributes:
        in_dim: Width of the tower's features. Where it equals out_dim there is no linear layer before the keys.
        out_dim: Width of queries, keys, values and of the decoder; a multiple of 4 and of num_heads.
        num_queries: Tokens that every image becomes; a square number.
        num_heads: Attention heads.
        norm_eps: Added to the variance in every norm.
    """

    in_dim: Size = 1664
    out_dim: Size = 4096
    num_queries: Size = 256
    num_heads: Size = 32
    norm_eps: Positive = 1e-6

    def check(self) -> None:
        if self.side**2 != self.num_queries:
            raise ConfigError(
                f"ResamplerConfig: num_queries={self.num_queries} is not a square number; queries lie on a square grid, "
                f"for example of {self.side**2} or {(self.side + 1) ** 2}"
            )
        if self.out_dim % self.num_heads:
            raise ConfigError(
                f"ResamplerConfig: out_dim={self.out_dim} is not a multiple of num_heads={self.num_heads}"
            )
        if self.out_dim % 4:
            raise ConfigError(
                f"ResamplerConfig: out_dim={self.out_dim} is not a multiple of 4: sine and cosine of row and column"
            )

    @property
    def side(self) -> int:
        """Rows and columns of the grid of queries."""
        return math.isqrt(self.num_queries)

    @property
    def merge_size(self) -> int:
        """An image of one patch is enough."""
        return 1

    def out_grid(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The grid of tokens, (time, rows, columns): the same for every grid of patches."""
        return 1, self.side, self.side


def sincos_positions(rows: int, cols: int, dim: int) -> Float[Tensor, "rows cols dim"]:
    """Fixed positions on a grid, fp64: column in the first half of the channels, row in the second.

    Each half holds sin(p w) and then cos(p w) of its coordinate p = 0, 1, ... with w = 10000^(-i / (dim / 4)) radians,
    i = 0 ... dim / 4 - 1.
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))

    def waves(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [count, dim / 2]

    column, row = waves(cols)[None, :].expand(rows, -1, -1), waves(rows)[:, None].expand(-1, cols, -1)
    return torch.cat([column, row], dim=2)


class CrossAttention(nn.Module):
    """Multi-head attention of the same queries to the patches of every image."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def head_axes(self) -> dict[str, HeadAxis]:
        """The heads in each projection; see vlkit.layers.heads."""
        head_dim = self.q.out_features // self.num_heads
        rows = {role: head_rows(role, self.num_heads, head_dim) for role in ("q", "k", "v")}
        return {**rows, "out": head_columns(self.num_heads, head_dim)}

    def forward(
        self,
        queries: Float[Tensor, "queries dim"],
        keys: Float[Tensor, "patches dim"],
        values: Float[Tensor, "patches dim"],
        layout: Layout,
    ) -> Float[Tensor, "tokens dim"]:
        """The answers of image 0 to all queries, then those of image 1, ...; consecutive images of one length together."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1))
            for proj, x in ((self.q, queries), (self.k, keys), (self.v, values))
        )
        runs = [(len(list(run)), length) for length, run in groupby(layout.lengths)]
        if not runs:
            return self.out(v.flatten(-2))  # no images, no answers
        sizes = [count * length for count, length in runs]
        answers = []
        for (count, length), k_run, v_run in zip(runs, k.split(sizes), v.split(sizes), strict=True):
            rows = (x.unflatten(0, (count, length)) for x in (k_run, v_run))
            found = attend_rows(q.expand(count, -1, -1, -1), *rows, causal=False, scale=q.shape[-1] ** -0.5)
            answers.append(found.flatten(0, 1))  # [count * queries, heads, head_dim]
        return self.out(torch.cat(answers).flatten(-2))


class Resampler(nn.Module):
    """The projector.

    The positions are a parameter that is not trained, as in the published code: checkpoints hold them, and a fine-tuning that
    set all of the resampler free has changed them.
    """

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.out_dim
        self.query = nn.Parameter(torch.empty(config.num_queries, dim))
        self.positions = PositionTable(config.side, config.side, dim).requires_grad_(False)
        self.kv_proj = nn.Linear(config.in_dim, dim, bias=False) if config.in_dim != dim else None
        self.norm_q = LayerNorm(dim, eps=config.norm_eps)
        self.norm_kv = LayerNorm(dim, eps=config.norm_eps)
        self.attn = CrossAttention(dim, config.num_heads)
        self.norm_out = LayerNorm(dim, eps=config.norm_eps)
        self.out = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Positions as they are defined; the rest as the published code starts it."""
        with torch.no_grad():
            self.positions.table.copy_(sincos_positions(self.config.side, self.config.side, self.config.out_dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        for linear in (self.kv_proj, self.attn.out):
            if linear is not None:
                nn.init.trunc_normal_(linear.weight, std=0.02)
        for linear in (self.attn.q, self.attn.k, self.attn.v):
            nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(0.5))  # of the three as one matrix [3 dim, dim]
        for linear in (self.attn.q, self.attn.k, self.attn.v, self.attn.out):
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.out.weight, std=self.config.out_dim**-0.5)

    def forward(self, features: Packed) -> Packed:
        """[patches, in_dim] -> [images * num_queries, out_dim], with a grid of side x side per image.

        Raises:
            LayoutError: No grids, or features of another width.
        """
        config, layout = self.config, features.layout
        if features.tokens.shape[1:] != (config.in_dim,):
            raise LayoutError(
                f"features have shape {tuple(features.tokens.shape)}; expected {config.in_dim} channels each"
            )
        positions = self.positions(layout).to(features.tokens.dtype)  # raises without grids
        x = features.tokens if self.kv_proj is None else self.kv_proj(features.tokens)
        values = self.norm_kv(x)
        queries = self.norm_q(self.query) + self.positions.table.flatten(0, 1)
        answers = self.attn(queries, values + positions, values, layout)
        grids = [config.out_grid(grid) for grid in layout.grids or ()]
        return Packed(self.out(self.norm_out(answers)), Layout.from_grids(grids))


def _transposed(weight: Float[Tensor, "a b"]) -> Float[Tensor, "b a"]:
    return weight.T


KEYS = KeyMap(
    rename("attn_pool.query", "query"),
    reshape("attn_pool.pos_embed", "positions.table", list_to_table, table_to_cells),
    rename("attn_pool.kv_proj.weight", "kv_proj.weight"),
    rename("attn_pool.{norm}.{kind}", "{norm}.{kind}", norm={"ln_q": "norm_q", "ln_kv": "norm_kv"}),
    split("attn_pool.attn.in_proj_{kind}", "attn.{part}.{kind}", part=("q", "k", "v")),
    rename("attn_pool.attn.out_proj.{kind}", "attn.out.{kind}"),
    rename("ln_post.{kind}", "norm_out.{kind}"),
    reshape("proj", "out.weight", _transposed, _transposed),  # stored [in, out], and square: a shape cannot tell
)
"""Qwen-VL's names, there under `transformer.visual.`."""

register_component(
    "projector",
    ResamplerConfig,
    Resampler,
    {
        "resampler": ResamplerConfig(),
        "resampler-tiny": ResamplerConfig(in_dim=32, out_dim=32, num_queries=4, num_heads=2),
    },
)
