"""State over ranks: saved by some, loaded by another number of them, in another partition; the same bits as one process."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing import assert_close

from tests.ranks import run_ranks
from vlkit.errors import DiskFullError, OptimizerStateError
from vlkit.optim import Muon, load_state, muon_param_groups, save_state
from vlkit.training.sharded_files import load_shards, save_shards

# The first is larger than what one of four ranks holds; units of all kinds straddle; one parameter is empty.
MUON = {"large": (40, 33), "experts": (5, 7, 6), "tall": (31, 4), "wide": (3, 29), "conv": (6, 2, 3, 3)}
ADAMW = {"norm": (7,), "embed": (13, 5), "scale": (), "empty": (0, 4)}
ROWS = ("tall", "conv")  # with a second moment for each of their rows, too
FP32 = {"ns_dtype": torch.float32}
Weights = dict[str, Tensor]


def start(dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).mul(0.1).to(dtype) for name, shape in {**MUON, **ADAMW}.items()
    }


def place(tensor: Tensor, form: str) -> Tensor:
    """Scalars and empty tensors stay plain: fully_shard does not take them."""
    if form != "dtensor" or not (tensor.dim() and tensor.numel()):
        return tensor.clone()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(tensor, mesh, [Shard(0)])


def build(
    form: str, weights: Weights, lr: float = 0.01, rows: Sequence[str] = ROWS
) -> tuple[Muon, dict[str, nn.Parameter]]:
    """In one process, under ZeRO-1 ("flat" or "matrix"), or of DTensors."""
    params = {name: nn.Parameter(place(weight, form)) for name, weight in weights.items()}
    groups = [
        {"params": [(name, params[name]) for name in weights if name in MUON and name not in rows], **FP32},
        {"params": [(name, params[name]) for name in weights if name in rows], "variant": "normuon", **FP32},
        {"params": [(name, params[name]) for name in weights if name in ADAMW], "algorithm": "adamw", "lr": lr / 5},
    ]
    options: dict[str, Any] = {}
    if form in ("flat", "matrix"):
        options = {"process_group": dist.group.WORLD, "partition": form}
    return Muon([group for group in groups if group["params"]], lr, **options), params


def train(optimizer: Muon, params: dict[str, nn.Parameter], first: int, steps: int = 5) -> None:
    for step in range(first, first + steps):
        for index, (name, weight) in enumerate(start().items()):
            generator = torch.Generator().manual_seed(1000 * step + index)
            grad = torch.randn(weight.shape, generator=generator).to(params[name].dtype)
            params[name].grad = place(grad, "dtensor" if isinstance(params[name], DTensor) else "plain")
        optimizer.step()


def values(params: dict[str, nn.Parameter]) -> Weights:
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in params.items()}


def save(optimizer: Muon, way: str, folder: Path) -> None:
    if way == "full":
        state = optimizer.full_state_dict()
        if state:
            torch.save(state, folder)
    elif way == "files":
        save_state(optimizer, folder)
    elif way == "shards":
        save_shards(folder, optimizer.sharded_state_dict())
    elif way == "dcp":
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(optimizer.sharded_state_dict(), storage_writer=writer, no_dist=not dist.is_initialized())


def load(optimizer: Muon, way: str, folder: Path) -> None:
    if way == "full":
        first = not dist.is_initialized() or dist.get_rank() == 0
        optimizer.load_full_state_dict(torch.load(folder, weights_only=True) if first else None)
    elif way == "files":
        load_state(optimizer, folder)
    else:
        state = optimizer.sharded_state_dict()
        if way == "shards":
            load_shards(folder, state)
        else:
            reader = HuggingFaceStorageReader(str(folder))
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
        optimizer.load_sharded_state_dict(state)


def leg(
    _: int,
    expected: Weights,
    form: str,
    ways: list[str],
    weights: Weights,
    source: Path | None,
    target: Path | None,
    first: int,
) -> None:
    """Load, train five steps, save: the same in every way, and with the same end."""
    for way in ways:
        optimizer, params = build(form, weights, lr=0.01 if source is None else 0.5)
        if source is not None:
            load(optimizer, way, source / way)
        train(optimizer, params, first)
        if target is not None:
            target.mkdir(exist_ok=True)
            save(optimizer, way, target / way)
        assert_close(values(params), expected, rtol=0, atol=0)


def run(
    ranks: int,
    form: str,
    ways: list[str],
    weights: Weights,
    source: Path | None,
    target: Path | None,
    first: int,
) -> Weights:
    """Returns what weights are afterwards, the same on all ranks."""
    expected = uninterrupted(first + 5, weights["large"].dtype)
    args = (expected, form, ways, weights, source, target, first)
    if form == "one":
        leg(0, *args)
    else:
        run_ranks(leg, ranks, *args)
    return expected


@cache
def uninterrupted(steps: int, dtype: torch.dtype = torch.float32) -> Weights:
    optimizer, params = build("one", start(dtype))
    train(optimizer, params, 0, steps)
    return values(params)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch.distributed.checkpoint, in one process
@pytest.mark.parametrize("form", ["flat", pytest.param("matrix", marks=pytest.mark.slow), "dtensor"])
def test_four_ranks_go_on_as_any_number(tmp_path: Path, form: str) -> None:
    """Five steps on four ranks, five on 2, 3 and 1: on every rank bit for bit ten steps of one process.

    torch.distributed.checkpoint writes safetensors, where nothing is pickled; for it, one rank of ZeRO-1 is a group of one.
    """
    ways = ["full", "files", "shards", *(["dcp"] if form != "matrix" else [])]
    weights = run(4, form, ways, start(), None, tmp_path, 0)
    if "dcp" in ways:
        assert {path.suffix for path in (tmp_path / "dcp").iterdir()} == {".safetensors"}
    for ranks, other, same in ((2, form, ways), (3, form, ways), (1, "one", ways if form == "dtensor" else ways[:3])):
        run(ranks, other, same, weights, tmp_path, None, 5)
    if form == "flat":
        run(1, form, ["dcp"], weights, tmp_path, None, 5)


def test_one_two_four_three_one(tmp_path: Path) -> None:
    """Another form on every leg, from ZeRO-1 to FSDP2 and back; state of bf16 parameters stays fp32."""
    weights, source, ways = start(torch.bfloat16), None, ["files", "shards"]
    for index, (ranks, form) in enumerate([(1, "one"), (2, "flat"), (4, "matrix"), (3, "dtensor"), (1, "flat")]):
        target = tmp_path / str(index)
        weights = run(ranks, form, ways, weights, source, target, 5 * index)
        source = target
    for way in ways:
        optimizer, params = build("one", weights)
        load(optimizer, way, target / way)
        assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
        assert optimizer.state[params["norm"]]["step"] == 25


def save_runs(_: int, folder: Path) -> str:
    optimizer, _params = build("matrix", start())
    try:
        save(optimizer, "dcp", folder)
    except CheckpointException as error:
        return str(error)
    return ""


def test_torch_distributed_checkpoint_is_not_given_what_it_would_lose(tmp_path: Path) -> None:
    """A rank that holds two experts apart has two pieces of one tensor; its writer would keep the last."""
    assert all("runs of it" in words for words in run_ranks(save_runs, 3, tmp_path / "saved"))


# What a rank has, and what it must not take for the whole


def rank_state(rank: int, folder: Path) -> None:
    for form in ("flat", "matrix", "dtensor"):
        optimizer, params = build(form, start())
        train(optimizer, params, 0)
        torch.save(optimizer.state_dict(), folder / f"{form}{rank}.pt")
        again, copies = build(form, start(), lr=0.5)
        again.load_state_dict(torch.load(folder / f"{form}{rank}.pt", weights_only=form != "dtensor"))
        for name, param in params.items():
            for key, value in optimizer.state[param].items():
                assert torch.equal(local(again.state[copies[name]][key]), local(value)), (form, name, key)
        assert again.param_groups[0]["lr"] == 0.01


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def rank_states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of three ranks has, as state_dict() gives it; it loads on the same ranks again."""
    folder: Path = tmp_path_factory.mktemp("states")
    run_ranks(rank_state, 3, folder)
    return folder


def refuse(rank: int, folder: Path, cases: list[tuple[str, str]]) -> list[str]:
    """States of three ranks in flat partition, loaded otherwise."""
    said = []
    for form, change in cases:
        optimizer, params = build(form, start())
        state = torch.load(folder / f"flat{(rank + (change == 'neighbour')) % 3}.pt", weights_only=True)
        if change == "rank 1" and rank == 1:
            state["state"][0]["momentum_buffer"][0] = float("nan")
        if change == "bare":
            del state["layout"]
        before = copy.deepcopy({name: dict(optimizer.state[param]) for name, param in params.items()})
        try:
            optimizer.load_state_dict(state)
            said.append("")
        except OptimizerStateError as error:
            said.append(str(error))
        assert_close({name: dict(optimizer.state[param]) for name, param in params.items()}, before, rtol=0, atol=0)
    return said


def test_rank_local_states_are_not_taken_for_others(rank_states: Path) -> None:
    """Another number of ranks, another rank, another partition, no layout; and what one rank refuses, all refuse."""
    assert "num_ranks=3, here num_ranks=1" in refuse(0, rank_states, [("one", "")])[0]
    for (words,) in run_ranks(refuse, 2, rank_states, [("flat", "")]):
        assert "num_ranks=3, here num_ranks=2" in words
    cases = [("flat", "neighbour"), ("matrix", ""), ("flat", "bare"), ("flat", "rank 1")]
    for rank, said in enumerate(run_ranks(refuse, 3, rank_states, cases)):
        assert f"rank={(rank + 1) % 3}, here rank={rank}" in said[0]
        assert "another order or partition" in said[1]
        assert "no layout" in said[2]
        assert "large: the saved momentum_buffer has 1 of" in said[3]
        assert said[3].startswith("rank 1: ") == (rank != 1)


def whole(rank: int) -> dict[str, Any]:
    found = {}
    for form in ("flat", "matrix", "dtensor"):
        optimizer, params = build(form, start())
        train(optimizer, params, 0)
        for everyone in (False, True):
            found[form, everyone] = optimizer.full_state_dict(rank0_only=not everyone)
    return found


def test_a_full_state_has_what_all_ranks_hold() -> None:
    """Not only the buffers of the rank that is asked. Only rank 0 has it, unless asked otherwise."""
    optimizer, params = build("one", start())
    train(optimizer, params, 0)
    expected = optimizer.full_state_dict()["state"]
    for rank, found in enumerate(run_ranks(whole, 3)):
        for (_, everyone), state in found.items():
            if rank and not everyone:
                assert state == {}
            else:
                assert_close(state["state"], expected, rtol=0, atol=0)


# Other optimizers, damage


def take_torch(rank: int, states: Any) -> list[dict[str, Any]]:
    found = []
    for form in ("flat", "matrix", "dtensor"):
        optimizer, _ = build(form, start(), rows=())
        optimizer.load_full_state_dict(states if rank == 0 else None)
        assert optimizer.param_groups[0]["adjust_lr"] == "original"
        assert optimizer.param_groups[-1]["lr"] == 0.004
        found.append(optimizer.full_state_dict().get("state", {}))
    return found


def test_states_of_torch_optimizers_load_over_ranks() -> None:
    params = {name: nn.Parameter(weight.clone()) for name, weight in start().items()}
    muon = torch.optim.Muon([(name, params[name]) for name in MUON if params[name].dim() == 2], 0.02)
    adamw = torch.optim.AdamW([(name, params[name]) for name in ADAMW], 0.004)
    for param in params.values():
        param.grad = torch.ones(param.shape)
    muon.step()
    adamw.step()
    states = [muon.state_dict(), adamw.state_dict()]
    # torch.optim.Muon takes matrices only; what it would keep for the others is added by hand.
    for name in ("experts", "conv"):
        place_ = len(states[0]["state"])
        states[0]["state"][place_] = {"momentum_buffer": torch.full(MUON[name], 0.5)}
        states[0]["param_groups"][0]["params"].append(place_)
        states[0]["param_groups"][0]["param_names"].append(name)
    for found in run_ranks(take_torch, 3, states)[0]:
        for name in ("large", "tall", "wide"):
            assert torch.equal(found[name]["momentum_buffer"], muon.state[params[name]]["momentum_buffer"])
        assert found["experts"]["momentum_buffer"].eq(0.5).all()
        assert torch.equal(found["embed"]["exp_avg_sq"], adamw.state[params["embed"]]["exp_avg_sq"])


def refuse_full(rank: int, folder: Path) -> list[str]:
    said = []
    for form in ("flat", "dtensor"):
        optimizer, params = build(form, start())
        train(optimizer, params, 0, 1)
        before = optimizer.full_state_dict(rank0_only=False)
        state = copy.deepcopy(before)
        state["state"]["large"]["momentum_buffer"][0, 0] = float("inf")
        for attempt in (partial(optimizer.load_full_state_dict, state), partial(load_state, optimizer, folder)):
            with pytest.raises(OptimizerStateError) as failure:
                attempt()
            said.append(str(failure.value))
        assert_close(optimizer.full_state_dict(rank0_only=False)["state"], before["state"], rtol=0, atol=0)
    return said


def test_what_rank_0_finds_stops_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(refuse_full, 2, tmp_path)
    assert all("large: the saved momentum_buffer has 1 of 1320 values" in words for words in first[::2])
    assert all("no such file" in words for words in first[1::2])
    assert second == [f"rank 0: {words}" for words in first]


def save_on_a_full_disk(rank: int, form: str, folder: Path) -> str:
    """The disk of rank 0 fills up between two tensors, while the other ranks wait for the next."""
    import errno

    from vlkit.optim import state as module

    optimizer, params = build(form, start())
    train(optimizer, params, 0, 1)
    save_state(optimizer, folder)
    train(optimizer, params, 1, 1)
    write = module.write_safetensors

    def fill(path: Path, layout: Any, read: Any, **options: Any) -> None:
        count = 0

        def one_more(name: str) -> Tensor:
            nonlocal count
            count += 1
            if count == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            return read(name)

        write(path, layout, one_more, **options)

    module.write_safetensors = fill  # type: ignore[assignment]
    try:
        save_state(optimizer, folder)
    except DiskFullError as error:
        return str(error)
    return ""


def test_a_full_disk_is_told_to_all_ranks_and_keeps_the_old_state(tmp_path: Path) -> None:
    first, second = run_ranks(save_on_a_full_disk, 2, "flat", tmp_path / "state")
    assert "no space left" in first
    assert second == f"rank 0: {first}"
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]
    optimizer, params = build("one", start())
    load_state(optimizer, tmp_path / "state")
    assert optimizer.state[params["norm"]]["step"] == 1


# torch.distributed.checkpoint.state_dict


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(5, 7), nn.Linear(7, 9), nn.Linear(9, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.embed(ids))))


def through_torch(rank: int) -> None:
    def made() -> tuple[Net, Muon]:
        torch.manual_seed(0)
        net = fully_shard(Net())
        return net, Muon(muon_param_groups(net), 0.01, **FP32)

    net, optimizer = made()
    net(torch.arange(4)).square().mean().backward()
    optimizer.step()
    for options in (StateDictOptions(), StateDictOptions(full_state_dict=True)):
        state = get_optimizer_state_dict(net, optimizer, options=options)
        other_net, other = made()
        set_optimizer_state_dict(other_net, other, state, options=options)
        for (name, ours), theirs in zip(net.named_parameters(), other_net.parameters(), strict=True):
            for key, value in optimizer.state[ours].items():
                assert torch.equal(local(other.state[theirs][key]), local(value)), (name, key)
                assert isinstance(other.state[theirs][key], DTensor) == isinstance(value, DTensor)


def test_torch_gets_and_sets_the_state_of_a_sharded_model() -> None:
    """get_optimizer_state_dict and set_optimizer_state_dict, in shards and whole."""
    run_ranks(through_torch, 2)
