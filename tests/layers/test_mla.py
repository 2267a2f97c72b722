"""Latent attention: its definition, and that the absorbed form is the expanded one."""

from __future__ import annotations

import pytest
import torch

from vlkit.layers.cache import Cache
from vlkit.layers.mla import LatentAttention
from vlkit.layers.rope import Rotary, make_rotary
from vlkit.packing import Layout

LENGTHS = (6, 1, 10)
HEADS, RANK, NOPE, ROPE, VALUE = 3, 14, 6, 4, 10


def made() -> tuple[LatentAttention, torch.Tensor, Rotary]:
    torch.manual_seed(0)
    module = LatentAttention(
        12, HEADS, kv_rank=RANK, nope_dim=NOPE, rope_dim=ROPE, value_dim=VALUE, kv_norm_eps=0.01
    ).double()
    torch.nn.init.normal_(module.kv_norm.weight)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).double()
    rotary = make_rotary(positions[:, None] * torch.tensor([1.0, 0.3], dtype=torch.float64))
    return module, torch.randn(sum(LENGTHS), 12, dtype=torch.float64), rotary


def by_definition(module: LatentAttention, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """One sequence, one head, one query at a time; pairs are neighbours, turned as complex numbers."""

    def turn(row: torch.Tensor, t: int) -> torch.Tensor:
        number = torch.view_as_complex(row.reshape(-1, 2).contiguous()) * torch.complex(rotary.cos[t], rotary.sin[t])
        return torch.view_as_real(number).flatten()

    q = module.q(x).view(-1, HEADS, NOPE + ROPE)
    down = module.kv_down(x)
    latent = down[:, :RANK]
    latent = latent / (latent.square().mean(-1, keepdim=True) + 0.01).sqrt() * module.kv_norm.weight
    up = module.kv_up(latent).view(-1, HEADS, NOPE + VALUE)
    shared = torch.stack([turn(down[t, RANK:], t) for t in range(len(x))])
    out = torch.zeros(len(x), HEADS, VALUE, dtype=x.dtype)
    for head in range(HEADS):
        keys = torch.cat([up[:, head, :NOPE], shared], dim=-1)
        for t in range(len(x)):
            query = torch.cat([q[t, head, :NOPE], turn(q[t, head, NOPE:], t)])
            weights = (keys[: t + 1] @ query / (NOPE + ROPE) ** 0.5).softmax(0)
            out[t, head] = weights @ up[: t + 1, head, NOPE:]
    return module.out(out.flatten(1))


def test_packed_attention_is_the_definition_of_each_sequence() -> None:
    module, x, rotary = made()
    together = module(x, rotary, Layout(LENGTHS)).split(LENGTHS)
    parts = zip(x.split(LENGTHS), rotary.cos.split(LENGTHS), rotary.sin.split(LENGTHS), strict=True)
    for ours, (part, cos, sin) in zip(together, parts, strict=True):
        assert torch.allclose(ours, by_definition(module, part, Rotary(cos, sin)), rtol=0, atol=1e-12)


def test_absorbed_decoding_is_the_expanded_form() -> None:
    """Prefill (expanded), a chunk of several tokens and single tokens (absorbed): every row as in one forward."""
    module, x, rotary = made()
    want = module(x, rotary, Layout(LENGTHS))
    cache = Cache(1, 2, 2, ((RANK + ROPE,),), dtype=torch.float64)
    starts, done = {0: 0, 2: 7}, {0: 0, 2: 0}
    for step in [(2, 3), (1, 4), (1, 1), (2, 1)]:
        spans = [(starts[i] + done[i], n) for i, n in zip(done, step, strict=True)]
        index = torch.cat([torch.arange(start, start + n) for start, n in spans])
        layout = Layout(step)
        got = module(x[index], Rotary(rotary.cos[index], rotary.sin[index]), layout, cache, 0)
        cache.advance(layout)
        assert torch.allclose(got, want[index], rtol=0, atol=1e-12)
        done = {i: done[i] + n for i, n in zip(done, step, strict=True)}


def test_decoding_never_expands_the_stored_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache keeps is the latent and the shared rotated key, and kv_up is not run over it."""
    module, x, rotary = made()
    cache = Cache(1, 1, 8, ((RANK + ROPE,),), dtype=torch.float64)
    layout = Layout((5,))
    module(x[:5], Rotary(rotary.cos[:5], rotary.sin[:5]), layout, cache, 0)
    cache.advance(layout)
    calls = []
    plain = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: (calls.append(self), plain(self, x))[1])
    module(x[5:6], Rotary(rotary.cos[5:6], rotary.sin[5:6]), Layout((1,)), cache, 0)
    assert calls
    assert not any(called is module.kv_up for called in calls)
    assert cache.num_bytes == 8 * (RANK + ROPE) * 8


def test_the_norm_of_the_latent_has_its_own_epsilon() -> None:
    """Published code passes none; with 1e-5, as in the other norms, logits move by 1e-5: too little to be seen elsewhere."""
    assert LatentAttention(8, 1, kv_rank=4, nope_dim=2, rope_dim=2, value_dim=2).kv_norm.eps == 1e-6
