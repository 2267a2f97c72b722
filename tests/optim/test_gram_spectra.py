"""The Gram form in bf16 on matrices whose singular values fall off, as those of gradients do."""

from __future__ import annotations

import pytest
import torch

from vlkit.optim import orthogonalize


@pytest.mark.parametrize("fall", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("shape", [(96, 256), (37, 80)])
def test_gram_form_in_bf16_stays_bounded_on_falling_spectra(shape: tuple[int, int], fall: float) -> None:
    """Largest seen 1.16; with two steps of the iteration before x is brought up to date: 3,700."""
    rows, cols = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(cols, rows, dtype=torch.float64, generator=generator))[0]
    matrix = (left * torch.arange(1, rows + 1, dtype=torch.float64) ** -fall) @ right.T

    result = orthogonalize(matrix.float(), form="gram", dtype=torch.bfloat16)

    assert torch.linalg.matrix_norm(result.double(), 2) < 1.25
