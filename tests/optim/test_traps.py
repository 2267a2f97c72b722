"""Mistakes that other implementations of Muon have made, each with a test that fails where it is made here.

    T1   momentum state normalised in place          T11  accumulation, clipping, overflow, dtypes on resume
    T2   p.grad written to by the Nesterov step      T12  state changed through a view that was thought a copy
    T3   convolutions scaled by their kernel size    T13  an eps that leaves small gradients as they are
    T4   routing by shape alone                      T14  fp16 products on the CPU
    T5   a table that reverses directions            T15  tables without a margin for rounding, in bf16
    T6   weight decay scaled with the update         T16  the Gram form in bf16 without restarts
                                                     T17  a norm rounded to bf16

T7 to T10 are about ranks: see test_zero1.py, test_dtensor.py and test_state_ranks.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from vlkit.errors import ConfigError
from vlkit.optim import Muon, muon_param_groups, orthogonalize
from vlkit.optim.units import units_of


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*shape, generator=generator).mul(0.1).to(dtype))


def gradient(parameter: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).to(parameter.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_t01_momentum_is_not_normalised(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Without Nesterov the direction is the buffer; with products in its dtype a cast is no copy."""
    parameter = matrix(*shape, dtype=dtype)
    optimizer = Muon([parameter], 0.1, nesterov=False, ns_dtype=dtype, momentum_dtype=dtype)
    parameter.grad = gradient(parameter) * 64
    optimizer.step()
    buffer = optimizer.state[parameter]["momentum_buffer"]
    assert_close(buffer.float(), parameter.grad.float() * 0.05, rtol=1e-2, atol=0)
    assert buffer.float().norm() > 10


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"maximize": True}, {"max_grad_norm": 0.1}])
def test_t02_gradients_are_not_written_to(options: dict[str, Any]) -> None:
    parameter, vector = matrix(8, 8), matrix(5)
    for p in (parameter, vector):
        p.grad = gradient(p)
    before = [p.grad.clone() for p in (parameter, vector)]
    optimizer = Muon([{"params": [parameter]}, {"params": [vector], "algorithm": "adamw"}], 0.1, **options)
    optimizer.step()
    assert torch.equal(parameter.grad, before[0])
    assert torch.equal(vector.grad, before[1])


@pytest.mark.parametrize("shape", [(24, 2, 2, 2), (24, 8, 1), (24, 2, 4), (6, 3, 2, 2, 2)])
def test_t03_convolutions_are_scaled_as_their_matrix(shape: tuple[int, ...]) -> None:
    """512x144 has the factor 1.89, not the 1 of a square kernel."""
    kernel = matrix(*shape)
    kernel.muon_flatten = True
    rows, cols = shape[0], math.prod(shape[1:])
    kernel.grad = gradient(kernel)
    before = kernel.detach().clone()
    Muon([kernel], 1.0, weight_decay=0.0, adjust_lr="original", ns="deepseek_v4", ns_dtype=torch.float32).step()
    singular = torch.linalg.svdvals((before - kernel.detach()).flatten(1))
    assert_close(singular, torch.full_like(singular, max(1.0, rows / cols) ** 0.5), rtol=1e-2, atol=0)


def test_t04_routing_knows_what_a_parameter_is_for() -> None:
    """Shapes that a rule on aspect ratios gets wrong, in the sizes of real models."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.empty(64, 1408, 2048))

    with torch.device("meta"):
        model = nn.Module()
        model.experts = Experts()
        model.pos_embed = nn.Parameter(torch.empty(729, 1152))
        model.head = nn.Linear(768, 1000)
        model.embedding = nn.Embedding(1000, 64)
        model.narrow = nn.Linear(8, 4096, bias=False)
    groups = muon_param_groups(model)
    assert groups.report.names("muon") == ["experts.up", "narrow.weight"]
    units = units_of(model.experts.up)
    assert [(some.count, some.rows, some.cols) for some in units] == [(64, 1408, 2048)]


@pytest.mark.parametrize("algorithm_dtype", [torch.float32, torch.bfloat16])
def test_t05_a_table_that_reverses_directions_is_refused(algorithm_dtype: torch.dtype) -> None:
    """Published for row-scaled inputs; its first quintic is negative at 1, so a rank-1 gradient would be ascended."""
    table = [
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ]
    with pytest.raises(ConfigError):
        Muon([matrix(4, 4)], 0.1, ns=table, ns_dtype=algorithm_dtype)


@pytest.mark.parametrize("ns", ["keller", "quintic", "polar_express", "ps5", "ps4", "deepseek_v4"])
def test_t05_a_step_goes_down_a_dominant_direction(ns: str) -> None:
    parameter = nn.Parameter(torch.zeros(16, 24))
    generator = torch.Generator().manual_seed(0)
    parameter.grad = torch.outer(torch.randn(16, generator=generator), torch.randn(24, generator=generator))
    Muon([parameter], 0.1, ns=ns, weight_decay=0.0, ns_dtype=torch.float32).step()
    assert torch.cosine_similarity(parameter.flatten(), -parameter.grad.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original", "spectral_unclamped", "none"])
def test_t06_weight_decay_is_not_scaled_by_the_shape(adjust_lr: str) -> None:
    """Without a gradient worth anything, 64x256 shrinks by lr * decay exactly."""
    parameter = matrix(64, 256)
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    Muon([parameter], 0.1, weight_decay=0.1, adjust_lr=adjust_lr).step()
    assert_close(parameter.detach(), before * 0.99, rtol=1e-6, atol=0)


def test_t11_accumulated_gradients_are_orthogonalised_once() -> None:
    """Four micro-batches of a quarter, summed, are one batch: the step sees their sum."""
    one, four = matrix(6, 9), matrix(6, 9)
    parts = [gradient(one, seed) for seed in range(4)]
    one.grad = sum(parts)
    for part in parts:
        four.grad = part.clone() if four.grad is None else four.grad + part
    first, second = Muon([one], 0.1), Muon([four], 0.1)
    first.step()
    second.step()
    assert torch.equal(one, four)
    mean_of_each = sum(orthogonalize(part) for part in parts) / 4
    assert torch.cosine_similarity(mean_of_each.flatten(), orthogonalize(one.grad).flatten(), dim=0) < 0.99


def test_t11_clipping_scales_gradients_not_updates() -> None:
    """Where nothing has been accumulated yet, a clipped gradient gives the same update: its direction is what counts."""
    plain, clipped = matrix(6, 9), matrix(6, 9)
    for parameter, limit in ((plain, None), (clipped, 1e-3)):
        parameter.grad = gradient(parameter)
        optimizer = Muon([parameter], 0.1, max_grad_norm=limit, ns_dtype=torch.float32)
        optimizer.step()
    assert_close(clipped, plain, rtol=0, atol=1e-6)
    assert optimizer.state[clipped]["momentum_buffer"].norm() == pytest.approx(0.05e-3, rel=1e-3)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_t11_an_overflow_reaches_no_state(bad: float) -> None:
    """Of either algorithm, wherever in the model it happens; and the counter of AdamW does not move."""
    parameter, vector = matrix(6, 9), matrix(5)
    optimizer = Muon([{"params": [parameter]}, {"params": [vector], "algorithm": "adamw"}], 0.1)
    for spoiled in (parameter, vector):
        for p in (parameter, vector):
            p.grad = gradient(p)
        spoiled.grad.view(-1)[-1] = bad
        optimizer.step()
        assert optimizer.last_step_skipped
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())
    assert torch.equal(parameter, matrix(6, 9))


def test_t11_state_keeps_its_dtype_on_resume() -> None:
    parameter = matrix(6, 9, dtype=torch.bfloat16)
    optimizer = Muon([parameter], 0.1)
    parameter.grad = gradient(parameter)
    optimizer.step()
    resumed = Muon([matrix(6, 9, dtype=torch.bfloat16)], 0.1)
    resumed.load_state_dict(optimizer.state_dict())
    (state,) = resumed.state.values()
    assert state["momentum_buffer"].dtype == torch.float32
    assert torch.equal(state["momentum_buffer"], optimizer.state[parameter]["momentum_buffer"])


def test_t12_loaded_state_is_a_copy() -> None:
    """Two optimizers that share a saved state do not share its memory."""
    parameter, other = matrix(6, 9), matrix(6, 9)
    optimizer, resumed = Muon([parameter], 0.1), Muon([other], 0.1)
    parameter.grad = gradient(parameter)
    optimizer.step()
    saved = optimizer.state_dict()
    resumed.load_state_dict(saved)
    before = optimizer.state[parameter]["momentum_buffer"].clone()
    other.grad = gradient(other, 5)
    resumed.step()
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], before)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-9, 1.0, 1e18])
def test_t13_small_gradients_count_as_much_as_large_ones(scale: float) -> None:
    """An eps of 1e-7 leaves a gradient of norm 1e-9 almost out."""
    parameter = nn.Parameter(torch.zeros(8, 12))
    parameter.grad = gradient(parameter) * scale
    Muon([parameter], 1.0, weight_decay=0.0, ns_dtype=torch.float32).step()
    assert parameter.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1)


def test_t14_fp16_products_are_refused() -> None:
    with pytest.raises(ConfigError, match="float16"):
        Muon([matrix(4, 4)], 0.1, ns_dtype=torch.float16)


@pytest.mark.parametrize("ns", ["polar_express_raw", "cans"])
def test_t15_tables_without_a_margin_are_refused_in_bf16(ns: str) -> None:
    with pytest.raises(ConfigError, match=r"fp32|float32"):
        Muon([matrix(4, 4)], 0.1, ns=ns, ns_dtype=torch.bfloat16)
    Muon([matrix(4, 4)], 0.1, ns=ns, ns_dtype=torch.float32)


@pytest.mark.parametrize("ns", ["keller", "polar_express", "quintic"])
def test_t16_long_matrices_stay_bounded_in_bf16(ns: str) -> None:
    """The Gram form drifts in bf16 unless it is brought up to date; without, singular values reach 1e2 and more."""
    for seed, spread in ((0, 0.0), (1, 2.0)):
        x = torch.randn(300, 900, generator=torch.Generator().manual_seed(seed))
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        x = u * torch.logspace(0, -spread, 300) @ v
        result = orthogonalize(x, ns=ns, dtype=torch.bfloat16, form="gram")
        assert torch.linalg.matrix_norm(result, 2) < 1.45


def test_t17_the_norm_is_not_rounded_to_the_format_of_the_products() -> None:
    """A matrix of ones divided by its norm, rounded once; a norm rounded to 8 bits first gives other numbers."""
    differing = 0
    for cols in range(7, 200):
        x = torch.ones(7, cols, dtype=torch.bfloat16)
        divided = orthogonalize(x, ns=[(1.0, 0.0, 0.0)], dtype=torch.bfloat16)
        norm = torch.tensor(x.numel() ** 0.5, dtype=torch.float64)
        assert torch.equal(divided, (1 / norm).bfloat16().expand_as(divided))
        differing += (1 / norm).bfloat16() != (1 / norm.bfloat16().double()).bfloat16()
    assert differing > 5


@pytest.mark.parametrize("n", [8, 17, 40, 260])
def test_cubic_tables_can_be_used_in_bf16(n: int) -> None:
    """torch.baddbmm(x, y, z, beta=b, alpha=0) gives x there, not b x, from 17 columns on; a fifth power of 0 must not see it."""
    x = torch.randn(n, n + 3, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(x, ns=[(1.5, -0.5, 0.0)] * 8, dtype=torch.bfloat16)
    expected = orthogonalize(x, ns=[(1.5, -0.5, 0.0)] * 8, dtype=torch.float32)
    assert (found - expected).norm() < 2e-2 * expected.norm()
