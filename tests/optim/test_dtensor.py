"""Muon on DTensors, as fully_shard makes them: the bits of one device, from local tensors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.optim.over_ranks import MATRICES, declare, gradients, one_process, plain, state_tensors, values
from tests.ranks import all_of, run_ranks
from vlkit.errors import ConfigError
from vlkit.optim import Muon

# Mesh of so many axes, and how a tensor of a shape lies on it.
WAYS: dict[str, tuple[int, Any]] = {
    "rows": (1, lambda shape: [Shard(0)]),
    "columns": (1, lambda shape: [Shard(min(1, len(shape) - 1))]),
    "columns of stacks": (1, lambda shape: [Shard(2 if len(shape) == 3 else 0)]),
    "copies": (1, lambda shape: [Replicate()]),
    "copies of rows": (2, lambda shape: [Replicate(), Shard(0)]),
    "experts": (2, lambda shape: [Shard(0), Shard(0)] if len(shape) == 3 else [Replicate(), Shard(0)]),
    "experts, then rows": (2, lambda shape: [Shard(0), Shard(1)] if len(shape) == 3 else [Replicate(), Shard(0)]),
}


def mesh_of(axes: int) -> DeviceMesh:
    num_ranks = dist.get_world_size()
    return init_device_mesh("cpu", (num_ranks,) if axes == 1 else (2, num_ranks // 2))


def local(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """Cut without talking to other ranks, since all have the same."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def train_sharded(params: Sequence[Any], optimizer: Muon, steps: int, dtype: torch.dtype) -> None:
    for step in range(steps):
        for param, grad in zip(params, gradients(step, dtype), strict=True):
            param.grad = local(grad, param.device_mesh, param.placements)
        optimizer.step()


def local_differences(params: Sequence[Any], expected: Sequence[Tensor]) -> float:
    """The largest of any element that this rank has."""
    found = [0.0]
    for param, value in zip(params, expected, strict=True):
        ours, theirs = param.to_local(), local(value, param.device_mesh, param.placements).to_local()
        assert ours.shape == theirs.shape
        found += (ours.double() - theirs.double()).abs().flatten().tolist()
    return max(found)


def every_way(rank: int, dtype: torch.dtype, options: dict[str, Any], expected: list[Tensor]) -> dict[str, float]:
    found = {}
    for name, (axes, placements) in WAYS.items():
        if axes == 1 or dist.get_world_size() == 4:
            mesh = mesh_of(axes)
            params = [nn.Parameter(local(value, mesh, placements(value.shape))) for value in values(dtype)]
            optimizer = Muon(declare(params), 0.02, **options)
            with CommDebugMode() as of_dtensors:
                train_sharded(params, optimizer, 3, dtype)
            # Of collectives only the sums that tell of norms: an operation on a DTensor would gather.
            assert set(of_dtensors.get_comm_counts()) <= {torch.ops.c10d.allreduce_}, of_dtensors.get_comm_counts()
            for param in params:
                for key, value in optimizer.state[param].items():
                    assert key == "step" or value.placements == param.placements
            found[name] = local_differences(params, expected)
    return found


@pytest.mark.parametrize(
    ("num_ranks", "dtype", "options"),
    [
        pytest.param(2, torch.float32, {"ns_dtype": torch.float32}, marks=pytest.mark.slow),
        (3, torch.bfloat16, {"ns_dtype": torch.bfloat16, "max_grad_norm": 3.0}),
        (4, torch.float32, {"ns_dtype": torch.float32, "max_grad_norm": 3.0}),
    ],
    ids=str,
)
def test_shards_end_with_the_bits_of_one_device(num_ranks: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Uneven shards (65 rows on 4), shards without a row (3 rows on 4), stacks, fused weights, a convolution."""
    expected, _ = one_process(dtype, **options)
    for found in run_ranks(every_way, num_ranks, dtype, options, expected):
        assert set(found.values()) == {0.0}, found


@pytest.fixture(scope="module")
def on_four() -> dict[str, list[Any]]:
    """What each work gives on four ranks, by its name."""
    works = [under_fsdp, experts_under_fsdp, asymmetric, not_finite, norms, sent, refusals]
    found = run_ranks(all_of, 4, [(work, ()) for work in works])
    return {work.__name__: list(results) for work, results in zip(works, zip(*found, strict=True), strict=True)}


class Small(nn.Module):
    """A stack of experts beside matrices with 65 and 3 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 65)
        self.experts = nn.Parameter(torch.randn(3, 65, 65) * 0.1)
        self.last = nn.Linear(65, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.last((hidden @ self.experts).sum(0).tanh())


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim >= 2]},
        {"params": [p for p in params if p.ndim < 2], "algorithm": "adamw"},
    ]


def made() -> Small:
    torch.manual_seed(0)
    return Small()


def train_model(model: nn.Module, optimizer: Muon, steps: int) -> list[list[Tensor]]:
    """The same data everywhere; gradients of every step, whole."""
    grads = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        grads.append(
            [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone() for p in model.parameters()]
        )  # type: ignore[union-attr]
    return grads


def under_fsdp(rank: int) -> tuple[bool, list[Tensor], list[list[Tensor]]]:
    model = made()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = Muon(groups_of(model), 0.02, ns_dtype=torch.float32)
    grads = train_model(model, optimizer, 3)
    sharded = all(
        isinstance(value, DTensor) and value.placements == param.placements  # type: ignore[attr-defined]
        for param in model.parameters()
        for key, value in optimizer.state[param].items()
        if key != "step"
    )
    return sharded, [param.full_tensor().detach() for param in model.parameters()], grads  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_model_under_fully_shard_is_trained_as_on_one_device(num_ranks: int, on_four: dict[str, list[Any]]) -> None:
    """Given the gradients that fully_shard made, to the bit."""
    results = on_four["under_fsdp"] if num_ranks == 4 else run_ranks(under_fsdp, num_ranks)
    model = made()
    optimizer = Muon(groups_of(model), 0.02, ns_dtype=torch.float32)
    for grads in results[0][2]:
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad = grad
        optimizer.step()
    for sharded, params, _ in results:
        assert sharded
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(params, model.parameters(), strict=True))


def experts_under_fsdp(rank: int) -> tuple[str, list[Tensor], list[Tensor]]:
    """Experts dealt out along one mesh axis; fully_shard then cuts what each rank has along the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("experts", "data"))
    torch.manual_seed(0)
    model = nn.Module()
    model.stack = nn.Parameter(local(torch.randn(6, 9, 7), mesh["experts"], [Shard(0)]))
    model.router = nn.Parameter(torch.randn(6, 9))
    fully_shard(model, mesh=mesh["data"])
    whole = [param.full_tensor().detach().clone() for param in model.parameters()]  # type: ignore[attr-defined]
    optimizer = Muon(model.parameters(), 0.02, ns_dtype=torch.float32)
    for param in model.parameters():
        param.grad = (param * 3.0).detach()
    optimizer.step()
    return str(model.stack.placements), whole, [param.full_tensor().detach() for param in model.parameters()]  # type: ignore[attr-defined]


def test_experts_dealt_out_before_fully_shard_are_whole_matrices(on_four: dict[str, list[Any]]) -> None:
    for placements, start, ours in on_four["experts_under_fsdp"]:
        assert "Strided" in placements
        params = [nn.Parameter(value) for value in start]
        for param in params:
            param.grad = param.detach() * 3.0
        Muon(params, 0.02, ns_dtype=torch.float32).step()
        assert all(torch.equal(a, b) for a, b in zip(ours, params, strict=True))


def bytes_kept(rank: int) -> int:
    mesh = mesh_of(1)
    optimizer = Muon(declare([nn.Parameter(local(value, mesh, [Shard(0)])) for value in values()]), 0.02)
    return sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(optimizer))


def test_state_is_cut_as_parameters_are() -> None:
    whole = sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(Muon(declare(plain()), 0.02)))
    assert sum(run_ranks(bytes_kept, 3)) == whole


def asymmetric(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    return _asymmetric(rank, False), _asymmetric(rank, True)


def _asymmetric(rank: int, zeros: bool) -> list[Tensor]:
    """Two axes, the first for experts: those of one coordinate got no tokens, and one rank has no gradient at all."""
    mesh = mesh_of(2)
    placements = WAYS["experts"][1]
    params = [nn.Parameter(local(value, mesh, placements(value.shape))) for value in values()]
    optimizer = Muon(declare(params), 0.02)
    for step in range(2):
        for index, (param, grad) in enumerate(zip(params, gradients(step), strict=True)):
            param.grad = local(grad, mesh, param.placements)  # type: ignore[attr-defined]
            if (len(param.shape) == 3 and mesh.get_local_rank(0) == 1) or (index != 9 and rank == 3) or index == 8:
                param.grad = torch.zeros_like(param) if zeros and index != 8 else None
        optimizer.step()
    return [param.to_local().detach() for param in params]  # type: ignore[attr-defined]


def test_gradients_missing_on_some_ranks_are_zeros_there(on_four: dict[str, list[Any]]) -> None:
    for ours, theirs in on_four["asymmetric"]:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def not_finite(rank: int) -> tuple[bool, float]:
    mesh = mesh_of(2)
    params = [nn.Parameter(local(value, mesh, [Replicate(), Shard(0)])) for value in values()]
    optimizer = Muon(declare(params), 0.02)
    for param, grad in zip(params, gradients(0), strict=True):
        param.grad = local(grad, mesh, param.placements)
    if mesh.get_local_rank(1) == 1:
        params[0].grad.to_local()[-1, -1] = float("nan")  # type: ignore[union-attr]
    optimizer.step()
    return optimizer.last_step_skipped, max(
        local_differences(params, values()), *(t.abs().sum().item() for t in state_tensors(optimizer))
    )


def test_a_shard_that_is_not_finite_stops_all(on_four: dict[str, list[Any]]) -> None:
    assert on_four["not_finite"] == [(True, 0.0)] * 4


def norms(rank: int) -> list[float]:
    found = []
    for name in ("rows", "copies of rows", "experts"):
        axes, placements = WAYS[name]
        mesh = mesh_of(axes)
        params = [nn.Parameter(local(value, mesh, placements(value.shape))) for value in values()]
        optimizer = Muon(declare(params), 0.02)
        train_sharded(params, optimizer, 1, torch.float32)
        found.append(float(optimizer.last_grad_norm))  # type: ignore[arg-type]
    return found


def test_the_norm_counts_copies_once(on_four: dict[str, list[Any]]) -> None:
    norm = torch.cat([grad.flatten() for grad in gradients(0)]).double().norm().item()
    for found in on_four["norms"]:
        assert found == pytest.approx([norm] * 3, rel=1e-6)


def sent(rank: int) -> int:
    """Elements to other ranks in one step."""
    mesh, total = mesh_of(1), [0]
    params = [nn.Parameter(local(value, mesh, [Shard(0)])) for value in values()]
    optimizer = Muon(declare(params), 0.02, ns_dtype=torch.bfloat16)
    plain_function = dist.batch_isend_irecv

    def counted(operations: list[dist.P2POp]) -> Any:
        total[0] += sum(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return plain_function(operations)

    dist.batch_isend_irecv = counted
    train_sharded(params, optimizer, 1, torch.float32)
    dist.batch_isend_irecv = plain_function
    return total[0]


def test_only_matrices_travel_to_one_rank_and_back(on_four: dict[str, list[Any]]) -> None:
    """In bf16, less the share of the rank that works on them; experts stay where they are."""
    matrices = [math.prod(shape) for shape in MATRICES if len(shape) != 3]
    volume = sum(on_four["sent"])
    assert 0.5 * 4 * sum(matrices) < volume <= 0.75 * 4 * sum(matrices) + 4 * 200


REFUSED: dict[str, tuple[tuple[int, ...], tuple[Placement, Placement], str]] = {
    "tensor parallel": ((8, 6), (Shard(1), Shard(0)), "rows or columns are cut by one mesh axis"),
    "rows twice": ((8, 6), (Shard(0), Shard(0)), "rows or columns are cut by one mesh axis"),
    "inside a kernel": ((4, 4, 4, 4), (Replicate(), Shard(2)), "rows or columns are cut by one mesh axis"),
    "partial": ((8, 6), (Replicate(), Partial()), "partial sums"),
    "group": ((8, 6), (Replicate(), Shard(0)), "leave process_group=None"),
    "nothing": ((8, 6), (Replicate(), Shard(0)), ""),
}


def refusals(rank: int) -> dict[str, str]:
    mesh, found = mesh_of(2), {}
    for what, (shape, placements, _) in REFUSED.items():
        cut = tuple(Replicate() if placement.is_partial() else placement for placement in placements)
        value = local(torch.zeros(shape), mesh, cut).to_local()  # type: ignore[attr-defined]
        parameter = nn.Parameter(DTensor.from_local(value, mesh, placements, run_check=False))
        try:
            Muon([parameter], 0.1, process_group=dist.group.WORLD if what == "group" else None)
            found[what] = ""
        except ConfigError as error:
            found[what] = str(error)
    return found


def test_what_cannot_be_exact_is_refused(on_four: dict[str, list[Any]]) -> None:
    for found in on_four["refusals"]:
        for what, (_, _, words) in REFUSED.items():
            assert words in found[what]
            assert bool(words) == bool(found[what])
