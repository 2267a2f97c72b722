"""The state of an optimizer, whole or as ranks hold it, checked before anything changes.

    full_state_dict      whole tensors by parameter name, in torch's keys          any number of ranks loads it
    save_state           the same in a folder: safetensors and JSON                any number of ranks loads it
    sharded_state_dict   what each rank holds of each tensor, by name, for
                         torch.distributed.checkpoint and save_shards              any number of ranks loads it
    state_dict           what each rank holds, in torch's layout                   the same ranks load it again

A full state is {"header", "state": {name: {key: tensor}}, "param_groups": [{"params": names, **options}]}. Keys are those of
torch.optim.Muon ("momentum_buffer", a running mean) and of torch.optim.AdamW ("step", "exp_avg", "exp_avg_sq"). Loading goes
through one plan: rank 0 reads and checks everything, all ranks agree, then every tensor is copied into place, in the dtype
that this optimizer gave it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlkit.errors import CheckpointError, OptimizerStateError
from vlkit.hub.atomic import check_space, write_folder
from vlkit.hub.safetensors_file import MappedFile, read_header, write_safetensors
from vlkit.hub.strict_json import read_json
from vlkit.optim.agree import (
    broadcast_json,
    broadcast_tensor,
    num_ranks_in,
    raise_together,
    rank_in,
    wire_device,
    world,
)
from vlkit.optim.parts import Box, Part, Range, checksum, is_dtensor, local_box
from vlkit.optim.saved_state import (
    VERSION,
    Group,
    Plan,
    State,
    Wanted,
    check_value,
    listed,
    plan_load,
    read_groups,
    restored,
)
from vlkit.optim.update import momentum_dtype_of, shown
from vlkit.optim.variants import STATE_KEY

if TYPE_CHECKING:
    from vlkit.optim.muon import Muon

TENSORS, DESCRIPTION = "optimizer.safetensors", "optimizer.json"
# Options that schedulers change, which a sharded state carries as numbers.
NUMBERS = ("lr", "momentum", "weight_decay", "betas")


@dataclass(frozen=True)
class Slot:
    """One tensor of state.

    Attributes:
        name: Of the parameter.
        key: Of the state, as torch calls it.
        tensor: What this rank holds; written to in place.
        shape: Of the whole.
        held: Of every rank, its runs in the flattened whole; None where `tensor` is the whole or a DTensor.
    """

    name: str
    key: str
    tensor: Tensor
    shape: tuple[int, ...]
    held: Sequence[Sequence[Range]] | None = None

    def part(self, rank: int) -> Tensor:
        """What this rank holds, in a form that says where it lies."""
        return self.tensor if self.held is None else Part(self.tensor, self.shape, tuple(self.held[rank]))


# What an optimizer has


def ranks_of(optimizer: Muon) -> dist.ProcessGroup | None:
    """The ranks that hold this state together; None for a process by itself."""
    if optimizer.process_group is not None:
        return optimizer.process_group
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return world() if any(map(is_dtensor, parameters)) else None


def names_of(optimizer: Muon) -> list[list[str]]:
    """Names of the parameters of each group; "group.place" for those without.

    Raises:
        OptimizerStateError: Two parameters with one name.
    """
    names = [
        list(group.get("param_names") or (f"{index}.{place}" for place in range(len(group["params"]))))
        for index, group in enumerate(optimizer.param_groups)
    ]
    seen: set[str] = set()
    for name in chain.from_iterable(names):
        if name in seen:
            raise OptimizerStateError(f"two parameters are called {name!r}; a state by name needs names of their own")
        seen.add(name)
    return names


def slots_of(optimizer: Muon) -> list[Slot]:
    """Every tensor of state, in the same order on every rank."""
    slots = []
    for group, names in zip(optimizer.param_groups, names_of(optimizer), strict=True):
        for parameter, name in zip(group["params"], names, strict=True):
            for key, tensor in optimizer.state[parameter].items():
                spread = optimizer.process_group is not None and key != STATE_KEY["normuon"]
                if spread and tensor.dim() and parameter.numel():
                    slots.append(Slot(name, key, tensor, tuple(parameter.shape), optimizer.held(parameter)))
                else:
                    slots.append(Slot(name, key, tensor, tuple(tensor.shape)))
    return slots


def header_of(optimizer: Muon) -> dict[str, Any]:
    """What a state says of itself: version, and how momentum is counted."""
    return {
        "version": VERSION,
        "momentum_form": "ema",
        "momentum": [float(group["momentum"]) for group in optimizer.param_groups],
        "skipped_steps": optimizer.skipped_steps,
    }


def layout_of(optimizer: Muon) -> dict[str, Any]:
    """Which part of the state this rank has; plain data, the `layout` of a rank-local state."""
    group, names = ranks_of(optimizer), names_of(optimizer)
    rank = rank_in(group)
    held = {slot.name: [list(run) for run in slot.held[rank]] for slot in slots_of(optimizer) if slot.held is not None}
    return {
        **header_of(optimizer),
        "num_ranks": num_ranks_in(group),
        "rank": rank,
        "names": names,
        "held": held,
    }


# Whole states


@torch.no_grad()
def full_state_dict(optimizer: Muon, *, rank0_only: bool = True) -> dict[str, Any]:
    """Collective. The whole state by parameter name, as copies on the CPU, gathered tensor by tensor.

    Args:
        optimizer: Of one process or of many ranks.
        rank0_only: The other ranks get an empty state, {}. False gives all of it to all.
    """
    group, rank = ranks_of(optimizer), rank_in(ranks_of(optimizer))
    optimizer.check_options()
    state: dict[str, dict[str, Tensor]] = {name: {} for name in chain.from_iterable(names_of(optimizer))}
    for slot in slots_of(optimizer):
        whole = _gather(slot, group)
        if not rank0_only:
            empty = torch.empty(slot.shape, dtype=slot.tensor.dtype)
            whole = broadcast_tensor(empty if whole is None else whole, group)
        if whole is not None:
            state[slot.name][slot.key] = whole
    if rank and rank0_only:
        return {}
    return {"header": header_of(optimizer), "state": state, "param_groups": _options_of(optimizer)}


@torch.no_grad()
def load_full_state_dict(
    optimizer: Muon,
    state: State | Sequence[State] | None,
    *,
    reinitialize: Sequence[str] = (),
    options: bool = True,
) -> None:
    """Collective. Take over a whole state; that of rank 0, the other ranks may give None.

    States of torch.optim.Muon and torch.optim.AdamW load too, also as a list of the two. Their parameters are known by
    name if those optimizers were given named parameters, else by their place. A state that sums gradients instead of averaging
    them (Moonlight, microsoft/dion) says so: {"header": {"momentum_form": "sum"}, ...}; it is multiplied by 1 - momentum.

    Args:
        optimizer: Of one process or of any number of ranks; its tensors keep their dtype, but for the momentum where the
            options that are taken over have another momentum_dtype.
        state: From full_state_dict, or of torch's optimizers.
        reinitialize: Regular expressions, searched in parameter names. What they match begins anew, whatever the state has.
        options: Take over learning rates and the other options of the groups, which then must be the same groups. False
            keeps those of this optimizer, and parameters may be grouped otherwise.

    Raises:
        OptimizerStateError: Missing or foreign parameters, another algorithm, other shapes, values that are not finite.
            Nothing is changed, on no rank.
    """
    group, slots = ranks_of(optimizer), slots_of(optimizer)
    plan: Plan | None = None
    failure: Exception | None = None
    if rank_in(group) == 0:
        try:
            if state is None:
                raise OptimizerStateError("rank 0 has no state to load")
            states = [state] if isinstance(state, Mapping) else list(state)
            plan = plan_load(states, _wanted(optimizer, slots), reinitialize=reinitialize, options=options)
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            failure = error
    raise_together(failure, group)
    told = broadcast_json(
        plan
        and {
            "loaded": list(plan.values),
            "groups": [_to_json(options) for options in plan.groups],
            "skipped_steps": plan.skipped_steps,
        },
        group,
    )
    loaded = set(told["loaded"])
    slots = _take_options(optimizer, told["groups"])
    for slot in slots:
        if slot.name in loaded:
            _fill(slot, plan.values[slot.name][slot.key] if plan else None, group)
        else:
            slot.tensor.zero_()
    optimizer.skipped_steps = told["skipped_steps"]


def _wanted(optimizer: Muon, slots: Sequence[Slot], *, local: bool = False) -> Wanted:
    from vlkit.optim.muon import check_group

    shapes: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in chain.from_iterable(names_of(optimizer))}
    for slot in slots:
        shapes[slot.name][slot.key] = tuple(slot.tensor.shape) if local else slot.shape

    def check_options(group: Group) -> None:
        check_group({key: value for key, value in group.items() if key in optimizer.defaults}, optimizer.defaults)

    return Wanted(optimizer.param_groups, names_of(optimizer), shapes, check_options)


def _gather(slot: Slot, group: dist.ProcessGroup | None) -> Tensor | None:
    """Collective. The whole tensor, as a copy on the CPU of rank 0; None elsewhere."""
    rank = rank_in(group)
    if slot.held is None:
        tensor = slot.tensor.full_tensor() if is_dtensor(slot.tensor) else slot.tensor
        return tensor.detach().to("cpu", copy=True) if rank == 0 else None
    assert group is not None
    device = wire_device(group)
    if rank:
        if slot.tensor.numel():
            dist.send(slot.tensor.to(device).contiguous(), group=group, group_dst=0)
        return None
    flat = torch.empty(slot.shape, dtype=slot.tensor.dtype).view(-1)
    for source, runs in enumerate(slot.held):
        count = sum(stop - start for start, stop in runs)
        if source == 0:
            held = slot.tensor
        elif count:
            held = torch.empty(count, dtype=slot.tensor.dtype, device=device)
            dist.recv(held, group=group, group_src=source)
        for (start, stop), values in _runs(runs, held if count else flat[:0]):
            flat[start:stop].copy_(values)
    return flat.view(slot.shape)


def _fill(slot: Slot, value: Tensor | None, group: dist.ProcessGroup | None) -> None:
    """Collective. Copy what this rank holds from the whole tensor of rank 0."""
    dtype = slot.tensor.dtype
    if value is not None:
        value = value.to(dtype)
    if group is not None:
        device = wire_device(group)
        value = torch.empty(slot.shape, dtype=dtype, device=device) if value is None else value.to(device)
        value = broadcast_tensor(value, group)
    assert value is not None
    if slot.held is not None:
        for (start, stop), target in _runs(slot.held[rank_in(group)], slot.tensor):
            target.copy_(value.reshape(-1)[start:stop])
    elif is_dtensor(slot.tensor):
        box = local_box(slot.tensor)
        slot.tensor.to_local().copy_(box.of(value, Box((0,) * value.dim(), tuple(value.shape))))
    else:
        slot.tensor.copy_(value)


def _runs(runs: Sequence[Range], held: Tensor) -> Iterable[tuple[Range, Tensor]]:
    return zip(runs, held.split([stop - start for start, stop in runs]) if runs else (), strict=True)


# Options as plain data


def _options_of(optimizer: Muon) -> list[Group]:
    return [
        {**{key: value for key, value in group.items() if key not in ("params", "param_names")}, "params": names}
        for group, names in zip(optimizer.param_groups, names_of(optimizer), strict=True)
    ]


def plain(value: Any) -> Any:
    """An option as torch's tools for states take it: dtypes and functions by name. `restored` makes dtypes of names again."""
    return str(value) if isinstance(value, torch.dtype) else shown(value)


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(entry) for entry in value]
    return value.item() if isinstance(value, Tensor) else plain(value)


def _take_options(optimizer: Muon, saved: Sequence[Group]) -> list[Slot]:
    """Take over the options of all groups, and let the momentum have the dtype that they say; what is to be filled."""
    for group, options in zip(optimizer.param_groups, saved, strict=True):
        _adopt(group, options)
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if "momentum_buffer" in state:
                dtype = momentum_dtype_of(parameter.dtype, group["momentum_dtype"])
                state["momentum_buffer"] = state["momentum_buffer"].to(dtype)
    optimizer.check_options(loaded=True)
    return slots_of(optimizer)


def _adopt(own: Group, options: Group) -> None:
    """Take over options, with dtypes, tuples and a tensor as learning rate where this optimizer has them."""
    for key, value in options.items():
        value = restored(value)
        own[key] = torch.as_tensor(value).to(own[key]) if isinstance(own.get(key), Tensor) else value


# Rank-local states, in torch's layout


@torch.no_grad()
def load_rank_state(optimizer: Muon, state: State) -> None:
    """Collective. Take over what this rank holds, as state_dict() gave it; or, in one process, a state of torch.optim.Muon or
    torch.optim.AdamW.

    Raises:
        OptimizerStateError: It does not fit; nothing is changed, on no rank.
    """
    slots = slots_of(optimizer)
    plan: Plan | None = None
    failure: Exception | None = None
    try:
        read_groups(state)
        _check_layout(layout_of(optimizer), state)
        plan = plan_load([state], _wanted(optimizer, slots, local=True))
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        failure = error
    raise_together(failure, ranks_of(optimizer))
    assert plan is not None
    for slot in _take_options(optimizer, plan.groups):
        slot.tensor.copy_(plan.values[slot.name][slot.key])
    optimizer.skipped_steps = plan.skipped_steps


def _check_layout(own: dict[str, Any], state: State) -> None:
    """Whether a rank-local state is that of this rank, of as many, with parameters in the same order."""
    layout = state.get("layout", {})
    if not layout and own["held"]:
        raise OptimizerStateError(
            "the saved state has no layout, so it cannot be told which part of the state it is; over ranks, save "
            "state_dict(), sharded_state_dict() or full_state_dict() of this optimizer"
        )
    for key in ("num_ranks", "rank") if layout else ():
        if layout[key] != own[key]:
            raise OptimizerStateError(
                f"the saved state has {key}={layout[key]}, here {key}={own[key]}: state_dict() loads on the same ranks; "
                f"full_state_dict() and sharded_state_dict() load on any number"
            )
    saved_groups = state.get("param_groups", ())
    if len(saved_groups) != len(own["names"]):
        raise OptimizerStateError(
            f"the saved state has {len(saved_groups)} groups, this optimizer has {len(own['names'])}"
        )
    for index, (saved, names) in enumerate(zip(saved_groups, own["names"], strict=True)):
        if len(saved["params"]) != len(names):
            raise OptimizerStateError(
                f"group {index}: the saved state has {len(saved['params'])} parameters, this optimizer has {len(names)}"
            )
        for theirs, ours in zip(saved.get("param_names", ()), names, strict=False):
            if theirs != ours:
                raise OptimizerStateError(
                    f"group {index}: the saved state has parameter {theirs!r} where this optimizer has {ours!r}; build the "
                    f"groups in the same order, or load a full state"
                )
    for name in own["held"] if layout else ():
        if layout["held"].get(name) != own["held"][name]:
            raise OptimizerStateError(
                f"{name}: the saved state holds elements {layout['held'].get(name)}, this rank holds {own['held'][name]}: "
                f"another order or partition; load a full or sharded state"
            )


# Sharded states


def sharded_state_dict(optimizer: Muon) -> dict[str, Tensor]:
    """What this rank holds of every tensor, under one flat name on all ranks. Values share memory with the state; to load,
    have them filled in place, then call load_sharded_state_dict.

    Tensors are called as torch calls them, "state.<parameter>.<key>". They are plain in one process, DTensors where the
    parameters are, and Parts under ZeRO-1. Options that change in training come as tensors in fp64,
    "param_groups.<index>.<option>".

    vlkit.training.save_shards and load_shards take all of them, on any number of ranks, and let one form be loaded as any
    other. torch.distributed.checkpoint, with HuggingFaceStorageWriter(folder, save_distributed=True) and
    HuggingFaceStorageReader, where nothing is pickled, takes plain tensors and DTensors, on any number of ranks, and Parts of
    partition="flat", on any number of ranks under ZeRO-1, one rank included.
    """
    optimizer.check_options()
    rank = rank_in(ranks_of(optimizer))
    tensors: dict[str, Tensor] = {f"state.{slot.name}.{slot.key}": slot.part(rank) for slot in slots_of(optimizer)}
    for index, group in enumerate(optimizer.param_groups):
        for key in NUMBERS:
            tensors[f"param_groups.{index}.{key}"] = torch.as_tensor(group[key], dtype=torch.float64).cpu().clone()
    tensors["header.version"] = torch.tensor(VERSION)
    tensors["header.skipped_steps"] = torch.tensor(optimizer.skipped_steps)
    return tensors


@torch.no_grad()
def load_sharded_state_dict(optimizer: Muon, state: Mapping[str, Tensor]) -> None:
    """Collective. Take over a sharded state that was filled in place, and the options that it has.

    Raises:
        OptimizerStateError: Other names, or values that are not finite; those values are in place already.
    """
    group, failure = ranks_of(optimizer), None
    try:
        _take_sharded(optimizer, state)
    except OptimizerStateError as error:
        failure = error
    raise_together(failure, group)


def _take_sharded(optimizer: Muon, state: Mapping[str, Tensor]) -> None:
    own = sharded_state_dict(optimizer)
    missing, foreign = [name for name in own if name not in state], [name for name in state if name not in own]
    if missing or foreign:
        raise OptimizerStateError(
            f"the sharded state has {len(state)} entries, this optimizer {len(own)}: missing {listed(missing)}; "
            f"foreign {listed(foreign)}"
        )
    if int(_local(state["header.version"])) != VERSION:
        raise OptimizerStateError(
            f"the sharded state has version {int(_local(state['header.version']))}, this release reads {VERSION}"
        )
    for name, target in own.items():
        if name.startswith("state."):
            key = name.rpartition(".")[2]
            source, local = _local(state[name]), _local(target)
            check_value(name.removeprefix("state."), key, source, tuple(local.shape))
            if source.data_ptr() != local.data_ptr():
                local.copy_(source)
    for index, options in enumerate(optimizer.param_groups):
        for key in NUMBERS:
            options_found = _local(state[f"param_groups.{index}.{key}"]).tolist()
            _adopt(options, {key: options_found})
    optimizer.check_options(loaded=True)
    optimizer.skipped_steps = int(_local(state["header.skipped_steps"]))


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Part):
        return tensor.local
    return tensor.to_local() if is_dtensor(tensor) else tensor


# Consolidated files


@torch.no_grad()
def save_state(optimizer: Muon, folder: Path | str) -> Path:
    """Collective. Publish the whole state in a folder, as safetensors and JSON, whole or not at all.

    Rank 0 writes, and asks for one tensor after another, so that no rank ever has more than one whole tensor. Any number of
    ranks loads it. Other files in the folder are kept.

    Args:
        optimizer: Of one process or of many ranks.
        folder: Of its own, or that of a saved model; of rank 0.

    Returns:
        The folder.

    Raises:
        DiskFullError: Not enough space; an older state in the folder is whole. Raised on all ranks, like what follows.
        CheckpointError: The folder cannot be written.
    """
    optimizer.check_options()
    group, slots = ranks_of(optimizer), slots_of(optimizer)
    folder = Path(folder)
    if rank_in(group):
        while (wanted := broadcast_json(None, group)) is not None:
            _gather(slots[wanted], group)
        raise_together(None, group)
        return folder
    failure: Exception | None = None
    try:
        folder = _write_state(optimizer, slots, folder, group)
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        failure = error
    broadcast_json(None, group)
    raise_together(failure, group)
    return folder


def _write_state(optimizer: Muon, slots: Sequence[Slot], folder: Path, group: dist.ProcessGroup | None) -> Path:
    places = {f"{slot.name}.{slot.key}": index for index, slot in enumerate(slots)}
    layout = [(name, slots[index].tensor.dtype, slots[index].shape) for name, index in places.items()]
    checksums: dict[str, int] = {}

    def read(name: str) -> Tensor:
        broadcast_json(places[name], group)
        whole = _gather(slots[places[name]], group)
        assert whole is not None
        checksums[name] = checksum(whole)
        return whole

    def write(new: Path) -> None:
        check_space(new, sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in layout), f"saving to {folder}")
        write_safetensors(new / TENSORS, layout, read, metadata={"format": "pt"})
        description = {
            "header": header_of(optimizer),
            "param_groups": [_to_json(options) for options in _options_of(optimizer)],
            "checksums": checksums,
        }
        (new / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")

    return write_folder(folder, write, replaces=lambda name: name in (TENSORS, DESCRIPTION))


def load_state(optimizer: Muon, folder: Path | str, reinitialize: Sequence[str] = (), *, options: bool = True) -> None:
    """Collective. Take over a state that save_state has written; rank 0 reads it.

    Args:
        optimizer: Of one process or of any number of ranks.
        folder: As given to save_state.
        reinitialize: As for load_full_state_dict, and so is `options`.

    Raises:
        OptimizerStateError: It is damaged, or does not fit; nothing is changed, on no rank.
    """
    group, state, failure = ranks_of(optimizer), None, None
    if rank_in(group) == 0:
        try:
            state = read_state_files(Path(folder))
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            failure = error
    raise_together(failure, group)
    load_full_state_dict(optimizer, state, reinitialize=reinitialize, options=options)


def read_state_files(folder: Path) -> dict[str, Any]:
    """A full state from a folder; its tensors are views of the mapped file.

    Raises:
        OptimizerStateError: Files are missing, truncated, damaged, or do not belong together.
    """
    description = read_json(folder / DESCRIPTION, error=OptimizerStateError)
    try:
        file = MappedFile(read_header(folder / TENSORS))
    except (CheckpointError, OSError) as bad:
        raise OptimizerStateError(f"{folder}: the optimizer state cannot be read: {bad}") from bad
    checksums = description.get("checksums")
    if not isinstance(checksums, dict) or set(checksums) != set(file.header.tensors):
        raise OptimizerStateError(
            f"{folder}: {DESCRIPTION} and {TENSORS} list different tensors; they are of different saves"
        )
    state: dict[str, dict[str, Tensor]] = {}
    for stored in file.header.tensors:
        tensor = file.read(stored)
        if checksum(tensor) != checksums[stored]:
            raise OptimizerStateError(
                f"{folder / TENSORS}: {stored!r} has another checksum than when it was saved: it is damaged"
            )
        name, _, key = stored.rpartition(".")
        state.setdefault(name, {})[key] = tensor
    try:
        groups = [
            {key: value if key == "params" else restored(value) for key, value in group.items()}
            for group in description["param_groups"]
        ]
    except (KeyError, TypeError, AttributeError) as bad:
        raise OptimizerStateError(f"{folder / DESCRIPTION}: param_groups cannot be understood: {bad!r}") from None
    return {"header": description.get("header", {}), "state": state, "param_groups": groups}
