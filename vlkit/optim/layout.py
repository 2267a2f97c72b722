"""How the parameters of an optimizer lie over ranks, and what follows for one rank: made once, used at every step.

one process      every rank's holding is everything
process_group    ZeRO-1: parameters on every rank, elements of the state dealt out; gradients averaged before or here
DTensors         FSDP2: parameters, gradients and state in equal shards
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vlkit.errors import ConfigError
from vlkit.optim import collectives
from vlkit.optim.agree import gather_json
from vlkit.optim.dtensor import axes_of, copies_of, first_element, holdings_of, like_parameter, local_of
from vlkit.optim.partition import Bucket, Held, Holding, Place, SplitStrategy, deal_flat, deal_spans, holding_of
from vlkit.optim.parts import is_dtensor
from vlkit.optim.units import Span, Units, cut_of, spans_of, units_of
from vlkit.optim.update import Block, shown
from vlkit.optim.variants import STATE_KEY, row_places


class Member(NamedTuple):
    """A parameter with elements, its name, and the group of the optimizer that it is in."""

    parameter: Tensor
    name: str
    group: dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """What this rank holds of every parameter.

    Attributes:
        members: All parameters, in the order of the groups.
        holdings: Of each parameter.
        sharing: The ranks with which this one shares units of a parameter, where it does.
        buckets: Under ZeRO-1, parameters dealt out together.
        group: Under ZeRO-1, all ranks.
        axes: Groups along which to sum, one after the other, for a sum over all ranks; none in one process.
        weight: Of this rank's elements of a parameter in such a sum: one over the number of ranks that hold them too.
    """

    members: tuple[Member, ...]
    holdings: Mapping[Tensor, Holding]
    sharing: Mapping[Tensor, dist.ProcessGroup] = field(default_factory=dict)
    buckets: tuple[Bucket, ...] = ()
    group: dist.ProcessGroup | None = None
    axes: tuple[dist.ProcessGroup, ...] = ()
    weight: Mapping[Tensor, float] = field(default_factory=dict)
    _memory: dict[Tensor, Memory] = field(default_factory=dict)

    @cached_property
    def held(self) -> dict[Tensor, Held]:
        """Under ZeRO-1, what every rank holds of each parameter."""
        return {p: held for bucket in self.buckets for p, held in zip(bucket.parameters, bucket.held, strict=True)}

    @property
    def device(self) -> torch.device:
        return self.members[0].parameter.device

    def zeros(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """For state of what this rank holds of a parameter."""
        if is_dtensor(parameter):
            local = local_of(parameter)
            return like_parameter(torch.zeros(local.shape, dtype=dtype, device=local.device), parameter)
        dealt_out = self.group is not None and parameter.numel()
        shape = (self.holdings[parameter].numel,) if dealt_out else parameter.shape
        return torch.zeros(shape, dtype=dtype, device=parameter.device)

    def piece(self, member: Member, grad: Tensor | None, state: dict[str, Tensor]) -> Piece:
        """A parameter for one step; without a gradient here, it is zeros."""
        parameter, _, group = member
        memory = self._memory.get(parameter)
        if memory is None or not memory.is_that_of(parameter, state):
            memory = Memory.of(parameter, self.holdings[parameter], state)
            if not memory.copied:
                self._memory[parameter] = memory
        if grad is None:
            numel = memory.holding.numel
            grad = memory.weight.new_zeros(numel if self.group is not None else memory.weight.shape)
        return Piece(parameter, group, memory, grad)

    # Gradients

    def local_gradients(self) -> list[Tensor | None]:
        """Of what this rank holds of every parameter; contiguous."""
        grads: list[Tensor | None] = []
        for parameter, name, _ in self.members:
            grad = _checked_gradient(parameter, name)
            if grad is not None and self.group is not None:
                ranges = [grad.view(-1)[start:stop] for start, stop in self.holdings[parameter].ranges]
                grad = ranges[0] if len(ranges) == 1 else torch.cat([grad.new_empty(0), *ranges])
            grads.append(grad)
        return grads

    def reduce_scatter(self, factor: float) -> list[Tensor | None]:
        """The mean over all ranks of their gradients times factor, of what this rank holds; fp32 or fp64."""
        assert self.group is not None
        found: dict[Tensor, Tensor] = {}
        names = {member.parameter: member.name for member in self.members}
        for bucket in self.buckets:
            grads = [_checked_gradient(parameter, names[parameter]) for parameter in bucket.parameters]
            means = collectives.reduce_scatter(grads, bucket, factor, self.group)
            found.update(zip(bucket.parameters, means, strict=True))
        return [found[member.parameter] for member in self.members]

    def sum_of_squares(self, grads: Sequence[Tensor | None], *, exact: bool) -> Tensor:
        """Over the gradients of this rank, each element counted as 1 / number of ranks that have it.

        Args:
            grads: Of what this rank holds.
            exact: Add up in fp64, which takes twice as long: large values do not overflow, nor does it show who has added
                up what.
        """
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        found = [
            (grad, self.weight.get(member.parameter, 1.0))
            for member, grad in zip(self.members, grads, strict=True)
            if grad is not None and grad.numel()
        ]
        if not found:
            return torch.zeros((), dtype=wide, device=self.device)
        dtype = wide if exact or any(grad.dtype == torch.float64 for grad, _ in found) else torch.float32
        norms = torch._foreach_norm([grad for grad, _ in found], 2, dtype=dtype)
        device = self.device
        squares = torch.stack([norm if norm.device == device else norm.to(device) for norm in norms]).to(wide).square()
        return (squares * squares.new_tensor([weight for _, weight in found])).sum()

    def sum_over_ranks(self, square: Tensor, found_inf: Tensor | None, present: Sequence[bool]) -> list[float]:
        """[square, found_inf, number of ranks that have each gradient], summed over all ranks: one message."""
        flags = torch.tensor([0.0, *map(float, present)], dtype=square.dtype, device=square.device)
        if found_inf is not None:
            flags[0] = found_inf.to(square.device)
        totals = torch.cat([square.view(1), flags])
        for group in self.axes:
            dist.all_reduce(totals, group=group)
        return totals.tolist()

    # Parameters and state

    def all_gather(self) -> None:
        """Under ZeRO-1, bring all parameters up to date on all ranks."""
        for bucket in self.buckets:
            assert self.group is not None
            flat = [parameter.detach().contiguous() for parameter in bucket.parameters]
            collectives.all_gather([weight.view(-1) for weight in flat], bucket, self.group)
            for parameter, weight in zip(bucket.parameters, flat, strict=True):
                if weight.data_ptr() != parameter.data_ptr():
                    parameter.detach().copy_(weight)

    def move_state(self, parameter: Tensor, state: dict[str, Tensor], new: Layout) -> None:
        """Deal the state of a parameter out as another layout says; collective."""
        for key, value in state.items():
            if value.ndim and key != STATE_KEY["normuon"]:
                whole = value.new_zeros(parameter.numel())
                position = 0
                for start, stop in self.holdings[parameter].ranges:
                    whole[start:stop] = value[position : position + stop - start]
                    position += stop - start
                dist.all_reduce(whole, group=self.group)
                ranges = [whole[start:stop] for start, stop in new.holdings[parameter].ranges]
                state[key] = torch.cat([whole.new_empty(0), *ranges])


@dataclass(frozen=True)
class Memory:
    """Where a parameter and its state lie on this rank. Kept from step to step, since views take as long to make as small
    matrices to update; made again when something lies elsewhere.

    Attributes:
        holding: What is held.
        weight: The parameter's elements (of a DTensor, its local ones), or a copy in row-major order.
        state: Of the elements held, one range after another; and scalars.
        whole: Units that this rank has all of, where their gradients begin, and views of weight and state.
        copied: Whether weight is a copy.
    """

    holding: Holding
    weight: Tensor
    state: dict[str, Tensor]
    whole: tuple[tuple[Units, int, Tensor, Tensor, Tensor | None], ...]
    copied: bool

    @classmethod
    def of(cls, parameter: Tensor, holding: Holding, state: Mapping[str, Tensor]) -> Memory:
        local = local_of(parameter).detach()
        weight = local.contiguous()
        found = {key: local_of(value).detach() for key, value in state.items()}
        rows, elements = found.get(STATE_KEY["normuon"]), found.get(STATE_KEY["adamuon"])
        whole = []
        for units, (at, start) in holding.whole:
            second_moment = None if elements is None else units.view(_after(elements, start))
            if rows is not None:
                second_moment = row_places(units_of(parameter), units, at + first_element(parameter)).view(rows)
            momentum = units.view(_after(found["momentum_buffer"], start))
            whole.append((units, start, units.view(_after(weight, at)), momentum, second_moment))
        return cls(holding, weight, found, tuple(whole), weight is not local)

    def is_that_of(self, parameter: Tensor, state: Mapping[str, Tensor]) -> bool:
        """Whether the tensors lie where they lay: another `data`, or a state that was loaded, do not."""
        if not local_of(parameter).is_set_to(self.weight) or len(state) != len(self.state):
            return False
        return all(key in state and local_of(state[key]).is_set_to(value) for key, value in self.state.items())


@dataclass
class Piece:
    """What this rank holds of a parameter, during a step; all tensors are contiguous.

    Attributes:
        parameter: The parameter.
        group: Its options.
        memory: What is held, and where it lies.
        grad: Of the elements held, one range after another.
    """

    parameter: Tensor
    group: dict[str, Any]
    memory: Memory
    grad: Tensor

    @property
    def holding(self) -> Holding:
        return self.memory.holding

    @property
    def weight(self) -> Tensor:
        return self.memory.weight

    @property
    def state(self) -> dict[str, Tensor]:
        return self.memory.state

    def elements(self) -> Tensor:
        """The elements held, of a parameter that is held in one run."""
        ((start, stop),) = self.holding.ranges or ((0, 0),)
        return self.weight if stop - start == self.weight.numel() else self.weight.view(-1)[start:stop]

    def whole(self) -> Iterator[Block]:
        """The units that this rank has all of."""
        for units, start, weight, momentum, second_moment in self.memory.whole:
            yield Block(weight, units.view(_after(self.grad, start)), momentum, second_moment)

    def share(self, place: Place, size: int) -> Block:
        """A share of a unit that other ranks hold too, 1-D."""
        at, local = slice(place.at, place.at + size), slice(place.local, place.local + size)
        momentum = self.state["momentum_buffer"]
        elements = self.state.get(STATE_KEY["adamuon"])
        second_moment = None if elements is None else elements.view(-1)[local]
        return Block(self.weight.view(-1)[at], self.grad.view(-1)[local], momentum.view(-1)[local], second_moment)

    def write_back(self) -> None:
        """Where the parameter is not in row-major order."""
        if self.memory.copied:
            local_of(self.parameter).copy_(self.weight)


def _after(tensor: Tensor, start: int) -> Tensor:
    return tensor if start == 0 else tensor.view(-1)[start:]


def lay_out(
    members: Sequence[Member],
    process_group: dist.ProcessGroup | None,
    partition: Literal["flat", "matrix"],
    strategy: SplitStrategy,
) -> Layout:
    """The layout of an optimizer; collective over ranks.

    Raises:
        ConfigError: DTensors and a process group, DTensors that cannot be laid out, or ranks that do not agree.
    """
    sharded = [member for member in members if is_dtensor(member.parameter)]
    for parameter, name, options in sharded:
        stacked = parameter.ndim == 3 and not cut_of(parameter, name).flatten
        if options["variant"] != "none" and stacked and any(axes_of(parameter).values()):
            raise ConfigError(
                f"{name} {tuple(parameter.shape)} lies on its mesh as {parameter.placements}: "  # type: ignore[attr-defined]
                f"variant={options['variant']!r} takes stacks of matrices that are cut along the stack only"
            )
    if process_group is not None:
        if sharded:
            raise ConfigError(
                f"{sharded[0].name} is a DTensor: its mesh says how it is sharded, so leave process_group=None"
            )
        return _zero1(members, process_group, partition, strategy)
    if sharded:
        return _fsdp(members)
    return Layout(tuple(members), {member.parameter: _everything(member) for member in members})


def _checked_gradient(parameter: Tensor, name: str) -> Tensor | None:
    """What this rank has of the gradient, contiguous."""
    grad = parameter.grad
    if grad is None:
        return None
    if grad.layout != torch.strided:
        raise ConfigError(
            f"{name}: Muon takes dense gradients, found {grad.layout}; build the embedding with sparse=False"
        )
    if getattr(grad, "placements", None) != getattr(parameter, "placements", None):
        raise ConfigError(f"{name}: the gradient lies as {grad.placements}, the parameter as {parameter.placements}")  # type: ignore[attr-defined]
    return local_of(grad).contiguous()


def _everything(member: Member) -> Holding:
    ranges = ((0, member.parameter.numel()),)
    if member.group["algorithm"] != "muon":
        return Holding(ranges)
    return Holding(ranges, tuple((units, Place(0, 0)) for units in units_of(member.parameter, member.name)))


def _spans(member: Member) -> list[Span]:
    return spans_of(units_of(member.parameter, member.name)) if member.group["algorithm"] == "muon" else []


def _zero1(
    members: Sequence[Member],
    group: dist.ProcessGroup,
    partition: Literal["flat", "matrix"],
    strategy: SplitStrategy,
) -> Layout:
    rank, num_ranks = group.rank(), group.size()
    _agree(members, [group], {"partition": partition, "split_strategy": strategy})
    together: dict[tuple[object, ...], list[Member]] = {}
    for member in members:
        key = (member.group["algorithm"], member.parameter.device, member.parameter.dtype)
        together.setdefault(key, []).append(member)
    buckets, holdings = [], {}
    for mine in together.values():
        spans = [_spans(member) for member in mine]
        if partition == "matrix" and spans[0]:
            held = deal_spans(spans, num_ranks)
        else:
            held = deal_flat([member.parameter.numel() for member in mine], num_ranks)
        buckets.append(Bucket.of([member.parameter for member in mine], held))
        for member, ranges, its_spans in zip(mine, held, spans, strict=True):
            holdings[member.parameter] = holding_of(ranges, rank, its_spans, strategy)
    return Layout(
        tuple(members),
        {member.parameter: holdings[member.parameter] for member in members},
        {member.parameter: group for member in members},
        tuple(buckets),
        group,
        (group,),
        {member.parameter: 1.0 for member in members},
    )


def _fsdp(members: Sequence[Member]) -> Layout:
    """Plain parameters among DTensors are taken to be on every rank, with equal gradients."""
    meshes = {id(p.device_mesh): p.device_mesh for p, _, _ in members if is_dtensor(p)}
    largest = max(meshes.values(), key=lambda mesh: mesh.size())
    ranks = set(largest.mesh.flatten().tolist())
    for parameter, name, _ in members:
        mesh = getattr(parameter, "device_mesh", largest)
        if not set(mesh.mesh.flatten().tolist()) <= ranks:
            raise ConfigError(
                f"{name} lies on {mesh}, other parameters on {largest}: norms and verdicts are made on all ranks of one "
                f"mesh, so give parameters that live on other ranks to an optimizer of their own"
            )
    axes = tuple(largest.get_group(axis) for axis in range(largest.ndim))
    _agree(members, axes, {})
    sharded = [member for member in members if is_dtensor(member.parameter)]
    found = holdings_of(
        [member.parameter for member in sharded], [_spans(member) for member in sharded], [m.name for m in sharded]
    )
    holdings = {member.parameter: holding for member, (holding, _) in zip(sharded, found, strict=True)}
    weight = {}
    for member in members:
        parameter = member.parameter
        if parameter in holdings:
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            weight[parameter] = mesh.size() / (copies_of(parameter) * largest.size())
        else:
            holdings[parameter] = _everything(member)
            weight[parameter] = 1 / largest.size()
    return Layout(
        tuple(members),
        {member.parameter: holdings[member.parameter] for member in members},
        {member.parameter: group for member, (_, group) in zip(sharded, found, strict=True) if group is not None},
        axes=axes,
        weight=weight,
    )


def _agree(members: Sequence[Member], axes: Sequence[dist.ProcessGroup], options: dict[str, Any]) -> None:
    """Ranks that differ in a parameter or an option would wait for one another, or mix up weights; and where each rank
    updates its part of a weight, weights that begin differently become a patchwork.

    Raises:
        ConfigError: On every rank, with the first difference.
    """
    rows = [[f"{key}={value}" for key, value in options.items()]]
    weights = []
    for parameter, name, chosen in members:
        settings = {key: shown(value) for key, value in chosen.items() if key not in ("params", "param_names")}
        units = [str(unit) for unit in units_of(parameter, name)] if chosen["algorithm"] == "muon" else []
        rows.append(
            [name, str(tuple(parameter.shape)), str(parameter.dtype), str(getattr(parameter, "placements", "")), *units]
            + [f"{key}={float(value) if isinstance(value, Tensor) else value}" for key, value in settings.items()]
        )
        if not is_dtensor(parameter) and not parameter.is_meta:
            weights.append((name, _fingerprint(parameter)))
    digests = [hashlib.sha256(json.dumps(found).encode()).hexdigest() for found in (rows, weights)]
    for group in axes:
        found = gather_json(digests, group)
        if any(theirs[0] != found[0][0] for theirs in found):
            _tell_options(gather_json(rows, group))
        if any(theirs[1] != found[0][1] for theirs in found):
            _tell_weights(gather_json(weights, group))


def _fingerprint(parameter: Tensor) -> str:
    """Of the bits of a parameter: sums of whole numbers over stretches of it, so the same whoever adds them up."""
    size = parameter.element_size()
    flat = parameter.detach().contiguous().view(-1)
    if flat.storage_offset() * size % 8:
        flat = flat.clone()
    cut = flat.numel() * size // 512 * 512 // size  # 64 stretches, of 8 bytes times any number
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    sums = flat[:cut].view(torch.int64).view(64, -1).sum(1).tolist() if cut else []
    sums.append(int(flat[cut:].view(whole).sum()))
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def _tell_options(tables: Sequence[Sequence[Sequence[str]]]) -> None:
    for rank, table in enumerate(tables):
        for index, (ours, theirs) in enumerate(zip_longest(tables[0], table)):
            if ours == theirs:
                continue
            if ours and theirs and (index == 0 or ours[0] == theirs[0]):
                where = "" if index == 0 else f" in {ours[0]}"
                pairs = [pair for pair in zip_longest(ours, theirs) if pair[0] != pair[1]]
                mine, other = (", ".join(str(value) for value in side if value) for side in zip(*pairs, strict=True))
            else:
                where, (mine, other) = (
                    "",
                    (f"parameter {row[0]} {row[1]}" if row else "nothing" for row in (ours, theirs)),
                )
            raise ConfigError(
                f"ranks do not have the same parameters and options: entry {index}{where} is {mine or 'nothing'} on rank 0 "
                f"and {other or 'nothing'} on rank {rank} of the group"
            )


def _tell_weights(tables: Sequence[Sequence[tuple[str, str]]]) -> None:
    for rank, table in enumerate(tables):
        for (name, ours), (_, theirs) in zip(tables[0], table, strict=True):
            if ours != theirs:
                raise ConfigError(
                    f"ranks do not begin with the same weights: {name} differs between rank 0 and rank {rank} of the group, "
                    f"and every rank would update its own part only. Broadcast the parameters from rank 0 before the "
                    f"optimizer is built, or seed all ranks alike"
                )
