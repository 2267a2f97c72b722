"""Muon with its state dealt out to ranks: the bits of one process, 1 / N of its state, and no rank that waits for another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.optim.over_ranks import MATRICES, SHAPES, declare, gradients, one_process, plain, state_tensors, train
from tests.ranks import run_ranks
from vlkit.errors import ConfigError
from vlkit.optim import Muon

FP32 = {"ns_dtype": torch.float32}
BF16 = {"ns_dtype": torch.bfloat16}
WAYS: list[dict[str, Any]] = [
    {"split_strategy": "auto"},
    {"split_strategy": "duplicate"},
    {"split_strategy": "owner"},
    {"partition": "matrix"},
]


def optimizer_of(params: Sequence[Tensor], **options: Any) -> Muon:
    return Muon(declare(params), 0.02, process_group=dist.group.WORLD, **options)


def differences(params: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of any element."""
    each = [(a.detach().double() - b.double()).abs().flatten() for a, b in zip(params, expected, strict=True)]
    return torch.cat(each).max().item()


# The same bits


def every_way(rank: int, dtype: torch.dtype, options: dict[str, Any], expected: list[Tensor]) -> dict[str, float]:
    found = {}
    for way in WAYS:
        params = plain(dtype)
        train(params, optimizer_of(params, **way, **options), dtype=dtype)
        found[str(way)] = differences(params, expected)
    return found


@pytest.mark.parametrize(
    ("num_ranks", "dtype", "options"),
    [
        (2, torch.float32, FP32),
        (3, torch.float32, {**FP32, "max_grad_norm": 3.0, "maximize": True}),
        (3, torch.bfloat16, {**BF16, "momentum_dtype": torch.bfloat16}),
        (4, torch.float32, BF16),
        (4, torch.bfloat16, {**FP32, "ns_norm": "schatten8"}),
        (4, torch.float64, {"ns_dtype": torch.float64}),
    ],
    ids=str,
)
def test_ranks_end_with_the_bits_of_one_process(num_ranks: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Every partition and split strategy; units of all kinds are cut, some of them by two boundaries and more."""
    expected, _ = one_process(dtype, **options)
    for found in run_ranks(every_way, num_ranks, dtype, options, expected):
        assert found == dict.fromkeys(map(str, WAYS), 0.0)


def own_state(rank: int) -> list[tuple[list[Any], list[Tensor]]]:
    found = []
    for partition in ("flat", "matrix"):
        params = plain()
        optimizer = optimizer_of(params, partition=partition)
        train(params, optimizer)
        held = [optimizer.held(param)[rank] for param in params]
        found.append((held, list(state_tensors(optimizer))))
    return found


def test_state_is_that_of_one_process_where_held() -> None:
    """Whole units leave the momentum alone, also where it needs no cast."""
    params, optimizer = plain(), None
    optimizer = Muon(declare(params), 0.02)
    train(params, optimizer)
    for found in run_ranks(own_state, 3):
        for held, tensors in found:
            rest = list(tensors)
            for param, ranges in zip(params, held, strict=True):
                for value in optimizer.state[param].values():
                    if value.ndim and value.shape == param.shape:
                        mine = torch.cat([value.new_empty(0), *(value.view(-1)[a:b] for a, b in ranges)])
                        assert torch.equal(rest.pop(0), mine)
            assert not rest


def transposed_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(6, 5, 3, 3, generator=generator).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(9, 14, generator=generator).T),
        nn.Parameter(torch.randn(7, 3, generator=generator).T),
    ]


def step_twice(params: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    optimizer = Muon([{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}], 0.02, process_group=group)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def odd_layouts(rank: int, expected: list[Tensor]) -> float:
    params = transposed_parameters()
    step_twice(params, dist.group.WORLD)
    assert not any(param.is_contiguous() for param in params)
    return differences(params, expected)


def test_parameters_in_other_memory_orders_are_updated_too() -> None:
    params = transposed_parameters()
    contiguous = [nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format)) for param in params]
    step_twice(params)
    step_twice(contiguous)
    assert differences(params, contiguous) == 0
    assert run_ranks(odd_layouts, 3, [param.detach() for param in contiguous]) == [0.0] * 3


# What a rank keeps, and what it sends


def bytes_kept(rank: int, partition: str) -> int:
    optimizer = optimizer_of(plain(), partition=partition)
    return sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(optimizer))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_a_rank_keeps_one_part_of_the_state(num_ranks: int) -> None:
    """Flat: one N-th, although one matrix is larger than that. Whole units: what is possible without cutting one."""
    matrices, vectors = (sum(map(math.prod, shapes)) for shapes in (MATRICES, SHAPES[len(MATRICES) :]))
    total = 4 * (matrices + 2 * vectors)
    assert max(map(math.prod, MATRICES)) > matrices / 4
    kept = run_ranks(bytes_kept, num_ranks, "flat")
    assert sum(kept) == total
    assert max(kept) - min(kept) <= 4 * 3 * num_ranks
    kept = run_ranks(bytes_kept, num_ranks, "matrix")
    assert sum(kept) == total
    largest = 4 * max(40 * 200, 64 * 40)  # heads in columns stay together
    assert max(kept) <= max(1.25 * total / num_ranks, largest) + 4 * 2 * vectors / num_ranks + 16


def bytes_sent(rank: int, options: dict[str, Any]) -> tuple[int, int, int]:
    """(messages between two ranks, elements of all other messages times their bytes, sums)."""
    params = plain()
    optimizer = optimizer_of(params, **options)
    between, collective, sums = [0], [0], [0]

    def counted(name: str, total: list[int], size: Callable[..., int]) -> None:
        plain_function = getattr(dist, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            total[0] += size(*args)
            return plain_function(*args, **kwargs)

        setattr(dist, name, function)

    def sent(operations: list[dist.P2POp]) -> int:
        return sum(op.tensor.nbytes for op in operations if op.op is dist.isend)

    counted("batch_isend_irecv", between, sent)
    counted("reduce_scatter_single", collective, lambda output, whole: whole.nbytes)
    counted("all_gather_single", collective, lambda whole, mine: whole.nbytes)
    counted("all_reduce", sums, lambda tensor: tensor.nbytes)
    train(params, optimizer, steps=1)
    return between[0], collective[0], sums[0]


def test_no_more_is_sent_than_gradients_parameters_and_shared_units() -> None:
    """Per rank and element 4 bytes of gradient and 4 of parameter, and where k ranks share a unit, 2 for each other."""
    num_ranks, elements = 4, sum(map(math.prod, SHAPES))
    shared = straddling(num_ranks)
    assert max(len(ranks) for _, ranks in shared) >= 3
    for strategy, volume in (
        ("duplicate", sum(2 * size * (len(ranks) - 1) for size, ranks in shared)),
        ("owner", sum(2 * 2 * (size - max(ranks)) for size, ranks in shared)),
    ):
        found = run_ranks(bytes_sent, num_ranks, {**BF16, "split_strategy": strategy, "grad_sync": "reduce_scatter"})
        assert sum(between for between, _, _ in found) == volume
        for _, collective, sums in found:
            assert 8 * elements <= collective <= 8 * (elements + 2 * num_ranks)
            assert sums == 8 * (2 + len(SHAPES))
    for between, collective, _ in run_ranks(bytes_sent, num_ranks, {**BF16, "partition": "matrix"}):
        assert between == 0
        assert collective >= 4 * elements  # parameters; gradients are averaged already


def straddling(num_ranks: int) -> list[tuple[int, list[int]]]:
    """(elements, those of each rank) of every unit, or matrix of column heads, that a boundary cuts."""
    runs: list[int] = []
    for shape, pieces in zip(MATRICES, ([], [], [], [64, 32, 33], [], [], [], [15, 15]), strict=True):
        count, rows = (shape[0], shape[1]) if len(shape) == 3 else (1, shape[0])
        cols = math.prod(shape) // (count * rows)
        runs += [part * cols for part in pieces or [rows]] * count
    size = -(-sum(runs) // num_ranks)
    found, first = [], 0
    for run in runs:
        parts = [min(first + run, (rank + 1) * size) - max(first, rank * size) for rank in range(num_ranks)]
        if sum(part > 0 for part in parts) > 1:
            found.append((run, [part for part in parts if part > 0]))
        first += run
    return found


# Gradients that differ between ranks


def own_gradients(rank: int, dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    params = plain(dtype)
    optimizer = optimizer_of(params, grad_sync="reduce_scatter", **options)
    for step in range(3):
        for param, grad in zip(params, gradients(10 * step + rank, dtype), strict=True):
            param.grad = grad
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("partition", ["flat", "matrix"])
@pytest.mark.parametrize(("options", "bound"), [(FP32, 1e-5), (BF16, 1e-3)], ids=str)
def test_gradients_of_ranks_are_averaged(options: dict[str, Any], bound: float, partition: str) -> None:
    """All ranks have equal bits; against one process the order of three summands shows (of updates of 0.004 per step)."""
    num_ranks = 3
    params = plain()
    optimizer = Muon(declare(params), 0.02, **options)
    for step in range(3):
        each = [gradients(10 * step + rank) for rank in range(num_ranks)]
        for param, grads in zip(params, zip(*each, strict=True), strict=True):
            param.grad = torch.stack(grads).mean(0)
        optimizer.step()
    results = run_ranks(own_gradients, num_ranks, torch.float32, {**options, "partition": partition})
    assert all(differences(result, results[0]) == 0 for result in results)
    for index, (result, param) in enumerate(zip(results[0], params, strict=True)):
        scale = 1.0 if index < len(MATRICES) else 100.0  # Adam divides by what rounding made of the gradient
        assert (result - param.detach()).abs().max() < bound * scale


def missing_gradients(rank: int, missing: dict[int, list[int]], grad_sync: str, zeros: bool) -> list[Tensor]:
    params = plain()
    optimizer = optimizer_of(params, grad_sync=grad_sync)
    for step in range(2):
        for index, (param, grad) in enumerate(zip(params, gradients(step), strict=True)):
            absent = rank in missing.get(index, [])
            everywhere = len(missing.get(index, [])) == 3
            param.grad = (
                None if absent and not (zeros and not everywhere) else torch.zeros_like(grad) if absent else grad
            )
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("grad_sync", ["none", "reduce_scatter"])
def test_a_gradient_missing_on_some_ranks_is_zeros_there(grad_sync: str) -> None:
    """No rank waits for ever. Missing everywhere, the parameter stays as it is: not even decay."""
    missing = {0: [1], 3: [0, 2], 5: [0, 1, 2], 8: [2], 9: [0, 1, 2]}
    absent = run_ranks(missing_gradients, 3, missing, grad_sync, False)
    zeros = run_ranks(missing_gradients, 3, missing, grad_sync, True)
    start = plain()
    for result, expected in zip(absent, zeros, strict=True):
        assert differences(result, expected) == 0
        assert torch.equal(result[5], start[5])
        assert torch.equal(result[9], start[9])


def one_rank_without_any(rank: int) -> list[Tensor]:
    params = plain()
    optimizer = optimizer_of(params, grad_sync="reduce_scatter")
    if rank:
        for param, grad in zip(params, gradients(0), strict=True):
            param.grad = grad * 2
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # nobody has any
    return [param.detach() for param in params]


def test_a_rank_without_any_gradient_takes_part() -> None:
    expected, _ = one_process(steps=1)
    results = run_ranks(one_rank_without_any, 2)
    assert all(differences(result, expected) == 0 for result in results)


# Steps that are not taken, clipping, scaling


def unusual_step(rank: int, value: float) -> tuple[bool, int, float, float]:
    params = plain()
    optimizer = optimizer_of(params, grad_sync="reduce_scatter")
    train(params, optimizer, 1)
    before = [param.detach().clone() for param in params], [tensor.clone() for tensor in state_tensors(optimizer)]
    for param, grad in zip(params, gradients(7), strict=True):
        param.grad = grad
    if rank == 1:
        params[3].grad.view(-1)[-1] = value  # type: ignore[union-attr]
    optimizer.step()
    skipped = optimizer.last_step_skipped
    changed = max(differences(params, before[0]), differences(list(state_tensors(optimizer)), before[1]))
    reference = plain()
    train(reference, other := optimizer_of(reference, grad_sync="reduce_scatter"), 1)
    for each in (params, reference):
        for param, grad in zip(each, gradients(1), strict=True):
            param.grad = grad
    optimizer.step()
    other.step()
    return skipped, optimizer.skipped_steps, changed, differences(params, [param.detach() for param in reference])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(value: float) -> None:
    """Weights and state; the next step goes as if it had not been."""
    assert run_ranks(unusual_step, 3, value) == [(True, 1, 0.0, 0.0)] * 3


def scaled_step(rank: int, overflow: bool) -> tuple[float, int, float]:
    params = plain()
    optimizer = optimizer_of(params, grad_sync="reduce_scatter", **FP32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes the scale
    for param, grad in zip(params, gradients(0), strict=True):
        param.grad = grad * 1024
    if overflow and rank == 0:
        params[0].grad[0, 0] = float("inf")  # type: ignore[index]
    scaler.step(optimizer)
    scaler.update()
    reference = plain()
    if not overflow:
        train(reference, Muon(declare(reference), 0.02, **FP32), 1)
    norm = float(optimizer.last_grad_norm) if optimizer.last_grad_norm is not None else 0.0
    return differences(params, [param.detach() for param in reference]), optimizer.skipped_steps, norm


def test_a_scaler_over_ranks_unscales_and_skips() -> None:
    norm = torch.cat([grad.flatten() for grad in gradients(0)]).norm().item()
    for difference, skipped, found in run_ranks(scaled_step, 2, False):
        assert (difference, skipped) == (0.0, 0)
        assert found == pytest.approx(norm, rel=1e-6)
    assert [result[:2] for result in run_ranks(scaled_step, 2, True)] == [(0.0, 1)] * 2


def norm_of_step(rank: int) -> float:
    params = plain()
    optimizer = optimizer_of(params, max_grad_norm=1.0)
    train(params, optimizer, 1)
    return float(optimizer.last_grad_norm)  # type: ignore[arg-type]


def test_the_norm_is_that_of_all_gradients() -> None:
    params = plain()
    for param, grad in zip(params, gradients(0), strict=True):
        param.grad = grad
    norm = nn.utils.clip_grad_norm_(params, 1.0).item()
    assert run_ranks(norm_of_step, 3) == [pytest.approx(norm, rel=1e-6)] * 3


# Groups and agreement


def group_added_later(rank: int, partition: str, variant: str) -> list[Tensor]:
    params = plain()
    groups = declare(params)
    optimizer = Muon(groups[:1], 0.02, process_group=dist.group.WORLD, partition=partition, variant=variant)
    late_groups(params, groups, optimizer)
    return [param.detach() for param in params]


def late_groups(params: Sequence[Tensor], groups: list[dict[str, Any]], optimizer: Muon) -> None:
    for index in range(len(groups)):
        if index:
            optimizer.add_param_group(groups[index])
        train(params, optimizer, 2)


@pytest.mark.parametrize(("partition", "variant"), [("flat", "normuon"), ("matrix", "none")])
def test_a_group_added_later_finds_its_place(partition: str, variant: str) -> None:
    """Elements are dealt out anew, and state goes with them."""
    params = plain()
    groups = declare(params)
    late_groups(params, groups, Muon(groups[:1], 0.02, variant=variant))
    for result in run_ranks(group_added_later, 3, partition, variant):
        assert differences(result, params) == 0


def who_differs(rank: int, what: str) -> str:
    params = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3, 5))]
    names = ["first", "second"]
    lr = 0.1
    if rank == 2:
        if what == "order":
            params.reverse()
            names.reverse()
        if what == "number":
            params.pop()
            names.pop()
        if what == "lr":
            lr = 0.2
        if what == "weights":
            params[1].data[2, 4] = 1e-30
    try:
        Muon([{"params": params, "param_names": names}], lr, process_group=dist.group.WORLD)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("order", ["first", "second", "rank 2"]),
        ("number", ["second", "nothing"]),
        ("lr", ["entry 1 in first is lr=0.1 on rank 0 and lr=0.2 on rank 2 of the group"]),
        ("weights", ["second differs between rank 0 and rank 2 of the group", "Broadcast"]),
    ],
)
def test_ranks_that_differ_are_told_before_anything_is_sent(what: str, words: list[str]) -> None:
    for message in run_ranks(who_differs, 3, what):
        assert all(word in message for word in words), message
    assert run_ranks(who_differs, 3, "nothing") == [""] * 3


def alone_among_ranks(rank: int) -> float:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a process by itself said something to others")

    for name in (
        "all_reduce",
        "all_gather",
        "all_gather_single",
        "reduce_scatter_single",
        "batch_isend_irecv",
        "barrier",
    ):
        setattr(dist, "_" + name, getattr(dist, name))
        setattr(dist, name, refuse)
    expected, _ = one_process(max_grad_norm=1.0)
    setattr(dist, "barrier", getattr(dist, "_barrier"))  # noqa: B009, B010  # of the harness
    return differences(expected, expected)


def test_without_a_group_ranks_do_not_talk() -> None:
    assert run_ranks(alone_among_ranks, 2) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"partition": "rows"}, "partition is one of 'flat', 'matrix'"),
        ({"grad_sync": "all_reduce"}, "grad_sync is one of"),
        ({"split_strategy": "both"}, "split_strategy is one of"),
        ({"grad_sync": "reduce_scatter"}, "needs process_group"),
    ],
)
def test_unknown_ways_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Muon(plain()[:1], 0.1, **options)


# With torch's own data parallelism


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 33), nn.GELU(), nn.Linear(33, 17), nn.GELU(), nn.Linear(17, 5))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim == 2]},
        {"params": [p for p in params if p.ndim < 2], "algorithm": "adamw"},
    ]


def loss_of(model: nn.Module, step: int, rows: slice) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs, targets = torch.randn(16, 12, generator=generator), torch.randint(5, (16,), generator=generator)
    return nn.functional.cross_entropy(model(inputs[rows]), targets[rows])


def under_ddp(rank: int) -> list[float]:
    model = DistributedDataParallel(classifier())
    optimizer = Muon(groups_of(model), 0.02, process_group=dist.group.WORLD, **FP32)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, step, slice(8 * rank, 8 * rank + 8))
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
    return losses


def test_ddp_learns_as_one_process_does() -> None:
    """Two ranks with half of every batch, 20 steps."""
    model = classifier()
    optimizer = Muon(groups_of(model), 0.02, **FP32)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, step, slice(None))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for found in run_ranks(under_ddp, 2):
        assert found == pytest.approx(losses, abs=1e-4)
