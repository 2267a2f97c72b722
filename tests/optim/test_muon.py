"""Against torch's own Muon and AdamW, against the equations in fp64, and what must hold of any optimizer."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, OneCycleLR
from torch.testing import assert_close

from vlkit.errors import ConfigError, OptimizerStateError
from vlkit.optim import Muon, orthogonalize
from vlkit.optim.units import units_of

FP32 = {"ns_dtype": torch.float32}
SHAPES = [(7, 5), (5, 9), (6, 6), (5, 40)]


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).mul(0.1).to(dtype)) for shape in shapes]


def set_gradients(params: Sequence[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int = 10, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_gradients(params, step)
        optimizer.step()


def values(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# The update rule


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_keller_matches_torch_muon(adjust_lr: str, nesterov: bool, weight_decay: float) -> None:
    """Ten steps; both round their products to bf16. Largest seen: 2.3e-2 of the accumulated update."""
    shapes = [(96, 96), (256, 96), (64, 200), (300, 260)]
    ours, theirs, start = parameters(shapes), parameters(shapes), parameters(shapes)
    options = {"nesterov": nesterov, "weight_decay": weight_decay}
    train(Muon(ours, 1e-2, ns="keller", ns_dtype=torch.bfloat16, adjust_lr=adjust_lr, **options), ours)
    train(torch.optim.Muon(theirs, 1e-2, adjust_lr_fn=adjust_lr, **options), theirs)
    for a, b, zero in zip(ours, theirs, start, strict=True):
        assert relative(a - zero, b - zero) < 3e-2


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original", "spectral_unclamped", "none"])
def test_update_is_the_equation(nesterov: bool, adjust_lr: str) -> None:
    """The rule written out in fp64, with this library's orthogonalisation in fp64."""
    factors: dict[str, Callable[[int, int], float]] = {
        "match_rms_adamw": lambda rows, cols: 0.3 * max(rows, cols) ** 0.5,
        "original": lambda rows, cols: max(1.0, rows / cols) ** 0.5,
        "spectral_unclamped": lambda rows, cols: (rows / cols) ** 0.5,
        "none": lambda rows, cols: 1.0,
    }
    params = parameters()
    expected = [param.detach().double() for param in params]
    momenta = [torch.zeros_like(weight) for weight in expected]
    optimizer = Muon(params, 0.02, momentum=0.9, nesterov=nesterov, adjust_lr=adjust_lr, rms_scale=0.3, **FP32)
    for step in range(5):
        train(optimizer, params, 1, first=step)
        for i, param in enumerate(params):
            gradient = param.grad.double()
            momenta[i] = 0.9 * momenta[i] + 0.1 * gradient
            direction = 0.1 * gradient + 0.9 * momenta[i] if nesterov else momenta[i]
            update = orthogonalize(direction, dtype=torch.float64) * factors[adjust_lr](*param.shape)
            expected[i] = expected[i] * (1 - 0.02 * 0.1) - 0.02 * update
    for param, weight in zip(params, expected, strict=True):
        assert_close(param.double(), weight, rtol=0, atol=2e-6)


def test_weights_and_state_may_move_between_steps() -> None:
    for algorithm, shape in (("muon", (6, 6)), ("adamw", (7,)), ("adamw", (6, 6))):
        start, grad = torch.randn(shape), torch.randn(shape)
        stay, move = (torch.nn.Parameter(start.clone()) for _ in range(2))
        optimizers = [Muon([{"params": [p], "algorithm": algorithm}], 0.01) for p in (stay, move)]
        for step in range(4):
            stay.grad, move.grad = grad.clone(), grad.clone()
            for optimizer in optimizers:
                optimizer.step()
            assert torch.equal(stay, move), (algorithm, step)
            state = optimizers[1].state[move]
            if step == 0:
                move.data = move.data.clone()
            elif step == 1:
                state.update({key: value.clone() for key, value in state.items()})
            elif move.ndim == 2:
                move.data = move.data.mT.clone().mT  # the same storage never again, and columns first
        assert all(torch.equal(value, optimizers[0].state[stay][key]) for key, value in state.items())


def test_update_has_the_size_of_an_adamw_update() -> None:
    """match_rms_adamw: elements of about rms_scale, whatever the shape."""
    params = parameters([(30, 20), (20, 90), (4, 8, 16)])
    before = values(params)
    train(Muon(params, 1.0, weight_decay=0.0), params, 1)
    for param, start in zip(params, before, strict=True):
        assert (param - start).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_groups_match_torch_adamw(maximize: bool) -> None:
    shapes = [(7,), (5, 3), (2, 3, 4), ()]
    ours, theirs = parameters(shapes), parameters(shapes)
    group = {"params": ours, "algorithm": "adamw"}
    train(Muon([group], 1e-2, betas=(0.8, 0.9), adam_eps=1e-6, weight_decay=0.2, maximize=maximize), ours)
    train(
        torch.optim.AdamW(theirs, 1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, maximize=maximize, foreach=False),
        theirs,
    )
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_maximize_is_descent_on_the_negative() -> None:
    up, down = parameters(), parameters()
    train(Muon(up, 0.1, maximize=True, **FP32), up, 1)
    set_gradients(down, 0)
    for param in down:
        param.grad.neg_()
    Muon(down, 0.1, **FP32).step()
    assert_close(up, down, rtol=0, atol=0)


# Dtypes and state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_is_the_running_mean_of_gradients(dtype: torch.dtype) -> None:
    """Without Nesterov the direction is the buffer itself, which the orthogonalisation must not write to."""
    params = parameters([(32, 32), (5, 9)], dtype)
    optimizer = Muon(params, 0.1, momentum=0.9, nesterov=False, ns_dtype=dtype)
    train(optimizer, params, 3)
    expected = [torch.zeros(param.shape, dtype=torch.float64) for param in params]
    for step in range(3):
        set_gradients(params, step)
        expected = [0.9 * mean + 0.1 * param.grad.double() for mean, param in zip(expected, params, strict=True)]
    for param, mean in zip(params, expected, strict=True):
        buffer = optimizer.state[param]["momentum_buffer"]
        assert buffer.dtype == torch.float32
        assert_close(buffer.double(), mean, rtol=1e-6, atol=1e-6)


def test_bf16_weights_are_rounded_once() -> None:
    """Computed in fp32 from the rounded weight, so decay and update are not lost one after the other."""
    params = parameters([(8, 8)], torch.bfloat16)
    start = params[0].detach().float()
    train(Muon(params, 0.01, weight_decay=0.5, **FP32), params, 1)
    update = orthogonalize(params[0].grad.float(), dtype=torch.float32) * 0.2 * 8**0.5
    expected = (start * (1 - 0.01 * 0.5) - 0.01 * update).bfloat16()
    assert (params[0] != expected).sum() <= 1  # fp32 may round a tie the other way


def test_adamw_state_of_bf16_parameters_is_fp32() -> None:
    params = parameters([(9,)], torch.bfloat16)
    optimizer = Muon([{"params": params, "algorithm": "adamw"}], 1e-2)
    train(optimizer, params, 3)
    assert optimizer.state[params[0]]["exp_avg_sq"].dtype == torch.float32
    assert params[0].dtype == torch.bfloat16


def test_momentum_can_be_kept_in_bf16() -> None:
    params, reference = parameters(), parameters()
    optimizer = Muon(params, 0.01, momentum_dtype=torch.bfloat16, **FP32)
    train(optimizer, params, 3)
    train(Muon(reference, 0.01, **FP32), reference, 3)
    assert optimizer.state[params[0]]["momentum_buffer"].dtype == torch.bfloat16
    for a, b in zip(params, reference, strict=True):
        assert 0 < (a - b).abs().max() < 2e-3


def test_fp64_parameters_are_handled_in_fp64() -> None:
    params = parameters(dtype=torch.float64)
    optimizer = Muon(params, 0.01, ns_dtype=torch.float64, weight_decay=0.0)
    start = values(params)
    train(optimizer, params, 1)
    for param, before in zip(params, start, strict=True):
        update = orthogonalize(param.grad, dtype=torch.float64) * 0.2 * max(param.shape) ** 0.5
        assert_close(param.detach(), before - 0.01 * update, rtol=0, atol=1e-14)


def test_gradients_are_not_written_to() -> None:
    params = [*parameters(), *parameters([(5,)])]
    groups = [{"params": params[:-1]}, {"params": params[-1:], "algorithm": "adamw"}]
    optimizer = Muon(groups, 0.1, max_grad_norm=0.01, maximize=True)
    set_gradients(params, 0)
    before = [param.grad.clone() for param in params]
    optimizer.step()
    assert_close([param.grad for param in params], before, rtol=0, atol=0)


# Units


def test_an_expert_stack_is_its_experts() -> None:
    (stack,) = parameters([(5, 9, 7)])
    experts = [nn.Parameter(expert.clone()) for expert in stack.detach()]
    for step in range(3):
        set_gradients([stack], step)
        for expert, grad in zip(experts, stack.grad, strict=True):
            expert.grad = grad.clone()
        if step == 0:
            first, second = Muon([stack], 0.1), Muon(experts, 0.1)
        first.step()
        second.step()
    assert_close(stack.detach(), torch.stack([expert.detach() for expert in experts]), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(23, 10), (3, 23, 10)])
def test_a_fused_weight_is_its_row_blocks(shape: tuple[int, ...]) -> None:
    """Query, key and value of 15, 4 and 4 rows; also inside a stack."""
    (fused,) = parameters([shape])
    fused.muon_splits = (15, 4, 4)
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split((15, 4, 4), dim=-2)]
    set_gradients([fused], 0)
    for part, grad in zip(parts, fused.grad.split((15, 4, 4), dim=-2), strict=True):
        part.grad = grad.clone()
    Muon([fused], 0.1).step()
    Muon(parts, 0.1).step()
    assert_close(fused.detach(), torch.cat([part.detach() for part in parts], dim=-2), rtol=0, atol=0)


def test_a_convolution_is_its_flattened_matrix() -> None:
    """Also in the channels-last layout; the factor is that of 12 x 45, not that of the 3 x 3 kernel."""
    (kernel,) = parameters([(12, 5, 3, 3)])
    channels_last = nn.Parameter(kernel.detach().clone().to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().clone().flatten(1))
    params = [kernel, channels_last, matrix]
    set_gradients([kernel], 0)
    channels_last.grad, matrix.grad = kernel.grad.clone(memory_format=torch.channels_last), kernel.grad.flatten(1)
    Muon(params, 0.1, adjust_lr="original").step()
    assert torch.equal(kernel.flatten(1), matrix)
    assert torch.equal(channels_last, kernel)


def test_large_units_equal_small_ones() -> None:
    """One large matrix in a stack, beside one by itself: they take the path that goes matrix by matrix."""
    stack, single = parameters([(2, 260, 300), (260, 300)])
    set_gradients([stack], 0)
    single.data, single.grad = stack.detach()[1].clone(), stack.grad[1].clone()
    Muon([stack], 0.1).step()
    Muon([single], 0.1).step()
    assert torch.equal(stack[1], single)


def test_units_say_where_they_are() -> None:
    weight = torch.zeros(2, 5, 3)
    weight.muon_splits = (4, 1)
    first, second = units_of(weight)
    assert (first.count, first.rows, second.rows, second.offset) == (2, 4, 1, 12)
    second.view(weight).fill_(1)
    assert weight[:, 4].eq(1).all()
    assert weight.sum() == 6


def test_splits_that_miss_rows_are_refused() -> None:
    (weight,) = parameters([(10, 4)])
    weight.muon_splits = (5, 4)
    with pytest.raises(ConfigError, match=r"9 rows, the weight has 10"):
        Muon([weight], 0.1)


def test_one_dimensional_convolutions_can_be_flattened() -> None:
    (kernel,) = parameters([(6, 5, 3)])
    matrix = nn.Parameter(kernel.detach().clone().flatten(1))
    kernel.muon_flatten = True
    set_gradients([kernel], 0)
    matrix.grad = kernel.grad.flatten(1)
    Muon([kernel, matrix], 0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


# Non-finite gradients and clipping


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, -1])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, where: int) -> None:
    params = [*parameters(), *parameters([(5,)])]
    optimizer = Muon([{"params": params[:-1]}, {"params": params[-1:], "algorithm": "adamw"}], 0.1, max_grad_norm=1.0)
    train(optimizer, params, 2)
    before, state = values(params), copy.deepcopy(optimizer.state_dict()["state"])

    set_gradients(params, 2)
    params[where].grad.view(-1)[0] = bad
    optimizer.step()

    assert optimizer.last_step_skipped
    assert optimizer.skipped_steps == 1
    assert_close(values(params), before, rtol=0, atol=0)
    assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    train(optimizer, params, 1, first=3)
    assert not optimizer.last_step_skipped
    assert all(param.isfinite().all() for param in params)
    assert not torch.equal(params[0], before[0])


def test_huge_but_finite_gradients_are_used() -> None:
    """Their squares exceed fp32; they are no reason to skip."""
    params, reference = parameters(), parameters()
    set_gradients(params, 0)
    set_gradients(reference, 0)
    for param in params:
        param.grad.mul_(2.0**70)
    optimizer = Muon(params, 0.1)
    optimizer.step()
    Muon(reference, 0.1).step()
    assert optimizer.skipped_steps == 0
    assert_close(params, reference, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("size", "options", "skipped"),
    [
        (1e25, {"algorithm": "adamw"}, True),  # its square exceeds fp32
        (1e18, {"algorithm": "adamw"}, False),
        (1e37, {}, False),
        (3e38, {}, True),  # so may the distance between two of them
        (1e5, {"momentum_dtype": torch.float16}, True),
    ],
)
def test_no_step_makes_a_state_that_is_not_finite(size: float, options: dict[str, Any], skipped: bool) -> None:
    params = parameters()
    optimizer = Muon([{"params": params[:1], **options}, {"params": params[1:]}], 0.1)
    for sign in (1, -1):
        set_gradients(params, 0)
        params[0].grad = torch.full_like(params[0], sign * size)
        before = [param.detach().clone() for param in params]
        optimizer.step()
        assert optimizer.last_step_skipped == skipped
        assert [torch.equal(*pair) for pair in zip(params, before, strict=True)] == [skipped] * len(params)
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())
    if skipped:
        assert not any(value.any() for state in optimizer.state.values() for value in state.values())


def test_clipping_comes_before_a_gradient_is_too_large() -> None:
    params = parameters()
    optimizer = Muon([{"params": params[:1], "algorithm": "adamw"}, {"params": params[1:]}], 0.1, max_grad_norm=1.0)
    set_gradients(params, 0)
    params[0].grad = torch.full_like(params[0], 1e25)
    optimizer.step()
    assert not optimizer.last_step_skipped


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clipping_is_that_of_torch(limit: float) -> None:
    """AdamW's state sees the clipped gradient; one norm over both groups."""
    ours, theirs = parameters([(4, 3), (6,)]), parameters([(4, 3), (6,)])
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    optimizer = Muon([{"params": ours[:1]}, {"params": ours[1:], "algorithm": "adamw"}], 0.1, max_grad_norm=limit)
    optimizer.step()
    norm = nn.utils.clip_grad_norm_(theirs, limit)
    assert_close(optimizer.last_grad_norm, norm, rtol=1e-6, atol=0)
    assert_close(optimizer.state[ours[0]]["momentum_buffer"], 0.05 * theirs[0].grad, rtol=1e-5, atol=1e-9)
    assert_close(optimizer.state[ours[1]]["exp_avg"], 0.1 * theirs[1].grad, rtol=1e-5, atol=1e-9)


def test_grad_scaler_unscales_and_skips() -> None:
    params, reference = parameters(), parameters()
    optimizer = Muon(params, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step, overflow in enumerate((False, True, False)):
        set_gradients(params, step)
        for param in params:
            param.grad.mul_(scaler.get_scale())
        if overflow:
            params[0].grad[0, 0] = float("inf")
        scaler.scale(torch.zeros(()))  # the scale is made at first use
        scaler.step(optimizer)
        scaler.update()
    plain = Muon(reference, 0.1)
    train(plain, reference, 1)
    train(plain, reference, 1, first=2)
    assert_close(params, reference, rtol=0, atol=0)


# Being a torch optimizer


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: LambdaLR(optimizer, lambda step: 0.5**step),
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=4),
        lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=6),
    ],
)
def test_schedulers_move_both_algorithms(schedule: Callable[[Any], Any]) -> None:
    params = [*parameters(), *parameters([(5,)])]
    optimizer = Muon([{"params": params[:-1]}, {"params": params[-1:], "algorithm": "adamw"}], 0.1)
    scheduler = schedule(optimizer)
    rates = []
    for step in range(3):
        train(optimizer, params, 1, first=step)
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert len({tuple(pair) for pair in rates}) == 3
    assert all(muon == adamw for muon, adamw in rates)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=6, base_momentum=0.5, max_momentum=0.9),
        lambda optimizer: CyclicLR(optimizer, 0.01, 0.1, step_size_up=2, base_momentum=0.5, max_momentum=0.9),
    ],
)
def test_momentum_is_cycled_in_both_algorithms(schedule: Callable[[Any], Any]) -> None:
    """Such schedulers write it to betas, which Muon's matrices have no other use for."""
    params = [*parameters(), *parameters([(5,)])]
    optimizer = Muon([{"params": params[:-1]}, {"params": params[-1:], "algorithm": "adamw"}], 0.1)
    scheduler = schedule(optimizer)
    found = []
    for step in range(4):
        train(optimizer, params, 1, first=step)
        muon, adamw = optimizer.param_groups
        found.append(muon["momentum"])
        assert muon["momentum"] == adamw["betas"][0]
        scheduler.step()
        assert optimizer.state_dict()["param_groups"][0]["momentum"] == adamw["betas"][0]
    assert found[0] == 0.9
    assert min(found) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("lr", math.nan, "lr must not be negative"),
        ("lr", -1.0, "lr must not be negative"),
        ("lr", "fast", "lr is a number, found 'fast'"),
        ("algorithm", "adamw", "algorithm was 'muon' when its state was made and is 'adamw' now"),
        ("variant", "normuon", "variant was 'none'"),
        ("momentum_dtype", torch.bfloat16, "momentum_dtype was torch.float32"),
    ],
)
def test_options_changed_later_are_looked_at_before_anything_changes(option: str, value: Any, words: str) -> None:
    params = parameters()
    optimizer = Muon(params, 0.1)
    train(optimizer, params, 1)
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0][option] = value
    set_gradients(params, 1)
    for _ in range(2):
        with pytest.raises(ConfigError, match=words):
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))


def test_learning_rate_can_be_a_tensor() -> None:
    shapes = [*SHAPES, (5,)]
    by_float, by_tensor = parameters(shapes), parameters(shapes)
    for params, lr in ((by_float, 0.125), (by_tensor, torch.tensor(0.125))):
        train(Muon([{"params": params[:-1]}, {"params": params[-1:], "algorithm": "adamw"}], lr), params, 3)
    assert_close(by_float, by_tensor, rtol=1e-6, atol=1e-7)


def test_closure_runs_with_gradients_and_returns_the_loss() -> None:
    (param,) = parameters([(3, 4)])
    optimizer = Muon([param], 0.05, weight_decay=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(5):
        last = optimizer.step(closure)
    assert last < first


def test_parameters_without_gradient_are_left_alone() -> None:
    params = parameters([(4, 4), (4, 4), (0, 4)])
    before = values(params)
    optimizer = Muon(params, 0.1)
    optimizer.step()
    set_gradients(params[:1], 0)
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])


def test_a_group_can_be_added_later() -> None:
    first, second, vector = *parameters([(4, 5), (6, 3)]), *parameters([(3,)])
    optimizer = Muon([first], 0.1)
    optimizer.add_param_group({"params": [second], "lr": 0.5, "ns": "keller", "adjust_lr": "none"})
    with pytest.raises(ConfigError, match="algorithm='adamw'"):
        optimizer.add_param_group({"params": [vector]})
    assert len(optimizer.param_groups) == 2
    before = second.detach().clone()
    train(optimizer, [first, second], 1)
    step = torch.linalg.matrix_norm(second - before, 2).item()
    assert 0.3 < step < 0.7  # lr times a singular value near 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr must not be negative"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"betas": (0.9, 1.5)}, r"betas must lie in \[0, 1\)"),
        ({"adjust_lr": None}, "spectral_unclamped"),
        ({"ns": "newton"}, "polar_express"),
        ({"momentum_dtype": torch.int32}, "floating-point"),
        ({"max_grad_norm": 0.0}, "above 0"),
        ({"ns_form": "gram", "ns_dtype": torch.bfloat16}, "7x5"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Muon(parameters(), **{"lr": 0.1, **options})


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        (torch.zeros(4, 3).to(torch.float8_e4m3fn), "float8_e4m3fn; .* 2 to 8 bytes"),
        (torch.zeros(1, 3).expand(4, 3), "is expanded"),
    ],
)
def test_parameters_that_no_step_can_update_are_refused(parameter: Tensor, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Muon([nn.Parameter(parameter, requires_grad=False)], 0.1)


def test_a_group_without_names_does_not_join_those_with_names() -> None:
    first, second = parameters([(4, 5), (6, 3)])
    named = Muon([("first", first)], 0.1)
    with pytest.raises(ConfigError, match=r"list of \(name, parameter\)"):
        named.add_param_group({"params": second})
    named.add_param_group({"params": [("second", second)]})
    assert named.param_groups[1]["param_names"] == ["second"]


def test_an_optimizer_of_a_process_group_says_how_to_copy_it(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = Muon(parameters(), 0.1)
    copy.deepcopy(optimizer).step()
    monkeypatch.setattr(optimizer, "process_group", object())
    with pytest.raises(ConfigError, match="load_full_state_dict"):
        copy.deepcopy(optimizer)


def test_a_process_group_of_other_ranks_is_refused() -> None:
    """torch.distributed.new_group gives such a value to ranks that are no members."""
    with pytest.raises(ConfigError, match="that this rank is a member of, found -100"):
        Muon(parameters(), 0.1, process_group=-100)  # type: ignore[arg-type]


def test_a_misspelt_group_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="weight_dacay"):
        Muon([{"params": parameters(), "weight_dacay": 0.0}], 0.1)


def test_complex_parameters_and_sparse_gradients_are_refused() -> None:
    with pytest.raises(ConfigError, match="complex64"):
        Muon([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))], 0.1)
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse=False"):
        Muon([{"params": [embedding.weight], "algorithm": "adamw"}], 0.1).step()


# Checkpoints


def build(dtype: torch.dtype = torch.float32) -> tuple[Muon, list[nn.Parameter]]:
    params = [*parameters(dtype=dtype), *parameters([(5,)], dtype)]
    names = [f"p{i}" for i in range(len(params))]
    groups = [
        {"params": params[:-1], "param_names": names[:-1], "ns": [(3.4445, -4.7750, 2.0315)]},
        {"params": params[-1:], "param_names": names[-1:], "algorithm": "adamw"},
    ]
    return Muon(groups, 0.1), params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_resumes_bit_for_bit_from_a_file(dtype: torch.dtype) -> None:
    """Through torch.save and a load without pickled code; fp32 state of bf16 parameters stays fp32."""
    whole, params = build(dtype)
    train(whole, params, 3)
    file = io.BytesIO()
    torch.save({"optimizer": whole.state_dict(), "weights": values(params)}, file)
    train(whole, params, 3, first=3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, again = build(dtype)
    for param, weight in zip(again, saved["weights"], strict=True):
        param.data.copy_(weight)
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, again, 3, first=3)

    assert_close(values(again), values(params), rtol=0, atol=0)
    assert resumed.state[again[0]]["momentum_buffer"].dtype == torch.float32


def test_state_exists_before_the_first_step() -> None:
    """So that a checkpoint has the same keys whenever it is written."""
    optimizer, params = build()
    assert set(optimizer.state_dict()["state"]) == set(range(len(params)))


def test_a_state_of_torch_muon_loads() -> None:
    """With its coefficients and its rule for the learning rate: both go on alike."""
    shapes = [(96, 96), (64, 80)]
    theirs, ours = parameters(shapes), parameters(shapes)
    old = torch.optim.Muon(theirs, 0.02, momentum=0.9, adjust_lr_fn=None)
    train(old, theirs, 3)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        ours_.data.copy_(theirs_.data)
    new = Muon(ours, 0.5, ns_dtype=torch.bfloat16)
    new.load_state_dict(old.state_dict())
    start = values(ours)
    assert new.param_groups[0]["adjust_lr"] == "original"
    train(old, theirs, 3, first=3)
    train(new, ours, 3, first=3)
    for a, b, zero in zip(ours, theirs, start, strict=True):
        assert relative(a - zero, b - zero) < 3e-2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda saved: saved["param_groups"].pop(), "1 groups, this optimizer has 2"),
        (lambda saved: saved["param_groups"][0]["params"].pop(), "3 parameters, this optimizer has 4"),
        (lambda saved: saved["param_groups"][0]["param_names"].reverse(), "'p3' where this optimizer has 'p0'"),
        (lambda saved: saved["param_groups"][0].update(algorithm="adamw"), "of 'adamw', this group runs 'muon'"),
        (lambda saved: saved["state"][0].update(momentum_buffer=torch.zeros(2, 2)), r"p0.*\(2, 2\).*\(7, 5\)"),
        (lambda saved: saved["state"][0].update(exp_avg=torch.zeros(7, 5)), "p0.*exp_avg.*momentum_buffer"),
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(spoil: Callable[[dict[str, Any]], Any], words: str) -> None:
    optimizer, params = build()
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved)
    train(optimizer, params, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(OptimizerStateError, match=words):
        optimizer.load_state_dict(saved)
    assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)


def test_optimizer_can_be_copied() -> None:
    """As when a run is forked: the copy goes on by itself."""
    optimizer, params = build()
    train(optimizer, params, 2)
    other, copies = copy.deepcopy((optimizer, params))
    train(optimizer, params, 2, first=2)
    train(other, copies, 2, first=2)
    assert_close(values(copies), values(params), rtol=0, atol=0)
