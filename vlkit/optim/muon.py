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
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from vlkit.errors import ConfigError, OptimizerStateError
from vlkit.optim.newton_schulz import Form, NewtonSchulz, Norm, Triple
from vlkit.optim.units import Units, units_of
from vlkit.optim.update import (
    ADJUST_LR,
    AdjustLr,
    Block,
    adamw_update,
    apply_update,
    batches,
    global_norm,
    orthogonalize_units,
    update_momentum,
)

Group: TypeAlias = dict[str, Any]


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised, with AdamW inside for embeddings, heads, norms and biases.

    Each group says `algorithm: "muon"` (the default) or `"adamw"`; `muon_param_groups(model)` makes both. Every option
    but max_grad_norm can differ between groups. With adjust_lr="match_rms_adamw" one learning rate and weight decay,
    tuned for AdamW, serve both.

    A gradient that is not finite changes nothing: neither weights nor state. The step is counted in `skipped_steps` and
    `last_step_skipped` says so. `last_grad_norm` is the norm over all gradients, before clipping. Gradients are never
    written to.

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
        ns: Newton-Schulz preset or coefficients; this and the next four are those of vlkit.optim.orthogonalize.
        ns_steps: Number of Newton-Schulz steps, None for the preset's own.
        ns_norm: "frobenius" or "schatten8".
        ns_dtype: Of the Newton-Schulz products.
        ns_form: "auto", "standard" or "gram".
        betas: Of AdamW.
        adam_eps: Of AdamW.
        momentum_dtype: Of Muon's state; fp64 parameters keep fp64. AdamW's state is fp32, or fp64 for fp64 parameters.
        max_grad_norm: Clip the norm over all gradients to this; None does not clip.
        maximize: Ascend.

    Raises:
        ConfigError: Unknown or contradictory options, or a parameter that cannot take its group's algorithm.

    Source: Moonlight, arXiv:2502.16982, equation 4 and algorithm 1 (on one process).
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
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm must be above 0 or None, found {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.skipped_steps = 0
        self.last_step_skipped = False
        self.last_grad_norm: Tensor | None = None
        self._units: dict[
            Tensor, list[Units]
        ] = {}  # made once: for many small matrices it would cost as much as the products
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
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; its options are checked and its state is allocated at once, so that a checkpoint always has
        every key.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group, self.defaults)
            for parameter, name in _named(group):
                _check_parameter(parameter, name, group)
                if group["algorithm"] == "muon":
                    self._units[parameter] = units_of(parameter, name)
        except ConfigError:
            self.param_groups.pop()
            raise
        for parameter in group["params"]:
            self._state_of(parameter, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: Computes the loss and the gradients again.

        Returns:
            What the closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        active = [[p for p in group["params"] if p.grad is not None and p.numel()] for group in self.param_groups]
        factor = self._check_gradients([p.grad for p in chain.from_iterable(active)])
        if factor is None:
            return loss
        for group, parameters in zip(self.param_groups, active, strict=True):
            if not parameters:
                continue
            scale = -factor if group["maximize"] else factor
            grads: list[Tensor] = [p.grad for p in parameters]
            if scale != 1.0:
                grads = list(torch._foreach_mul(grads, scale))
            if group["algorithm"] == "muon":
                self._muon_step(group, parameters, grads)
            else:
                self._adamw_step(group, parameters, grads)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle; the base class would leave out what is not of the groups."""
        own = ("max_grad_norm", "skipped_steps", "last_step_skipped", "last_grad_norm", "_units")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    # The stages of a step

    def _check_gradients(self, grads: list[Tensor]) -> float | None:
        """The factor that clips all gradients, or None if the step has to be skipped; no state is touched before
        this is known.
        """
        self.last_step_skipped = False
        if not grads:
            return 1.0
        for grad in grads:
            if grad.layout != torch.strided:
                raise ConfigError(
                    f"Muon takes dense gradients, found {grad.layout}; build the embedding with sparse=False"
                )
        norm = global_norm(grads)
        self.last_grad_norm = norm
        value = norm.item()
        if not math.isfinite(value) and not all(bool(grad.isfinite().all()) for grad in grads):
            self.last_step_skipped = True
            self.skipped_steps += 1
            return None
        if self.max_grad_norm is None:
            return 1.0
        return min(1.0, self.max_grad_norm / (value + 1e-6))

    def _muon_step(self, group: Group, parameters: list[Tensor], grads: list[Tensor]) -> None:
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        newton_schulz = _newton_schulz(
            *(_hashable(group[key]) for key in ("ns", "ns_steps", "ns_norm", "ns_dtype", "ns_form"))
        )
        blocks: list[Block] = []
        copies: list[tuple[Tensor, Tensor]] = []
        for parameter, grad in zip(parameters, grads, strict=True):
            weight = parameter.contiguous()  # a copy only for layouts such as channels_last
            if weight is not parameter:
                copies.append((parameter, weight))
            momentum, grad = self._state_of(parameter, group)["momentum_buffer"], grad.contiguous()
            blocks += [
                Block(units.view(weight), units.view(grad), units.view(momentum)) for units in self._units[parameter]
            ]
        for batch in batches(blocks):
            directions = update_momentum(batch, group["momentum"], group["nesterov"])
            results = orthogonalize_units(directions, newton_schulz)
            rows, cols = batch[0].weight.shape[1:]
            factor = ADJUST_LR[group["adjust_lr"]](rows, cols, group["rms_scale"])
            apply_update([block.weight for block in batch], results, 1 - lr * decay, -lr * factor)
        for parameter, weight in copies:
            parameter.copy_(weight)

    def _adamw_step(self, group: Group, parameters: list[Tensor], grads: list[Tensor]) -> None:
        adamw_update(
            parameters,
            grads,
            [self._state_of(parameter, group) for parameter in parameters],
            lr=group["lr"],
            betas=group["betas"],
            weight_decay=group["weight_decay"],
            eps=group["adam_eps"],
        )

    # State

    def _state_of(self, parameter: Tensor, group: Group) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            if group["algorithm"] == "muon":
                dtype = (
                    torch.promote_types(wide, group["momentum_dtype"])
                    if wide == torch.float64
                    else group["momentum_dtype"]
                )
                state["momentum_buffer"] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
            else:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros(parameter.shape, dtype=wide, device=parameter.device)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state. That of torch.optim.Muon loads too, with its coefficients and its rule for the learning
        rate.

        Every tensor keeps the dtype that this optimizer gave it, whatever the dtype of the parameter.

        Raises:
            OptimizerStateError: Other groups, other parameter names, or other shapes.
        """
        saved_groups = [_complete(saved, own) for saved, own in self._paired_groups(state_dict)]
        saved_ids = list(chain.from_iterable(group["params"] for group in saved_groups))
        parameters = [
            (parameter, name, group)
            for group, saved in zip(self.param_groups, saved_groups, strict=True)
            for parameter, name in _named(group)
        ]
        own = {parameter: dict(self._state_of(parameter, group)) for parameter, _, group in parameters}
        for (parameter, name, _), saved_id in zip(parameters, saved_ids, strict=True):
            saved = state_dict["state"].get(saved_id, {})
            for key, value in saved.items():
                if key not in own[parameter]:
                    raise OptimizerStateError(
                        f"{name}: the saved state has {key!r}, expected {', '.join(own[parameter])}"
                    )
                if torch.is_tensor(value) and value.shape != own[parameter][key].shape:
                    raise OptimizerStateError(
                        f"{name}: the saved {key} has shape {tuple(value.shape)}, the parameter needs "
                        f"{tuple(own[parameter][key].shape)}; were the groups built from the same model?"
                    )
        super().load_state_dict({"state": state_dict["state"], "param_groups": saved_groups})
        # The base class casts to the parameter's dtype on the way; so take the values from the source again.
        for (parameter, _, _), saved_id in zip(parameters, saved_ids, strict=True):
            saved = state_dict["state"].get(saved_id, {})
            self.state[parameter] = {
                key: torch.as_tensor(saved[key]).to(fresh.device, fresh.dtype, copy=True) if key in saved else fresh
                for key, fresh in own[parameter].items()
            }

    def _paired_groups(self, state_dict: Mapping[str, Any]) -> list[tuple[Group, Group]]:
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise OptimizerStateError(
                f"the saved state has {len(saved_groups)} groups, this optimizer has {len(self.param_groups)}"
            )
        for index, (saved, own) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            if len(saved["params"]) != len(own["params"]):
                raise OptimizerStateError(
                    f"group {index}: the saved state has {len(saved['params'])} parameters, "
                    f"this optimizer has {len(own['params'])}"
                )
            if saved.get("algorithm", own["algorithm"]) != own["algorithm"]:
                raise OptimizerStateError(
                    f"group {index}: the saved state is of {saved['algorithm']!r}, this group runs {own['algorithm']!r}"
                )
            for theirs, ours in zip(saved.get("param_names", ()), own.get("param_names", ()), strict=False):
                if theirs != ours:
                    raise OptimizerStateError(
                        f"group {index}: the saved state has parameter {theirs!r} where this optimizer has {ours!r}; "
                        f"build the groups in the same order"
                    )
        return list(zip(saved_groups, self.param_groups, strict=True))


def _named(group: Group) -> list[tuple[Tensor, str]]:
    names = group.get("param_names") or [f"parameter {i} of its group" for i in range(len(group["params"]))]
    return list(zip(group["params"], names, strict=True))


@lru_cache(maxsize=64)
def _newton_schulz(ns: Any, steps: Any, norm: Any, dtype: Any, form: Any) -> NewtonSchulz:
    return NewtonSchulz.make(ns, steps, norm, dtype, form)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value


def _check_group(group: Group, known: Mapping[str, Any]) -> None:
    unknown = set(group) - set(known) - {"params", "param_names", "initial_lr"}
    if unknown:
        raise ConfigError(f"unknown option {sorted(unknown)} in a parameter group; known are {', '.join(known)}")
    if group["algorithm"] not in ("muon", "adamw"):
        raise ConfigError(f"algorithm is 'muon' or 'adamw', found {group['algorithm']!r}")
    if group["adjust_lr"] not in ADJUST_LR:
        raise ConfigError(f"adjust_lr is one of {', '.join(ADJUST_LR)}, found {group['adjust_lr']!r}")
    for key in ("lr", "weight_decay", "rms_scale", "adam_eps"):
        if not float(group[key]) >= 0:
            raise ConfigError(f"{key} must not be negative, found {group[key]}")
    for key, decays in (("momentum", [group["momentum"]]), ("betas", group["betas"])):
        if not all(0 <= decay < 1 for decay in decays):
            raise ConfigError(f"{key} must lie in [0, 1), found {group[key]}")
    if not group["momentum_dtype"].is_floating_point:
        raise ConfigError(f"momentum_dtype must be a floating-point dtype, found {group['momentum_dtype']}")
    _newton_schulz(*(_hashable(group[key]) for key in ("ns", "ns_steps", "ns_norm", "ns_dtype", "ns_form")))


def _check_parameter(parameter: Tensor, name: str, group: Group) -> None:
    if not parameter.is_floating_point():
        raise ConfigError(f"{name} is {parameter.dtype}; Muon and its AdamW take real floating-point parameters")
    if hasattr(parameter, "placements"):
        raise ConfigError(
            f"{name} is a DTensor; this optimizer works on whole parameters, so use it without fully_shard"
        )
    if group["algorithm"] == "muon" and parameter.numel():
        form = _newton_schulz(*(_hashable(group[key]) for key in ("ns", "ns_steps", "ns_norm", "ns_dtype", "ns_form")))
        dtype = form.compute_dtype(parameter.device)
        for units in units_of(parameter, name):
            form.uses_gram(units.rows, units.cols, dtype)  # raises where a forced Gram form would diverge


def _complete(saved: Group, own: Group) -> Group:
    """A saved group with every option of ours: what it lacks stays as it is here."""
    saved = dict(saved)
    if "ns_coefficients" in saved:  # torch.optim.Muon
        saved["ns"] = tuple(saved.pop("ns_coefficients"))
        saved["adjust_lr"] = saved.pop("adjust_lr_fn", None) or "original"
        saved.pop("eps", None)
    return {**own, **saved}
