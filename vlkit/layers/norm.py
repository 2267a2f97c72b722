"""Normalisation over the last axis."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, with the epsilon said at every use: published towers differ in it (1e-5, 1e-6)."""

    def __init__(self, dim: int, *, eps: float, bias: bool = True) -> None:
        super().__init__(dim, eps=eps, bias=bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in fp32, cast back to the dtype of x, then times the weight.

    The order matters in bf16: casting before the weight is what LLaMA-style checkpoints were trained with.

    Source: Zhang and Sennrich, arXiv:1910.07467.
    Matches: transformers' LlamaRMSNorm, bit for bit in bf16.
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        wide = x if x.dtype == torch.float64 else x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
