"""Norms: the formula in fp64, and the order of rounding in half precision."""

from __future__ import annotations

import pytest
import torch

from vlkit.layers.norm import LayerNorm, RMSNorm


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(7, eps=0.5).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 2, 7, dtype=torch.float64)
    want = x / ((x**2).sum(-1, keepdim=True) / 7 + 0.5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), want)
    assert torch.autograd.gradcheck(norm, (x.requires_grad_(),))


def test_rms_norm_casts_before_the_weight() -> None:
    """As LLaMA-style checkpoints were trained; the other order gives other bits."""
    norm = RMSNorm(64, eps=1e-6).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = (1e3 * torch.randn(50, 64)).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), wide.bfloat16() * norm.weight)
    assert not torch.equal(norm(x), (wide * norm.weight).bfloat16())


def test_rms_norm_squares_in_fp32() -> None:
    """300 squared is beyond fp16."""
    norm = RMSNorm(4, eps=1e-6).half()
    torch.testing.assert_close(norm(torch.full((1, 4), 300.0).half()), torch.ones(1, 4).half())


def test_the_epsilon_counts() -> None:
    x = torch.full((1, 4), 1e-3, dtype=torch.float64)
    torch.testing.assert_close(RMSNorm(4, eps=3e-6).double()(x), torch.full_like(x, 0.5))
    y = torch.tensor([[1e-3, -1e-3]], dtype=torch.float64)
    torch.testing.assert_close(LayerNorm(2, eps=3e-6).double()(y), torch.tensor([[0.5, -0.5]], dtype=torch.float64))


def test_an_epsilon_must_be_given() -> None:
    for kind in (LayerNorm, RMSNorm):
        with pytest.raises(TypeError, match="eps"):
            kind(4)  # type: ignore[call-arg]


def test_reset_gives_ones() -> None:
    with torch.device("meta"):
        norm = RMSNorm(5, eps=1e-6)
    norm = norm.to_empty(device="cpu")
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(5))
