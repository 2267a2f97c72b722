"""The pooled vector of an item depends on that item alone, and is what torch's own attention gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from vlkit.errors import ConfigError
from vlkit.layers.pooling import AttentionPool, weighted_means
from vlkit.packing import Layout, Packed

LENGTHS = (1, 7, 3, 16, 2)


def pool_and_tokens(dtype: torch.dtype = torch.float64) -> tuple[AttentionPool, Packed]:
    torch.manual_seed(0)
    return AttentionPool(12, 3, mlp_dim=20).to(dtype), Packed(torch.randn(29, 12).to(dtype), Layout(LENGTHS))


def plain(pool: AttentionPool, x: Tensor) -> Tensor:
    """One item, written out: [tokens, dim] -> [dim]."""
    q, k, v = pool.q(pool.probe)[None], pool.k(x), pool.v(x)
    heads = [t.unflatten(-1, (3, 4)).transpose(0, 1) for t in (q, k, v)]
    y = pool.out(F.scaled_dot_product_attention(*heads).transpose(0, 1).flatten(1))[0]
    return y + pool.mlp(F.layer_norm(y, (12,), pool.norm.weight, pool.norm.bias, 1e-6))


def test_a_pack_equals_items_alone_with_gradients() -> None:
    pool, x = pool_and_tokens()
    torch.manual_seed(1)
    weight = torch.randn(5, 12, dtype=torch.float64)
    wanted = torch.stack([plain(pool, each) for each in x.unpack()])
    assert_close(pool(x), wanted, rtol=1e-12, atol=1e-14)
    ours = torch.autograd.grad((pool(x) * weight).sum(), list(pool.parameters()))
    theirs = torch.autograd.grad((wanted * weight).sum(), list(pool.parameters()))
    assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_another_item_changes_no_bit() -> None:
    pool, x = pool_and_tokens(torch.float32)
    changed = x.tokens.clone()
    changed[1:8] = torch.nan
    assert torch.equal(pool(x)[[0, 2, 3, 4]], pool(x.with_tokens(changed))[[0, 2, 3, 4]])
    assert pool(x.with_tokens(changed))[1].isnan().all()


def test_large_scores_stay_finite() -> None:
    scores = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    values = torch.tensor([[[3.0]], [[5.0]], [[7.0]]])
    means = weighted_means(scores, values, Layout((2, 1)))
    means.sum().backward()
    assert means.flatten().tolist() == [3.0, 7.0]
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_half_precision_is_summed_in_fp32() -> None:
    """4096 equal tokens: a bf16 sum of weights would stop at 256."""
    values = torch.ones(4096, 1, 1, dtype=torch.bfloat16)
    means = weighted_means(torch.zeros(4096, 1, dtype=torch.bfloat16), values, Layout((4096,)))
    assert means.dtype == torch.bfloat16
    assert means.item() == 1.0


def test_no_items_give_no_vectors_and_gradients_of_zero() -> None:
    pool, _ = pool_and_tokens()
    out = pool(Packed(torch.zeros(0, 12, dtype=torch.float64), Layout(())))
    assert out.shape == (0, 12)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in pool.parameters())


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="dim=10 is not a multiple of num_heads=4"):
        AttentionPool(10, 4)
