"""Muon for the matrices, AdamW for the rest, in one optimizer.

    gradient -> momentum -> Nesterov -> orthogonalise every unit -> weight decay, then subtract lr * factor * unit

A unit is one matrix on which the orthogonalisation runs: a 2-D weight, one expert of a stack [experts, out, in], one
row block of a fused weight, a convolution kernel as [out, in * kh * kw]. A step has separate stages (gradients,
momentum, orthogonalisation, update), which are functions on lists of tensors, in vlkit.optim.update.

Source: Muon, Keller Jordan, github.com/KellerJordan/Muon; its scaling to large models, Moonlight, arXiv:2502.16982.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from vlkit.errors import ConfigError
from vlkit.optim.dtensor import local_of
from vlkit.optim.layout import Layout, Member, Piece, lay_out
from vlkit.optim.newton_schulz import Form, Norm, Triple
from vlkit.optim.partition import Held, SplitStrategy
from vlkit.optim.sharing import Sharing
from vlkit.optim.state import (
    full_state_dict,
    layout_of,
    load_full_state_dict,
    load_rank_state,
    load_sharded_state_dict,
    plain,
    sharded_state_dict,
)
from vlkit.optim.units import units_of
from vlkit.optim.update import (
    ADAMW_STATE,
    ADJUST_LR,
    AdjustLr,
    adamw_update,
    adapt_updates,
    batches,
    momentum_dtype_of,
    newton_schulz_of,
    orthogonalize_units,
    update_momentum,
    update_weights,
)
from vlkit.optim.variants import STATE_KEY, VARIANTS, Variant, num_rows

Group: TypeAlias = dict[str, Any]

# What a copy of the optimizer keeps beside groups and state.
OWN = (
    *("max_grad_norm", "process_group", "partition", "grad_sync", "split_strategy"),
    *("skipped_steps", "last_step_skipped", "last_grad_norm", "_checked"),
)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised, with AdamW inside for embeddings, heads, norms and biases.

    Each group says `algorithm: "muon"` (the default) or `"adamw"`; `muon_param_groups(model)` makes both. Every option
    but max_grad_norm can differ between groups. With adjust_lr="match_rms_adamw" one learning rate and weight decay,
    tuned for AdamW, serve both.

    A gradient that is not finite, or so large that the state would not be, changes nothing: neither weights nor state. The
    step is counted in `skipped_steps` and `last_step_skipped` says so. `last_grad_norm` is the norm over all gradients,
    before clipping. Gradients are never written to.

    Fine-tuning: a model pretrained with Muon is better fine-tuned with Muon. One pretrained with AdamW is at least as
    well served by AdamW (Moonlight, tables 6 and 7: 89.8 against 85.8 on GSM8K for Qwen2.5-7B).

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate; a float or a scalar tensor.
        momentum: Decay of the running mean of gradients.
        nesterov: Look one momentum step ahead.
        weight_decay: Decoupled, multiplied by the learning rate alone, for both algorithms.
        adjust_lr: Factor on a unit's update by its shape: "match_rms_adamw" is rms_scale * sqrt(max(rows, cols)), which
            makes the elements of an update rms_scale large; "original" is sqrt(max(1, rows / cols));
            "spectral_unclamped" is sqrt(rows / cols); "none" is 1.
        rms_scale: For "match_rms_adamw".
        ns: Newton-Schulz preset or coefficients; this and the next four are those of vlkit.optim.orthogonalize. Or a function
            of matrices [count, rows, cols] in ns_dtype ("auto" is fp32), that gives others of the same shape; what it makes
            of one may not depend on those beside it.
        ns_steps: Number of Newton-Schulz steps, None for the preset's own.
        ns_norm: "frobenius" or "schatten8".
        ns_dtype: Of the Newton-Schulz products.
        ns_form: "auto", "standard" or "gram".
        betas: Of AdamW.
        adam_eps: Of AdamW.
        momentum_dtype: Of Muon's state; fp64 parameters keep fp64. AdamW's state is fp32, or fp64 for fp64 parameters.
        max_grad_norm: Clip the norm over all gradients to this; None does not clip.
        maximize: Ascend.
        variant: What follows the orthogonalisation: "none", "normuon" (a second moment per row) or "adamuon" (one per
            element); see vlkit.optim.variants.
        variant_beta: Decay of that second moment.
        cautious_wd: In Muon groups, decay only elements that the update moves towards zero.
        process_group: ZeRO-1: every rank has all parameters and a part of the state, updates what it has state for, and
            gets the rest from the others. None with plain parameters never touches torch.distributed; None with
            DTensors (fully_shard) shards the state as the parameters are.
        partition: "flat" cuts the parameters, one after another, in equal slices: exactly 1 / N of the state; a unit
            cut by a boundary travels. "matrix" deals out whole units by their work: nothing but gradients and parameters
            travels, and the largest part may exceed the mean by a quarter, or by one unit.
        grad_sync: "none" takes gradients as they are: averaged already, as under DDP. "reduce_scatter" averages the
            ranks' own gradients in fp32.
        split_strategy: Who orthogonalises a unit that k ranks share. "duplicate": all of them, at (k - 1) times its
            elements sent. "owner": the one with most of it, at twice what the others have. "auto": both where k is 2,
            else the owner.

    Raises:
        ConfigError: Unknown or contradictory options, a parameter that cannot take its group's algorithm, or ranks that
            differ in parameters or options.

    Over ranks every step, and adding a group, is collective. One process given the same averaged gradients ends with the
    same bits. Buckets of equal device, dtype and algorithm span groups, so that few units are cut. Beside them a step
    keeps the units that a rank works on for others, and 64 MiB (plus 1 / N of it) for gradients or parameters in transit.

    Source: Moonlight, arXiv:2502.16982, equation 4 and algorithm 1.
    Matches: torch.optim.Muon with ns="keller" to bf16 rounding of the products, torch.optim.AdamW for the rest to fp32
        rounding.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adjust_lr: AdjustLr = "match_rms_adamw",
        rms_scale: float = 0.2,
        ns: str | Triple | Sequence[Triple] = "polar_express",
        ns_steps: int | None = None,
        ns_norm: Norm = "frobenius",
        ns_dtype: torch.dtype | Literal["auto"] = "auto",
        ns_form: Form = "auto",
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        momentum_dtype: torch.dtype = torch.float32,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        variant: Variant = "none",
        variant_beta: float = 0.95,
        cautious_wd: bool = False,
        process_group: dist.ProcessGroup | None = None,
        partition: Literal["flat", "matrix"] = "flat",
        grad_sync: Literal["none", "reduce_scatter"] = "none",
        split_strategy: SplitStrategy = "auto",
    ) -> None:
        if max_grad_norm is not None and not _number("max_grad_norm", max_grad_norm) > 0:
            raise ConfigError(f"max_grad_norm must be above 0 or None, found {max_grad_norm}")
        for option, value, known in (
            ("partition", partition, ("flat", "matrix")),
            ("grad_sync", grad_sync, ("none", "reduce_scatter")),
            ("split_strategy", split_strategy, ("auto", "duplicate", "owner")),
        ):
            if value not in known:
                raise ConfigError(f"{option} is one of {', '.join(map(repr, known))}; found {value!r}")
        _check_member(process_group)
        if process_group is None and grad_sync != "none":
            raise ConfigError("grad_sync='reduce_scatter' needs process_group, the ranks to average over")
        self.max_grad_norm = max_grad_norm
        self.process_group = process_group
        self.partition = partition
        self.grad_sync = grad_sync
        self.split_strategy: SplitStrategy = split_strategy
        self.skipped_steps = 0
        self.last_step_skipped = False
        self.last_grad_norm: Tensor | None = None
        self._checked: list[dict[str, Any]] = []  # options of each group, as they were when they were last looked at
        self._layout: Layout | None = None  # made once: for many small matrices it would cost as much as the products
        defaults = {
            "algorithm": "muon",
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "adjust_lr": adjust_lr,
            "rms_scale": rms_scale,
            "ns": ns,
            "ns_steps": ns_steps,
            "ns_norm": ns_norm,
            "ns_dtype": ns_dtype,
            "ns_form": ns_form,
            "betas": betas,
            "adam_eps": adam_eps,
            "momentum_dtype": momentum_dtype,
            "maximize": maximize,
            "variant": variant,
            "variant_beta": variant_beta,
            "cautious_wd": cautious_wd,
        }
        super().__init__(params, defaults)
        self._lay_out()
        # torch.amp.GradScaler leaves unscaling and the verdict to step(): ranks have to agree on it.
        self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; its options are checked and its state is allocated at once, so that a checkpoint always has
        every key.

        Over ranks this is collective: elements are dealt out anew, and state moves with them.
        """
        if isinstance(param_group, dict) and "params" not in param_group:
            raise ConfigError(
                f"a parameter group needs 'params', found {', '.join(map(repr, param_group)) or 'nothing'}"
            )
        _check_names(param_group, self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, self.defaults)
            for parameter, name in _named(group):
                _check_parameter(parameter, name, group)
            if self._layout is not None:
                self._lay_out()
        except ConfigError:
            self.param_groups.pop()
            raise
        _mirror_momentum(group)
        self._checked.append(_options(group, self.defaults))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; one that has a gradient on some ranks only has zeros on the others.

        Over ranks this is collective.

        Args:
            closure: Computes the loss and the gradients again.

        Returns:
            What the closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check_options()
        layout = self._made_layout()

        # 1. Averaged gradients of what this rank holds. If any is not finite, on any rank, nothing changes.
        pieces, clip = self._gradients(layout)
        muon = _by_group(pieces, "muon")
        # 2, 3. Momentum and directions of units that ranks share; the directions start to travel to who orthogonalises.
        shared = Sharing(muon, layout, clip)
        # 2, 4, 5. Momentum, orthogonalisation and update of units that are whole on this rank.
        for options, mine in muon:
            newton_schulz = newton_schulz_of(options)
            for batch in batches(block for piece in mine for block in piece.whole()):
                directions = update_momentum(batch, options, clip)
                updates = orthogonalize_units(directions, newton_schulz)
                adapt_updates(batch, updates, options)
                update_weights([block.weight for block in batch], updates, options, *batch[0].weight.shape[1:])
        for options, mine in _by_group(pieces, "adamw"):
            adamw_update(*_elements(mine), options, clip)
        # 4, 5. Orthogonalisation and update of shared units.
        shared.finish()
        for piece in pieces:
            piece.write_back()
        # 6. Every rank gets every parameter.
        if pieces:
            layout.all_gather()
        return loss

    def held(self, parameter: Tensor) -> Held:
        """Of every rank, the ranges (start, stop) of the flattened parameter whose state it has, one after another."""
        layout = self._made_layout()
        return layout.held.get(parameter, (((0, parameter.numel()),),))

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle; the base class would leave out what is not of the groups.

        Raises:
            ConfigError: With a process_group, which exists in this run only.
        """
        if self.process_group is not None:
            raise ConfigError(
                "an optimizer with a process_group cannot be copied or pickled: the group exists in this run only. Build "
                "another one, and take the state over with full_state_dict() and load_full_state_dict()"
            )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in OWN}, "_layout": None}

    def check_options(self, *, loaded: bool = False) -> None:
        """Look at options that were changed in `param_groups` since they were last looked at. Schedulers that cycle
        momentum write it to betas[0] of all groups; in those of Muon that is the same number as `momentum`.

        Args:
            loaded: They come from a state, where momentum is what it says, and have been looked at.

        Raises:
            ConfigError: Options that cannot be used, or that cannot change any more.
        """
        for index, (group, before) in enumerate(zip(self.param_groups, self._checked, strict=True)):
            now = _options(group, self.defaults)
            if now == before:
                continue
            if not loaded:
                for key in ("algorithm", "variant", "momentum_dtype"):
                    if now[key] != before[key]:
                        raise ConfigError(
                            f"group {index}: {key} was {before[key]!r} when its state was made and is {now[key]!r} now; "
                            f"build the optimizer again"
                        )
                check_group({key: value for key, value in group.items() if key in self.defaults}, self.defaults)
                if group["algorithm"] == "muon" and now["betas"][0] != before["betas"][0]:
                    group["momentum"] = now["betas"][0]
            _mirror_momentum(group)
            self._checked[index] = _options(group, self.defaults)

    # Gradients

    def _gradients(self, layout: Layout) -> tuple[list[Piece], float]:
        """What this rank holds of every parameter that has a gradient on some rank, and the factor that clips gradients.

        One sum over all ranks tells the norm, whether all gradients are finite, and who has which; no state is touched
        before. Without any gradient, or with one that is not finite, there are no pieces.
        """
        self.last_step_skipped = False
        grad_scale = getattr(self, "grad_scale", None)  # this and found_inf are set by torch.amp.GradScaler
        unscale = 1.0 if grad_scale is None else 1 / float(grad_scale)
        present = [member.parameter.grad is not None for member in layout.members]
        if not layout.axes and not any(present):
            return [], 1.0
        if self.grad_sync == "reduce_scatter":
            grads, unscale = layout.reduce_scatter(unscale), 1.0
        else:
            grads = layout.local_gradients()
        for exact in (False, True) if self.max_grad_norm is None else (True,):
            square, found_inf, *ranks_with = layout.sum_over_ranks(
                layout.sum_of_squares(grads, exact=exact), getattr(self, "found_inf", None), present
            )
            if math.isfinite(square):  # else it may have been too large for fp32
                break
        norm = math.sqrt(square) * unscale if square >= 0 else square
        self.last_grad_norm = torch.tensor(norm, dtype=torch.float32, device=layout.device)
        if found_inf or not math.isfinite(norm):
            self.last_step_skipped = True
            self.skipped_steps += 1
            return [], 1.0
        clip = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (norm + 1e-6))
        pieces = [
            layout.piece(member, grad, self.state[member.parameter])
            for member, grad, ranks in zip(layout.members, grads, ranks_with, strict=True)
            if ranks
        ]
        if self._overflows(pieces, norm * clip, clip * unscale, layout):
            self.last_step_skipped = True
            self.skipped_steps += 1
            return [], 1.0
        return pieces, clip * unscale

    def _overflows(self, pieces: Sequence[Piece], norm: float, factor: float, layout: Layout) -> bool:
        """Whether the state of some rank would not be finite after these gradients. No element is larger than the norm of all,
        so that is seldom looked at.
        """
        if norm <= min(_largest_gradient(torch.float32, group) for group in self.param_groups):
            return False
        too_large = any(
            float(piece.grad.abs().max()) * factor > _largest_gradient(piece.parameter.dtype, piece.group)
            for piece in pieces
            if piece.grad.numel()
        )
        verdict = torch.tensor(float(too_large), device=layout.device)
        return bool(layout.sum_over_ranks(verdict, None, [])[0])

    # State

    def _made_layout(self) -> Layout:
        """Made again after a copy or a load with pickle."""
        if self._layout is None:
            self._lay_out()
        assert self._layout is not None
        return self._layout

    def _lay_out(self) -> None:
        """Deal parameters out, and allocate the state that is not there; under ZeRO-1 state moves with its elements."""
        before, members = self._layout, []
        for group in self.param_groups:
            members += [Member(parameter, name, group) for parameter, name in _named(group) if parameter.numel()]
        layout = lay_out(members, self.process_group, self.partition, self.split_strategy)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(_new_state(parameter, group, layout))
                elif before is not None and before.held.get(parameter) != layout.held.get(parameter):
                    before.move_state(parameter, state, layout)
        self._layout = layout

    def state_dict(self) -> dict[str, Any]:
        """What this rank holds, in torch's layout, with a `layout` that says which part of the whole it is. The same ranks
        load it again; full_state_dict and sharded_state_dict are for any number of ranks.
        """
        self.check_options()
        state = super().state_dict()
        groups = [{key: plain(value) for key, value in group.items()} for group in state["param_groups"]]
        return {**state, "param_groups": groups, "layout": layout_of(self)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state. That of torch.optim.Muon loads too, with its coefficients and its rule for the learning
        rate. Over ranks, all of them load together.

        Momentum takes the momentum_dtype of the state, if that has one; else every tensor keeps the dtype that this optimizer
        gave it, whatever the dtype of the parameter.

        Raises:
            OptimizerStateError: Other ranks, groups, names or shapes, or values that are not finite; nothing is changed.
        """
        if isinstance(state_dict, Mapping):
            state_dict = dict(state_dict)
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = hook(self, state_dict) or state_dict
        load_rank_state(self, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def full_state_dict(self, *, rank0_only: bool = True) -> dict[str, Any]:
        """The whole state by parameter name; see vlkit.optim.state."""
        return full_state_dict(self, rank0_only=rank0_only)

    def load_full_state_dict(
        self,
        state: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
        *,
        reinitialize: Sequence[str] = (),
        options: bool = True,
    ) -> None:
        """Take over a whole state, of vlkit or torch, on any number of ranks; see vlkit.optim.state."""
        load_full_state_dict(self, state, reinitialize=reinitialize, options=options)

    def sharded_state_dict(self) -> dict[str, Tensor]:
        """What this rank holds of every tensor, for torch.distributed.checkpoint; see vlkit.optim.state."""
        return sharded_state_dict(self)

    def load_sharded_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a sharded state that was filled in place; see vlkit.optim.state."""
        load_sharded_state_dict(self, state)


def _new_state(parameter: Tensor, group: Group, layout: Layout) -> dict[str, Tensor]:
    """Zeros for what this rank holds: of the parameter's shape, a DTensor like it, or 1-D under ZeRO-1."""
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    if group["algorithm"] == "muon":
        state = {
            "momentum_buffer": layout.zeros(parameter, momentum_dtype_of(parameter.dtype, group["momentum_dtype"]))
        }
        if group["variant"] == "normuon":
            rows = num_rows(units_of(parameter)) if parameter.numel() else 0
            state[STATE_KEY["normuon"]] = torch.zeros(rows, dtype=wide, device=parameter.device)
        if group["variant"] == "adamuon":
            state[STATE_KEY["adamuon"]] = layout.zeros(parameter, wide)
        return state
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, **{key: layout.zeros(parameter, wide) for key in ADAMW_STATE}}


def _largest_gradient(dtype: torch.dtype, group: Group) -> float:
    """Elements up to which the state stays finite: means of them, their squares in AdamW, rounding included."""
    if group["algorithm"] == "muon":
        return torch.finfo(momentum_dtype_of(dtype, group["momentum_dtype"])).max / 4
    return math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).max) / 2


def _by_group(pieces: Sequence[Piece], algorithm: str) -> list[tuple[Group, list[Piece]]]:
    groups: dict[int, tuple[Group, list[Piece]]] = {}
    for piece in pieces:
        if piece.group["algorithm"] == algorithm:
            groups.setdefault(id(piece.group), (piece.group, []))[1].append(piece)
    return list(groups.values())


def _elements(pieces: Sequence[Piece]) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]]]:
    """Weights, gradients and state, for an algorithm that looks at every element by itself."""
    return [piece.elements() for piece in pieces], [piece.grad for piece in pieces], [piece.state for piece in pieces]


def _named(group: Group) -> list[tuple[Tensor, str]]:
    names = group.get("param_names") or [f"parameter {i} of its group" for i in range(len(group["params"]))]
    return list(zip(group["params"], names, strict=True))


def check_group(group: Group, known: Mapping[str, Any]) -> None:
    """Raises ConfigError if options of a group cannot be used."""
    unknown = set(group) - set(known) - {"params", "param_names", "initial_lr"}
    if unknown:
        raise ConfigError(f"unknown option {sorted(unknown)} in a parameter group; known are {', '.join(known)}")
    if group["algorithm"] not in ("muon", "adamw"):
        raise ConfigError(f"algorithm is 'muon' or 'adamw', found {group['algorithm']!r}")
    for key, names in (("adjust_lr", tuple(ADJUST_LR)), ("variant", VARIANTS)):
        if group[key] not in names:
            raise ConfigError(f"{key} is one of {', '.join(names)}, found {group[key]!r}")
    for key in ("lr", "weight_decay", "rms_scale", "adam_eps"):
        if not 0 <= _number(key, group[key]) < math.inf:
            raise ConfigError(f"{key} must not be negative, found {group[key]}")
    betas = group["betas"]
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ConfigError(f"betas are two numbers, found {betas!r}")
    for key, decays in (("momentum", [group["momentum"]]), ("betas", betas), ("variant_beta", [group["variant_beta"]])):
        if not all(0 <= _number(key, decay) < 1 for decay in decays):
            raise ConfigError(f"{key} must lie in [0, 1), found {group[key]}")
    for key in ("nesterov", "maximize", "cautious_wd"):
        if not isinstance(group[key], bool):
            raise ConfigError(f"{key} is True or False, found {group[key]!r}")
    dtype = group["momentum_dtype"]
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"momentum_dtype must be a floating-point dtype, found {dtype!r}")
    newton_schulz_of(group)


def _number(key: str, value: Any) -> float:
    """The value of an option, of a tensor with one element too.

    Raises:
        ConfigError: It is no number.
    """
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{key} is a number, found {value!r}") from None


def _mirror_momentum(group: Group) -> None:
    """In a Muon group betas[0] and momentum are one number, so that schedulers of AdamW's momentum move both."""
    if group["algorithm"] == "muon":
        group["betas"] = (group["momentum"], group["betas"][1])


def _options(group: Group, known: Mapping[str, Any]) -> dict[str, Any]:
    """Of a group, as plain values that can be compared with later ones."""
    return {key: float(group[key]) if _is_scalar(group[key]) else group[key] for key in known if key in group}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _check_member(process_group: Any) -> None:
    """Raises ConfigError if this process is no member of the ranks it is to work with."""
    if process_group is None:
        return
    if isinstance(process_group, dist.ProcessGroup) and dist.get_rank(process_group) >= 0:
        return
    raise ConfigError(
        f"process_group must be a torch.distributed.ProcessGroup that this rank is a member of, found {process_group!r}; "
        f"new_group gives other ranks such a value: build the optimizer on the group's own ranks only"
    )


def _check_names(new: Group, groups: Sequence[Group]) -> None:
    """Raises ConfigError if a group is to join others that have names and has none, or the other way round."""
    if not isinstance(new, dict) or isinstance(new["params"], set):
        return  # torch refuses it
    new["params"] = [new["params"]] if isinstance(new["params"], Tensor) else list(new["params"])
    has_names = "param_names" in new or any(isinstance(entry, tuple) for entry in new["params"])
    if groups and has_names != ("param_names" in groups[0]):
        raise ConfigError(
            f"the parameters of this optimizer have {'no ' * has_names}names and those of the new group have "
            f"{'' if has_names else 'no '}names; "
            + ("leave them out" if has_names else "write 'params' as a list of (name, parameter)")
        )


def _check_parameter(parameter: Tensor, name: str, group: Group) -> None:
    if not parameter.is_floating_point() or parameter.element_size() == 1:
        raise ConfigError(
            f"{name} is {parameter.dtype}; Muon and its AdamW take real floating-point parameters of 2 to 8 bytes"
        )
    local = local_of(parameter)
    if any(size > 1 and stride == 0 for size, stride in zip(local.shape, local.stride(), strict=True)):
        raise ConfigError(
            f"{name} {tuple(parameter.shape)} is expanded, so several of its elements are one in memory; make it with "
            f".contiguous() or .clone()"
        )
    if group["algorithm"] == "muon" and parameter.numel():
        form = newton_schulz_of(group)
        dtype = form.compute_dtype(parameter.device)
        for units in units_of(parameter, name):
            form.uses_gram(units.rows, units.cols, dtype)  # raises where a forced Gram form would diverge
