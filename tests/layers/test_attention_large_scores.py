"""Attention whose scores are far apart, as a model in trouble has them: gradients stay finite and right."""

from __future__ import annotations

import pytest
import torch

from vlkit.layers.attention import attention
from vlkit.packing import Layout


@pytest.mark.parametrize("causal", [False, True])
def test_scores_far_apart_give_the_plain_gradients(causal: bool) -> None:
    """Items of unlike lengths share a padded kernel call; padding once gave NaN where its scores beat its logsumexp by 88."""
    layout = Layout((5, 9, 12, 7, 5, 15, 3, 14))
    generator = torch.Generator().manual_seed(0)
    inputs = [12 * torch.randn(layout.num_tokens, 4, 24, generator=generator) for _ in range(3)]
    grad = torch.randn(layout.num_tokens, 4, 24, generator=generator)

    grads = {}
    for backend in ("plain", "sdpa"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attention(*leaves, layout=layout, causal=causal, backend=backend)
        grads[backend] = torch.autograd.grad(out, leaves, grad)

    for name, expected, found in zip("qkv", grads["plain"], grads["sdpa"], strict=True):
        # fp32, scores of +-3000: largest seen 5e-4 of values up to 150
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
