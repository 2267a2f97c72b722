"""Saved states of optimizers, as plain data: what they say, whether they fit, and what to load.

    state of vlkit, torch.optim.Muon or torch.optim.AdamW -> Saved: values by name, groups of names -> checked -> Plan

Nothing here changes an optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vlkit.errors import OptimizerStateError
from vlkit.optim.parts import is_dtensor
from vlkit.optim.update import without_functions
from vlkit.optim.variants import STATE_KEY

Group: TypeAlias = dict[str, Any]
State: TypeAlias = Mapping[str, Any]

VERSION = 1
NOT_NEGATIVE = ("step", "exp_avg_sq", *STATE_KEY.values())
_SHOWN = 5  # names in a message
_EXPECTED = "{'state': {...}, 'param_groups': [{'params': [...], ...}, ...]}, as an optimizer's state_dict() gives it"
_TORCH_ONLY = ("amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


@dataclass(frozen=True)
class Wanted:
    """What an optimizer needs.

    Attributes:
        groups: Options of every group, among them "algorithm".
        names: Of the parameters of every group.
        shapes: Name -> key of the state -> shape.
        check_options: Raises ValueError if options of a group cannot be used.
    """

    groups: Sequence[Group]
    names: Sequence[Sequence[str]]
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    check_options: Callable[[Group], object]


@dataclass(frozen=True)
class Saved:
    """What a saved state says.

    Attributes:
        values: Name -> key -> value.
        groups: Options of every group.
        names: Of the parameters of every group.
        skipped_steps: As saved.
    """

    values: Mapping[str, Mapping[str, Any]]
    groups: Sequence[Group]
    names: Sequence[Sequence[str]]
    skipped_steps: int = 0


@dataclass(frozen=True)
class Plan:
    """What to load, checked.

    Attributes:
        values: Name -> key -> tensor; without the parameters that begin anew.
        groups: New options for every group; empty where the optimizer keeps its own.
        skipped_steps: As saved.
    """

    values: Mapping[str, Mapping[str, Tensor]]
    groups: Sequence[Group]
    skipped_steps: int


def plan_load(
    states: Sequence[State], wanted: Wanted, *, reinitialize: Sequence[str] = (), options: bool = True
) -> Plan:
    """Check saved states, which together make one, against what is needed.

    Args:
        states: One; or that of Muon and that of AdamW.
        wanted: What they have to fit.
        reinitialize: Regular expressions, searched in names, of parameters that begin anew.
        options: Load the options of the groups too, which then must have the same parameters.

    Raises:
        OptimizerStateError: It does not fit.
    """

    def kept(name: str) -> bool:
        return not any(re.search(pattern, name) for pattern in reinitialize)

    needed = Wanted(
        wanted.groups,
        [list(filter(kept, names)) for names in wanted.names],
        {name: keys for name, keys in wanted.shapes.items() if kept(name)},
        wanted.check_options,
    )
    parts = [read_state(state, needed, alone=len(states) == 1) for state in states]
    saved = Saved(
        {name: entry for part in parts for name, entry in part.values.items() if kept(name)},
        list(chain.from_iterable(part.groups for part in parts)),
        [list(filter(kept, names)) for part in parts for names in part.names],
        max((part.skipped_steps for part in parts), default=0),
    )
    groups = _fitting_options(saved, needed) if options else [{} for _ in needed.groups]
    _check_values(saved.values, needed.shapes)
    values = {
        name: {key: torch.as_tensor(value) for key, value in entry.items()} for name, entry in saved.values.items()
    }
    return Plan(values, groups, saved.skipped_steps)


# What a state says


def read_state(state: State, wanted: Wanted, *, alone: bool = True) -> Saved:
    """What a state says; see `_read`.

    Raises:
        OptimizerStateError: It is no state, or it cannot be told whose values it has.
    """
    try:
        read_groups(state)
        return _read(state, wanted, alone=alone)
    except (KeyError, TypeError, AttributeError) as bad:
        raise OptimizerStateError(f"the saved state cannot be understood ({bad}); expected {_EXPECTED}") from bad


def read_groups(state: State) -> None:
    """Whether a state is of the right kinds, as far as that can be said before it is looked into.

    Raises:
        OptimizerStateError: It is something else.
    """
    if not isinstance(state, Mapping):
        raise OptimizerStateError(f"the saved state is {type(state).__name__}, expected {_EXPECTED}")
    for key in ("state", "param_groups"):
        if key not in state:
            raise OptimizerStateError(
                f"the saved state has {', '.join(map(repr, state)) or 'nothing'}, expected 'state' and 'param_groups': it is "
                f"empty, truncated, or not the state of an optimizer"
            )
    groups = state["param_groups"]
    if not isinstance(state["state"], Mapping) or not isinstance(groups, list | tuple):
        raise OptimizerStateError(
            f"the saved state has state={type(state['state']).__name__} and param_groups={type(groups).__name__}, "
            f"expected {_EXPECTED}"
        )
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise OptimizerStateError(f"the saved state has no list 'params' in group {index}, expected {_EXPECTED}")


def _read(state: State, wanted: Wanted, *, alone: bool) -> Saved:
    """A full state, or one in torch's layout, where parameters are numbers: known by their names if the state has them, else
    by their place.

    Args:
        state: The state.
        wanted: Where its parameters are looked for.
        alone: It is all; else its groups are ours with its algorithms.
    """
    header = state.get("header", state.get("layout", {}))
    version = header.get("version", VERSION)
    if version != VERSION:
        raise OptimizerStateError(
            f"the saved state has version {version!r}, this release reads {VERSION}; was it written by a newer one?"
        )
    form = header.get("momentum_form", "ema")
    if form not in ("ema", "sum"):
        raise OptimizerStateError(f"momentum_form is 'ema' or 'sum', the saved state has {form!r}")
    groups = [_translated(group) for group in state["param_groups"]]
    ids = [list(group["params"]) for group in state["param_groups"]]
    names = [list(group.get("param_names", group["params"])) for group in state["param_groups"]]
    if any(len(places) != len(mine) for places, mine in zip(ids, names, strict=True)):
        raise OptimizerStateError("a group of the saved state has another number of param_names than of params")
    if not all(isinstance(name, str) for name in chain.from_iterable(names)):
        names = _names_by_place(groups, ids, wanted, alone=alone)
    strays = set(state["state"]) - set(chain.from_iterable(ids))
    if strays:
        raise OptimizerStateError(
            f"the saved state has values of parameters that are in none of its groups: {listed(sorted(map(str, strays)))}"
        )
    values = {
        name: _averaged(state["state"][place], group, form)
        for group, places, mine in zip(groups, ids, names, strict=True)
        for place, name in zip(places, mine, strict=True)
        if state["state"].get(place)
    }
    return Saved(values, groups, names, int(header.get("skipped_steps", 0)))


def _translated(saved: Group) -> Group:
    """The options of a group under our names, without its parameters."""
    options = {key: restored(value) for key, value in saved.items() if key not in ("params", "param_names")}
    if "ns_coefficients" in options:  # torch.optim.Muon
        options["algorithm"] = "muon"
        options["ns"] = tuple(options.pop("ns_coefficients"))
        options["adjust_lr"] = options.pop("adjust_lr_fn", None) or "original"
        options.pop("eps", None)
    elif "amsgrad" in options:  # torch.optim.AdamW
        options = {key: value for key, value in options.items() if key not in _TORCH_ONLY}
        options["algorithm"] = "adamw"
        options["adam_eps"] = options.pop("eps")
    return options


def restored(value: Any) -> Any:
    """An option from plain data: lists are tuples, and "torch.float32" is a dtype."""
    if isinstance(value, list):
        return tuple(restored(entry) for entry in value)
    dtype = (
        getattr(torch, value.removeprefix("torch."), None)
        if isinstance(value, str) and value.startswith("torch.")
        else None
    )
    return dtype if isinstance(dtype, torch.dtype) else value


def _names_by_place(
    groups: Sequence[Group], ids: Sequence[Sequence[Any]], wanted: Wanted, *, alone: bool
) -> list[list[str]]:
    algorithms = {group.get("algorithm") for group in groups}
    candidates = [
        names
        for group, names in zip(wanted.groups, wanted.names, strict=True)
        if names and (alone or group["algorithm"] in algorithms)
    ]
    filled = [places for places in ids if places]
    if len(candidates) != len(filled):
        raise OptimizerStateError(
            f"the saved state has {len(filled)} groups, this optimizer has {len(candidates)}. Its parameters have no names, "
            f"so groups are told by their place: give the states of Muon and AdamW together as a list, or save them from "
            f"optimizers that were built with named parameters"
        )
    for index, (places, names) in enumerate(zip(filled, candidates, strict=True)):
        if len(places) != len(names):
            raise OptimizerStateError(
                f"group {index}: the saved state has {len(places)} parameters, this optimizer has {len(names)}"
            )
    found = iter(candidates)
    return [list(next(found)) if places else [] for places in ids]


def _averaged(entry: Mapping[str, Any], group: Group, form: str) -> Mapping[str, Any]:
    """Momentum as a running mean; a running sum is 1 / (1 - momentum) times that."""
    if form == "ema" or "momentum_buffer" not in entry:
        return entry
    return {**entry, "momentum_buffer": entry["momentum_buffer"] * (1 - float(group["momentum"]))}


# Whether it fits


def _fitting_options(saved: Saved, wanted: Wanted) -> list[Group]:
    """For every group that is wanted, the options of the saved group with the same parameters."""
    filled = [names for names in saved.names if names], [names for names in wanted.names if names]
    if len(filled[0]) != len(filled[1]):
        raise OptimizerStateError(
            f"the saved state has {len(filled[0])} groups, this optimizer has {len(filled[1])}; options=False of "
            f"load_full_state_dict keeps the groups and options of this optimizer"
        )
    of_name = {name: index for index, names in enumerate(saved.names) for name in names}
    everything = set(chain.from_iterable(wanted.names))
    _check_names(of_name, everything)
    found: list[Group] = []
    for index, (own, names) in enumerate(zip(wanted.groups, wanted.names, strict=True)):
        if not names:
            found.append({})
            continue
        place = of_name[names[0]]
        options, theirs = without_functions(saved.groups[place], own), saved.names[place]
        if options.get("algorithm", own["algorithm"]) != own["algorithm"]:
            raise OptimizerStateError(
                f"group {index}: the saved state is of {options['algorithm']!r}, this group runs {own['algorithm']!r} "
                f"(parameter {names[0]!r}). {_way_out(names[0])}"
            )
        if set(theirs) != set(names):
            raise OptimizerStateError(
                f"group {index}: the saved group has {len(theirs)} parameters, this one {len(names)}: "
                f"missing {listed([name for name in names if name not in theirs])}; not in this group "
                f"{listed([name for name in theirs if name not in names])}; options=False of load_full_state_dict keeps the "
                f"groups and options of this optimizer"
            )
        try:
            wanted.check_options({**own, **options})
        except (TypeError, ValueError, AttributeError) as bad:
            raise OptimizerStateError(f"group {index}: the saved options cannot be used: {bad}") from None
        found.append(options)
    return found


def _check_names(saved: Iterable[str], wanted: Iterable[str]) -> None:
    saved, wanted = list(saved), list(wanted)
    missing = sorted(set(wanted) - set(saved))
    foreign = sorted(set(saved) - set(wanted))
    if missing or foreign:
        raise OptimizerStateError(
            f"the saved state has {len(saved)} parameters, this optimizer has {len(wanted)}: missing {listed(missing)}; "
            f"foreign {listed(foreign)}. {_way_out((missing + foreign)[0])}"
        )


def _check_values(values: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    _check_names(values, shapes)
    for name, keys in shapes.items():
        if set(keys) != set(values[name]):
            raise OptimizerStateError(
                f"{name}: the saved state has {', '.join(map(repr, values[name]))}, expected {', '.join(keys)}: it is of "
                f"another algorithm or truncated. {_way_out(name)}"
            )
        for key, shape in keys.items():
            check_value(name, key, torch.as_tensor(values[name][key]), shape)


def check_value(name: str, key: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Raises OptimizerStateError if this cannot be that value of that parameter."""
    if tuple(value.shape) != shape:
        raise OptimizerStateError(
            f"{name}: the saved {key} has shape {tuple(value.shape)}, the parameter needs {shape}; were the groups built from "
            f"the same model?"
        )
    local = value.to_local() if is_dtensor(value) else value
    if local.is_complex() or (not local.is_floating_point() and key != "step"):
        raise OptimizerStateError(f"{name}: the saved {key} is {value.dtype}, expected floating-point numbers")
    bad = local.numel() - int(local.isfinite().sum())
    if bad:
        raise OptimizerStateError(
            f"{name}: the saved {key} has {bad} of {local.numel()} values that are NaN or infinite. {_way_out(name)}"
        )
    if key in NOT_NEGATIVE and local.numel() and bool(local.min() < 0):
        raise OptimizerStateError(
            f"{name}: the saved {key} has values below 0, down to {local.min().item()}. {_way_out(name)}"
        )


def _way_out(name: str) -> str:
    return f"load_full_state_dict(state, reinitialize=['^{re.escape(name)}$']) begins with such parameters anew"


def listed(names: Sequence[str]) -> str:
    """How many, and the first few by name."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(map(repr, names[:_SHOWN]))}{more})" if names else "none"
