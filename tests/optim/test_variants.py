"""NorMuon, AdaMuon, cautious decay and orthogonalisations of one's own, against their equations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.optim import over_ranks
from tests.optim.test_dtensor import local, mesh_of, train_sharded
from tests.ranks import run_ranks
from vlkit.errors import ConfigError
from vlkit.optim import Muon, orthogonalize
from vlkit.optim.units import spans_of, units_of
from vlkit.optim.variants import (
    adamuon_divide_,
    adamuon_factors,
    adapt_,
    normuon_factors,
    num_rows,
    row_ids,
    row_places,
    row_sums,
)

SHAPES = [(2, 7, 5), (1, 4, 9), (3, 1, 6)]


def randoms(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# The functions


@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_is_its_equation(shape: tuple[int, int, int]) -> None:
    """Three steps in fp64, matrix by matrix and row by row."""
    state = torch.zeros(shape[:2], dtype=torch.float64)
    expected_state = torch.zeros(shape[:2], dtype=torch.float64)
    for step in range(3):
        update = randoms(shape, step, torch.float64)
        expected = update.clone()
        for matrix, means in zip(expected, expected_state, strict=True):
            norm = matrix.norm()
            for r, row in enumerate(matrix):
                means[r] = 0.9 * means[r] + 0.1 * row.square().mean()
                row /= means[r].sqrt() + 1e-10
            matrix *= norm / matrix.norm()
        adapt_(update, state, "normuon", 0.9)
        assert_close(update, expected, rtol=1e-12, atol=0)
        assert_close(state, expected_state, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_adamuon_is_its_equation(shape: tuple[int, int, int]) -> None:
    state = torch.zeros(shape, dtype=torch.float64)
    expected_state = torch.zeros(shape, dtype=torch.float64)
    for step in range(3):
        update = randoms(shape, step, torch.float64)
        expected_state = 0.9 * expected_state + 0.1 * update**2
        expected = update / (expected_state.sqrt() + 1e-8)
        expected *= min(shape[1:]) ** 0.5 / expected.flatten(1).norm(dim=1)[:, None, None]
        adapt_(update, state, "adamuon", 0.9)
        assert_close(update, expected, rtol=1e-12, atol=0)
        assert_close(state, expected_state, rtol=1e-12, atol=0)


def test_a_zero_update_stays_zero() -> None:
    """Of a matrix without gradient from the start, and later of one that had one."""
    for variant, state in (("normuon", torch.zeros(2, 3)), ("adamuon", torch.zeros(2, 3, 4))):
        for before in (torch.zeros(2, 3, 4), randoms((2, 3, 4), 0)):
            adapt_(before, state, variant, 0.95)
            update = torch.zeros(2, 3, 4)
            adapt_(update, state, variant, 0.95)
            assert torch.equal(update, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("variant", ["normuon", "adamuon"])
@pytest.mark.parametrize("cuts", [(0, 100), (0, 3, 40, 100), (0, 10, 20, 55, 99, 100)])
@pytest.mark.parametrize("attributes", [{}, {"muon_column_splits": (3, 7)}, {"muon_splits": (4, 6)}])
def test_slices_with_summed_rows_equal_the_whole(
    variant: Any, cuts: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    """A 10 x 10 weight, as one matrix, in columns and in rows, cut anywhere: what ranks do that hold slices of it."""
    weight = torch.zeros(10, 10)
    for name, value in attributes.items():
        setattr(weight, name, value)
    units = units_of(weight)
    whole_states = [torch.zeros(u.count, u.rows, *[u.cols] * (variant == "adamuon")) for u in units]
    row_state, element_state = torch.zeros(num_rows(units)), torch.zeros(100)
    ids = row_ids(units, 100)
    for step in range(3):
        update = randoms((10, 10), step)
        expected = update.clone()
        for some, state in zip(units, whole_states, strict=True):
            view = some.view(expected)
            adapt_(view, state, variant, 0.9)
        flat = update.view(-1).clone()
        slices = [slice(a, b) for a, b in pairwise(cuts)]
        sums = torch.zeros(num_rows(units))
        for part in slices:
            if variant == "adamuon":
                adamuon_divide_(flat[part], element_state[part], 0.9)
            sums += torch.zeros_like(sums).index_add_(0, ids[part], flat[part].square())  # the sum over ranks
        counts = [u.count * u.rows for u in units]
        factors = [
            normuon_factors(s.view(u.count, u.rows), v.view(u.count, u.rows), u.cols, 0.9)
            if variant == "normuon"
            else adamuon_factors(s.view(u.count, u.rows), u.cols)
            for u, s, v in zip(units, sums.split(counts), row_state.split(counts), strict=True)
        ]
        by_row = torch.cat([factor.reshape(-1) for factor in factors])
        for part in slices:
            flat[part] *= by_row[ids[part]]
        assert_close(flat.view(10, 10), expected, rtol=2e-6, atol=0)


def test_row_ids_count_through_spans() -> None:
    """Interleaved columns of two heads: rows of the first head, then of the second."""
    weight = torch.zeros(2, 4)
    weight.muon_column_splits = (3, 1)
    (span,) = spans_of(units_of(weight))
    assert row_ids(span.units, 8).tolist() == [0, 0, 0, 2, 1, 1, 1, 3]


def test_row_sums_are_of_squares() -> None:
    assert row_sums(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]).bfloat16()).tolist() == [[5.0, 9.0]]


# In the optimizer


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(randoms(shape, 10 + i) * 0.1) for i, shape in enumerate(shapes)]


def train(optimizer: Muon, steps: int = 3, first: int = 0) -> None:
    for step in range(first, first + steps):
        for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            parameter.grad = randoms(parameter.shape, 1000 * step + i).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("variant", ["normuon", "adamuon"])
def test_a_step_is_the_equation(variant: Any) -> None:
    """Momentum, orthogonalisation, second moment, factor and decay written out in fp64."""
    params = weights((7, 5), (4, 9))
    expected = [p.detach().double() for p in params]
    momenta = [torch.zeros_like(weight) for weight in expected]
    states = [torch.zeros(1, w.shape[0], *[w.shape[1]] * (variant == "adamuon"), dtype=torch.float64) for w in expected]
    optimizer = Muon(params, 0.02, variant=variant, variant_beta=0.9, ns_dtype=torch.float32)
    for step in range(4):
        train(optimizer, 1, first=step)
        for i, parameter in enumerate(params):
            gradient = parameter.grad.double()
            momenta[i] = 0.95 * momenta[i] + 0.05 * gradient
            update = orthogonalize(0.05 * gradient + 0.95 * momenta[i], dtype=torch.float64)[None]
            adapt_(update, states[i], variant, 0.9)
            scale = 0.02 * 0.2 * max(parameter.shape) ** 0.5
            expected[i] = expected[i] * (1 - 0.02 * 0.1) - scale * update[0]
    for parameter, weight in zip(params, expected, strict=True):
        assert_close(parameter.double(), weight, rtol=0, atol=3e-6)


def test_adamuon_updates_have_the_size_of_adamw_updates() -> None:
    """Exactly rms_scale, whatever the shape: that is what its norm is for."""
    params = weights((30, 20), (4, 8, 16))
    before = [p.detach().clone() for p in params]
    train(Muon(params, 1.0, weight_decay=0.0, variant="adamuon"), 1)
    for parameter, start in zip(params, before, strict=True):
        assert (parameter - start).square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-4)


def test_normuon_makes_rows_alike() -> None:
    """Rows of an orthogonalised tall matrix differ in size; afterwards their updates do not."""
    parameter = nn.Parameter(torch.zeros(40, 5))
    parameter.grad = randoms((40, 5), 0) * torch.logspace(-2, 0, 40)[:, None]
    sizes = {}
    for variant in ("none", "normuon"):
        with torch.no_grad():
            parameter.zero_()
        Muon([parameter], 1.0, variant=variant, weight_decay=0.0, ns_dtype=torch.float32).step()
        sizes[variant] = parameter.detach().norm(dim=1)
    assert sizes["none"].max() / sizes["none"].min() > 10
    assert sizes["normuon"].max() / sizes["normuon"].min() < 1.01
    assert_close(sizes["normuon"].norm(), sizes["none"].norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("variant", ["normuon", "adamuon"])
@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((3, 8, 6), {}),
        ((8, 6), {"muon_splits": (5, 3)}),
        ((8, 6), {"muon_column_splits": (2, 4)}),
        ((8, 6), {"muon_column_splits": (3, 3)}),
        ((2, 8, 6), {"muon_column_splits": (3, 3)}),
        ((3, 6, 8), {"muon_transposed": True}),
        ((2, 6, 8), {"muon_transposed": True, "muon_splits": (4, 4)}),
        ((2, 260, 270), {}),
    ],
)
def test_units_have_second_moments_of_their_own(
    variant: Any, shape: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    """As parameters of their own, bit for bit over three steps: stacks, row and column blocks, large units."""
    (whole,) = weights(shape)
    for name, value in attributes.items():
        setattr(whole, name, value)
    units = units_of(whole)

    def pieces(tensor: Tensor) -> list[Tensor]:
        return [matrix for some in units for matrix in some.view(tensor)]

    alone = [
        nn.Parameter(piece.detach().clone(memory_format=torch.contiguous_format)) for piece in pieces(whole.detach())
    ]
    first, second = Muon([whole], 0.1, variant=variant), Muon(alone, 0.1, variant=variant)
    for step in range(3):
        whole.grad = randoms(shape, step)
        for parameter, grad in zip(alone, pieces(whole.grad), strict=True):
            parameter.grad = grad.clone(memory_format=torch.contiguous_format)
        first.step()
        second.step()
    for parameter, piece in zip(alone, pieces(whole.detach()), strict=True):
        assert torch.equal(parameter, piece)


def test_row_places_are_those_of_first_elements() -> None:
    """Two column blocks of 3 rows: rows of both in turns, as their first elements are."""
    weight = torch.zeros(3, 6)
    weight.muon_column_splits = (4, 2)
    first, second = (row_places(units_of(weight), some).view(torch.arange(6)).tolist() for some in units_of(weight))
    assert (first, second) == ([[0, 2, 4]], [[1, 3, 5]])


@pytest.mark.parametrize("variant", ["normuon", "adamuon"])
def test_state_of_variants_is_saved_and_loaded(variant: Any) -> None:
    """Training goes on bit for bit; without its state it would not."""
    params, again = weights((7, 5), (3, 4, 4)), weights((7, 5), (3, 4, 4))
    optimizer, resumed = Muon(params, 0.1, variant=variant), Muon(again, 0.1, variant=variant)
    train(optimizer)
    saved = optimizer.full_state_dict()
    keys = {"normuon": "row_second_moment", "adamuon": "second_moment"}
    assert all(set(state) == {"momentum_buffer", keys[variant]} for state in saved["state"].values())
    for p, q in zip(params, again, strict=True):
        q.data.copy_(p.data)
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, first=3)
    train(resumed, first=3)
    assert_close(again, params, rtol=0, atol=0)
    assert resumed.param_groups[0]["variant"] == variant


# Cautious decay


def test_only_elements_that_shrink_anyway_decay() -> None:
    (parameter,) = weights((6, 9))
    before = parameter.detach().clone()
    optimizer = Muon([parameter], 0.1, weight_decay=0.5, cautious_wd=True, ns_dtype=torch.float32)
    parameter.grad = randoms((6, 9), 0)
    optimizer.step()
    update = orthogonalize(parameter.grad, dtype=torch.float32)
    decay = torch.where(before * update > 0, 1 - 0.1 * 0.5, 1.0)
    assert_close(parameter.detach(), before * decay - 0.1 * 0.2 * 3 * update, rtol=0, atol=1e-6)
    assert 10 < (decay == 1).sum() < 44


# Orthogonalisations of one's own


def svd_polar(x: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


def spoils_its_input(x: Tensor) -> Tensor:
    return x.zero_().add_(1)


def gives_one_too_few(x: Tensor) -> Tensor:
    return x[:, 1:]


def test_a_function_takes_the_place_of_newton_schulz() -> None:
    ours, theirs = weights((6, 9), (4, 4)), weights((6, 9), (4, 4))
    train(Muon(ours, 0.1, ns=svd_polar, weight_decay=0.0), 1)
    for parameter, before in zip(ours, theirs, strict=True):
        expected = before.detach() - 0.1 * 0.2 * max(before.shape) ** 0.5 * svd_polar(parameter.grad)
        assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


def test_a_function_cannot_spoil_the_state() -> None:
    """Without Nesterov, and in the dtype of the state, what it is given would be the momentum itself."""
    (parameter,) = weights((6, 9))
    optimizer = Muon([parameter], 0.1, ns=spoils_its_input, nesterov=False)
    parameter.grad = randoms((6, 9), 0)
    optimizer.step()
    assert_close(optimizer.state[parameter]["momentum_buffer"], 0.05 * parameter.grad, rtol=1e-6, atol=0)


def test_a_function_is_saved_by_name_and_kept_on_load() -> None:
    """Nothing that would have to be unpickled gets into a checkpoint."""
    optimizer, other = Muon(weights((4, 4)), 0.1, ns=svd_polar), Muon(weights((4, 4)), 0.1, ns=svd_polar)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["ns"] == f"function {__name__}.svd_polar"
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["ns"] is svd_polar


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ns": svd_polar, "ns_steps": 4}, "ns is a function"),
        ({"ns": svd_polar, "ns_form": "gram"}, "ns is a function"),
        ({"ns": svd_polar, "ns_dtype": torch.float16}, "float16"),
    ],
)
def test_options_without_a_meaning_for_a_function_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Muon(weights((4, 4)), 0.1, **options)


def test_a_function_with_a_wrong_result_is_named() -> None:
    optimizer = Muon(weights((4, 5)), 0.1, ns=gives_one_too_few)
    with pytest.raises(ConfigError, match=r"gives_one_too_few was given matrices \(1, 4, 5\) and returned \(1, 3, 5\)"):
        train(optimizer, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "adam"}, "variant is one of none, normuon, adamuon, found 'adam'"),
        ({"variant_beta": 1.0}, r"variant_beta must lie in \[0, 1\)"),
        ({"cautious_wd": "yes"}, "cautious_wd is True or False, found 'yes'"),
        ({"nesterov": 1}, "nesterov is True or False, found 1"),
        ({"lr": "x"}, "lr is a number, found 'x'"),
        ({"lr": None}, "lr is a number, found None"),
        ({"lr": True}, "lr is a number, found True"),
        ({"lr": float("nan")}, "lr must not be negative, found nan"),
        ({"lr": float("inf")}, "lr must not be negative, found inf"),
        ({"lr": torch.ones(2)}, "lr is a number"),
        ({"momentum": "0.9"}, "momentum is a number"),
        ({"weight_decay": [0.1]}, "weight_decay is a number"),
        ({"betas": 0.9}, "betas are two numbers, found 0.9"),
        ({"betas": (0.9, 0.95, 0.99)}, "betas are two numbers"),
        ({"betas": (0.9, "x")}, "betas is a number"),
        ({"momentum_dtype": "float32"}, "momentum_dtype must be a floating-point dtype, found 'float32'"),
        ({"max_grad_norm": "1"}, "max_grad_norm is a number"),
        ({"adjust_lr": ["original"]}, "adjust_lr is one of"),
        ({"ns": 3}, "3"),
        ({"ns_steps": "five"}, "five"),
        ({"ns_steps": 0}, "0"),
        ({"ns_steps": 2.5}, "2.5"),
    ],
)
def test_options_of_wrong_kinds_are_refused_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Muon(weights((4, 4)), **{"lr": 0.1, **options})


def test_a_group_without_parameters_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="needs 'params', found 'lr'"):
        Muon([{"lr": 0.1}], 0.1)


# Over ranks


def _variant_on_ranks(rank: int, options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any], list[int]]:
    import torch.distributed as dist

    params = over_ranks.plain()
    optimizer = Muon(over_ranks.declare(params), 0.02, process_group=dist.group.WORLD, **options)
    over_ranks.train(params, optimizer)
    states = [optimizer.state[param] for param in params[: len(over_ranks.MATRICES)]]
    sizes = [sum(value.numel() for key, value in state.items() if key != "row_second_moment") for state in states]
    return [param.detach() for param in params], optimizer.full_state_dict(rank0_only=False)["state"], sizes


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        (3, {"partition": "flat"}),
        (4, {"partition": "flat", "split_strategy": "owner"}),
        (2, {"partition": "flat", "split_strategy": "duplicate", "ns_dtype": torch.bfloat16}),
        (3, {"partition": "matrix"}),
    ],
    ids=["flat", "owner", "duplicate in bf16", "matrix"],
)
@pytest.mark.parametrize("variant", ["normuon", "adamuon"])
def test_variants_over_ranks_are_those_of_one_process(variant: Any, options: dict[str, Any], num_ranks: int) -> None:
    """NorMuon bit for bit, state included; AdaMuon to the rounding of sums over ranks, largest seen 3e-7 relative."""
    options = {"ns_dtype": torch.float32, **options, "variant": variant, "variant_beta": 0.9, "cautious_wd": True}
    alone = {key: value for key, value in options.items() if key not in ("partition", "split_strategy")}
    expected, optimizer = over_ranks.one_process(**alone)
    start = over_ranks.values()
    state = optimizer.full_state_dict()["state"]
    results = run_ranks(_variant_on_ranks, num_ranks, options)
    for found, found_state, _ in results:
        assert_close(found, results[0][0], rtol=0, atol=0)
        for ours, theirs, zero in zip(found, expected, start, strict=True):
            if variant == "normuon":
                assert torch.equal(ours, theirs)
            else:
                assert (ours - theirs).norm() <= 1e-6 * (theirs - zero).norm()
        tolerance = 0 if variant == "normuon" else 1e-6
        assert_close(found_state, state, rtol=tolerance, atol=0)
    if options["partition"] == "flat":  # second moments of elements are dealt out as momentum is
        held = [sum(sizes) for *_, sizes in results]
        assert max(held) - min(held) < 2 * num_ranks


def _variants_on_dtensors(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    return {variant: _variant_on_dtensors({**options, "variant": variant}) for variant in ("normuon", "adamuon")}


def _variant_on_dtensors(options: dict[str, Any]) -> dict[str, tuple[list[Tensor], dict[str, Any]]]:
    """What every rank has in the end, put together, for several ways to lie on a mesh."""
    from torch.distributed.tensor import Replicate, Shard

    rows = {1: [Shard(0)], 2: [Replicate(), Shard(0)]}
    ways: dict[str, tuple[int, Any]] = {
        "rows": (1, lambda shape: rows[1]),
        "columns": (1, lambda shape: [Shard(int(len(shape) == 2))]),
        "copies of rows": (2, lambda shape: rows[2]),
        "experts": (2, lambda shape: [Shard(0), Shard(0)] if len(shape) == 3 else rows[2]),
    }
    found = {}
    for name, (axes, placements) in ways.items():
        mesh = mesh_of(axes)
        params = [nn.Parameter(local(value, mesh, placements(value.shape))) for value in over_ranks.values()]
        optimizer = Muon(over_ranks.declare(params), 0.02, **options)
        train_sharded(params, optimizer, 3, torch.float32)
        whole = [param.full_tensor().detach() for param in params]
        found[name] = whole, optimizer.full_state_dict(rank0_only=False)["state"]
    return found


ON_DTENSORS: dict[str, Any] = {"ns_dtype": torch.float32, "variant_beta": 0.9}


@pytest.fixture(scope="module")
def on_dtensors() -> list[dict[str, Any]]:
    return run_ranks(_variants_on_dtensors, 4, ON_DTENSORS)


@pytest.mark.parametrize("variant", ["normuon", "adamuon"])
def test_variants_on_dtensors_are_those_of_one_process(variant: Any, on_dtensors: list[dict[str, Any]]) -> None:
    """Four ranks. NorMuon bit for bit, state included; AdaMuon to the rounding of sums over ranks."""
    expected, optimizer = over_ranks.one_process(**ON_DTENSORS, variant=variant)
    state = optimizer.full_state_dict()["state"]
    for of_rank in on_dtensors:
        for way, (found, found_state) in of_rank[variant].items():
            for ours, theirs, zero in zip(found, expected, over_ranks.values(), strict=True):
                bound = 0.0 if variant == "normuon" else 1e-6 * (theirs - zero).norm()
                assert (ours - theirs).norm() <= bound, way
            assert_close(found_state, state, rtol=0 if variant == "normuon" else 1e-6, atol=0)


def _stack_cut_in_rows(rank: int) -> str:
    from torch.distributed.tensor import Shard

    parameter = nn.Parameter(local(torch.zeros(3, 8, 4), mesh_of(1), [Shard(1)]))
    with pytest.raises(ConfigError) as error:
        Muon([parameter], 0.1, variant="normuon")
    return str(error.value)


def test_stacks_cut_in_rows_are_refused_with_a_variant() -> None:
    for message in run_ranks(_stack_cut_in_rows, 2):
        assert "variant='normuon' takes stacks of matrices that are cut along the stack only" in message
