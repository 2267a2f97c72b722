"""Grouped-query attention against its definition, and with a cache against without."""

from __future__ import annotations

import pytest
import torch

from vlkit.errors import ConfigError, LayoutError
from vlkit.layers.cache import Cache
from vlkit.layers.gqa import GroupedQueryAttention
from vlkit.layers.rope import Rotary, make_rotary
from vlkit.packing import Layout

LENGTHS = (5, 1, 9)


def made(**options: object) -> tuple[GroupedQueryAttention, torch.Tensor, Rotary]:
    torch.manual_seed(0)
    module = GroupedQueryAttention(12, 6, 2, 8, **options).double()  # type: ignore[arg-type]
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).double()
    rotary = make_rotary(positions[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=torch.float64))
    return module, torch.randn(sum(LENGTHS), 12, dtype=torch.float64), rotary


def by_definition(module: GroupedQueryAttention, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """One sequence, one head, one query at a time."""

    def turn(row: torch.Tensor, t: int) -> torch.Tensor:
        a, b = row[:4], row[4:]
        return torch.cat([a * rotary.cos[t] - b * rotary.sin[t], a * rotary.sin[t] + b * rotary.cos[t]])

    def norm(row: torch.Tensor, module: torch.nn.Module | None) -> torch.Tensor:
        return row if module is None else row / (row.square().mean() + module.eps).sqrt() * module.weight

    q, k, v = module.q(x), module.k(x), module.v(x)
    out = torch.zeros(len(x), 48, dtype=x.dtype)
    for head in range(6):
        own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 3), 8 * (head // 3) + 8)
        keys = torch.stack([turn(norm(k[s, shared], module.k_norm), s) for s in range(len(x))])
        for t in range(len(x)):
            weights = (keys[: t + 1] @ turn(norm(q[t, own], module.q_norm), t) / 8**0.5).softmax(0)
            out[t, own] = weights @ v[: t + 1, shared]
    return module.out(out)


@pytest.mark.parametrize("options", [{}, {"qk_norm_eps": 0.01}, {"qkv_bias": True, "out_bias": True}])
def test_packed_attention_is_the_definition_of_each_sequence(options: dict[str, object]) -> None:
    module, x, rotary = made(**options)
    if module.q_norm is not None:
        torch.nn.init.normal_(module.q_norm.weight)
        torch.nn.init.normal_(module.k_norm.weight)
    together = module(x, rotary, Layout(LENGTHS)).split(LENGTHS)
    parts = zip(x.split(LENGTHS), rotary.cos.split(LENGTHS), rotary.sin.split(LENGTHS), strict=True)
    for ours, (part, cos, sin) in zip(together, parts, strict=True):
        assert torch.allclose(ours, by_definition(module, part, Rotary(cos, sin)), rtol=0, atol=1e-12)


def test_with_cache_is_without() -> None:
    """Prefill, a chunk of unequal lengths, single tokens: every row as in one forward."""
    module, x, rotary = made(qk_norm_eps=1e-6)
    want = module(x, rotary, Layout(LENGTHS))
    cache = Cache(1, 2, 3, ((2, 8),) * 2, dtype=torch.float64)
    starts = {0: 0, 2: 6}
    done = {0: 0, 2: 0}
    for step in [(2, 3), (1, 4), (1, 1), (1, 1)]:
        index = torch.cat(
            [torch.arange(starts[i] + done[i], starts[i] + done[i] + n) for i, n in zip(done, step, strict=True)]
        )
        layout = Layout(step)
        got = module(x[index], Rotary(rotary.cos[index], rotary.sin[index]), layout, cache, 0)
        cache.advance(layout)
        assert torch.allclose(got, want[index], rtol=0, atol=1e-12)
        done = {i: done[i] + n for i, n in zip(done, step, strict=True)}


def test_query_scale_multiplies_the_queries_of_its_token() -> None:
    """As if the query projection had been scaled, one token at a time."""
    module, x, rotary = made()
    scale = torch.rand(len(x), dtype=torch.float64) + 0.5
    got = module(x, rotary._replace(query_scale=scale), Layout(LENGTHS))
    weight = module.q.weight.data
    for token in (0, 5, 9):
        module.q.weight.data = scale[token] * weight
        assert torch.allclose(got[token], module(x, rotary, Layout(LENGTHS))[token], rtol=0, atol=1e-12)


def test_a_cache_needs_the_layout_on_the_host() -> None:
    module, x, rotary = made()
    with pytest.raises(LayoutError, match="Segments"):
        module(x, rotary, Layout(LENGTHS).segments(), Cache(1, 3, 9, ((2, 8),) * 2, dtype=torch.float64), 0)


def test_heads_that_cannot_share_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_heads=6.*num_kv_heads=4"):
        GroupedQueryAttention(12, 6, 4, 8)
