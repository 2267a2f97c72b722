"""The stages of one Muon step, as functions on lists of tensors.

    gradient -> momentum, Nesterov -> orthogonalise -> weight decay, then subtract lr * factor * unit

All but the orthogonalisation are elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vlkit.errors import ConfigError
from vlkit.optim.newton_schulz import BATCH_BYTES, BATCHED_BELOW, NewtonSchulz
from vlkit.optim.variants import adapt_

AdjustLr: TypeAlias = Literal["match_rms_adamw", "original", "spectral_unclamped", "none"]

ADJUST_LR: dict[str, Callable[[int, int, float], float]] = {
    # An orthogonal matrix has elements of size 1 / sqrt(max(rows, cols)); AdamW's updates are 0.2 to 0.4.
    "match_rms_adamw": lambda rows, cols, rms: rms * math.sqrt(max(rows, cols)),
    "original": lambda rows, cols, rms: math.sqrt(max(1.0, rows / cols)),
    "spectral_unclamped": lambda rows, cols, rms: math.sqrt(rows / cols),
    "none": lambda rows, cols, rms: 1.0,
}


ADAMW_STATE = ("exp_avg", "exp_avg_sq")
SMALL = 4096  # elements, of vectors that are cheaper joined than cut


@dataclass
class Block:
    """Units of one parameter that are treated together, as views [count, rows, cols].

    Attributes:
        weight: Of the parameter.
        grad: Its gradient.
        momentum: Its state.
        second_moment: State of a variant: [count, rows] of "normuon", [count, rows, cols] of "adamuon".
    """

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    second_moment: Tensor | None = None

    def one(self, index: int) -> Block:
        """Unit `index` alone."""
        part = slice(index, index + 1)
        second_moment = None if self.second_moment is None else self.second_moment[part]
        return Block(self.weight[part], self.grad[part], self.momentum[part], second_moment)


@dataclass(frozen=True)
class OwnFunction:
    """An orthogonalisation that the user wrote, in the place of NewtonSchulz."""

    function: Callable[[Tensor], Tensor]
    dtype: torch.dtype | Literal["auto"]

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        return torch.float32 if self.dtype == "auto" else self.dtype

    def uses_gram(self, rows: int, cols: int, dtype: torch.dtype) -> bool:
        return False

    def __call__(self, x: Tensor) -> Tensor:
        """Called with a copy: x may be the momentum itself."""
        result = self.function(x.clone(memory_format=torch.contiguous_format))
        if not isinstance(result, Tensor) or result.shape != x.shape:
            found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ConfigError(f"ns={shown(self.function)} was given matrices {tuple(x.shape)} and returned {found}")
        return result.to(x.dtype)


def batches(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Blocks of equal unit shape, device and dtypes: small units as many together as stay near the caches, large
    ones one by one.
    """
    waiting: dict[tuple[object, ...], list[Block]] = {}
    for block in blocks:
        count, rows, cols = block.weight.shape
        if min(rows, cols) >= BATCHED_BELOW:
            for i in range(count):
                yield [block.one(i)]
        else:
            key = (rows, cols, block.weight.device, block.weight.dtype, block.grad.dtype, block.momentum.dtype)
            waiting.setdefault(key, []).append(block)
    for equal in waiting.values():
        batch: list[Block] = []
        size = 0
        for block in equal:
            if batch and size + block.weight.numel() * 2 > BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(block)
            size += block.weight.numel() * 2
        yield batch


def momentum_dtype_of(dtype: torch.dtype, momentum_dtype: torch.dtype) -> torch.dtype:
    """Of the momentum of a parameter of `dtype`: as asked for, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else momentum_dtype


def update_momentum(blocks: list[Block], options: Mapping[str, Any], factor: float) -> list[Tensor]:
    """Move the running means towards the gradients, and return the directions; elementwise, so exact on any slice of
    a unit.

    Args:
        blocks: Of equal dtypes; the momentum is written to.
        options: A parameter group.
        factor: That clips and unscales gradients.
    """
    momentum = options["momentum"]
    state = [block.momentum for block in blocks]
    wide = torch.promote_types(state[0].dtype, torch.float32)
    means = _cast(state, wide)
    grads = _cast(_scaled([block.grad for block in blocks], options, factor), wide)
    torch._foreach_lerp_(means, grads, 1 - momentum)
    if means[0] is not state[0]:
        torch._foreach_copy_(state, means)
    return list(torch._foreach_lerp(grads, means, momentum)) if options["nesterov"] else means


def orthogonalize_units(directions: list[Tensor], newton_schulz: NewtonSchulz | OwnFunction) -> list[Tensor]:
    """The orthogonalised units, in the dtype of the directions; one batched product for all."""
    dtype = newton_schulz.compute_dtype(directions[0].device)
    if len(directions) == 1:
        return [newton_schulz(directions[0].to(dtype)).to(directions[0].dtype)]
    counts = [len(direction) for direction in directions]
    stacked = directions[0].new_empty(sum(counts), *directions[0].shape[1:], dtype=dtype)
    torch._foreach_copy_(list(stacked.split(counts)), directions)
    return list(newton_schulz(stacked).to(directions[0].dtype).split(counts))


def adapt_updates(blocks: list[Block], updates: list[Tensor], options: Mapping[str, Any]) -> None:
    """What a variant does to orthogonalised units, whole ones; updates and second moments are written to."""
    if options["variant"] != "none":
        for block, update in zip(blocks, updates, strict=True):
            assert block.second_moment is not None
            adapt_(update, block.second_moment, options["variant"], options["variant_beta"])


def update_weights(
    weights: list[Tensor], updates: list[Tensor], options: Mapping[str, Any], rows: int, cols: int
) -> None:
    """weight <- (1 - lr * weight_decay) * weight - lr * factor * update, rounded once; elementwise.

    With cautious_wd only those elements decay that the update moves towards zero too.

    Args:
        weights: Units, or slices of units; written to.
        updates: The same elements of the orthogonalised units.
        options: A parameter group.
        rows: Rows of the units.
        cols: Columns of the units.
    """
    lr = float(options["lr"])
    factor = ADJUST_LR[options["adjust_lr"]](rows, cols, options["rms_scale"])
    decay, scale = 1 - lr * float(options["weight_decay"]), -lr * factor
    wide = _cast(weights, updates[0].dtype)
    if options["cautious_wd"] and decay != 1.0:
        for weight, update in zip(wide, updates, strict=True):
            weight.mul_(torch.where(weight * update > 0, decay, 1.0))
    elif decay != 1.0:
        torch._foreach_mul_(wide, decay)
    torch._foreach_add_(wide, updates, alpha=scale)
    if wide[0] is not weights[0]:
        torch._foreach_copy_(weights, wide)


def adamw_update(
    weights: list[Tensor],
    grads: list[Tensor],
    states: Sequence[dict[str, Tensor]],
    options: Mapping[str, Any],
    factor: float,
) -> None:
    """One step of AdamW on weights and state, in the dtype of the state; elementwise, and exact on any slice.

    Args:
        weights: Parameters, or slices of them, contiguous; written to.
        grads: The same elements of the gradients.
        states: The same elements of exp_avg and exp_avg_sq, and step.
        options: A parameter group.
        factor: That clips and unscales gradients.
    """
    torch._foreach_add_([state["step"] for state in states], 1)
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, (weight, state) in enumerate(zip(weights, states, strict=True)):
        if weight.numel():
            alike.setdefault((weight.device, weight.dtype, grads[i].dtype, state["exp_avg"].dtype), []).append(i)
    for some in alike.values():
        ours, state_of = [weights[i] for i in some], [states[i] for i in some]
        means, squares = ([state[key] for state in state_of] for key in ADAMW_STATE)
        wide = _cast(ours, means[0].dtype)
        scaled = _cast(_scaled([grads[i] for i in some], options, factor), means[0].dtype)
        steps = [state["step"] for state in state_of]
        with _whole_vectors([wide, means, squares, scaled], steps) as (columns, counters):
            _adamw(columns, counters, options)
        if wide is not ours:
            torch._foreach_copy_(ours, wide)


def _adamw(columns: list[list[Tensor]], steps: list[Tensor], options: Mapping[str, Any]) -> None:
    """Steps are those after this one."""
    weights, means, squares, grads = columns
    beta1, beta2 = options["betas"]
    rates = {"lr": float(options["lr"]), "weight_decay": float(options["weight_decay"]), "eps": options["adam_eps"]}
    same: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False, **rates}
    if all(weight.device.type in ("cpu", "cuda") for weight in weights):
        torch._fused_adamw_(weights, grads, means, squares, [], steps, **same)
    else:
        adamw(weights, grads, means, squares, [], list(torch._foreach_sub(steps, 1)), **same)


@contextmanager
def _whole_vectors(
    columns: list[list[Tensor]], steps: list[Tensor]
) -> Iterator[tuple[list[list[Tensor]], list[Tensor]]]:
    """On CPUs the same elements in tensors of multiples of 64 bytes: what tensors have beyond that, or all of a small one,
    is joined to extra tensors, and copied back afterwards; but for the last column, which is only read.

    The fused kernel treats the last elements of a tensor, fewer than a vector register holds, with code that rounds
    differently. So an element's result would depend on where in a slice it lies.
    """
    size = 64 // columns[0][0].element_size()
    on_cpu = columns[0][0].device.type == "cpu"
    at_step: dict[float, list[tuple[int, int]]] = {}  # joined are those of one step: (index, first element)
    whole: list[tuple[int, int]] = []  # (index, end of the elements that stay)
    for i, weight in enumerate(columns[0]):
        numel = weight.numel()
        rest = numel % size if on_cpu else 0
        first = 0 if rest and numel <= SMALL else numel - rest
        if first:
            whole.append((i, first))
        if first < numel:
            at_step.setdefault(float(steps[i]), []).append((i, first))
    if not at_step:
        yield columns, steps
        return
    result = [[_elements(column[i], 0, stop) for i, stop in whole] for column in columns]
    counters = [steps[i] for i, _ in whole]
    copies = []
    for rests in at_step.values():
        counters.append(steps[rests[0][0]])
        for column, joined in zip(columns, result, strict=True):
            parts = [_elements(column[i], first, column[i].numel()) for i, first in rests]
            sizes = [part.numel() for part in parts]
            padding = column[0].new_zeros(-sum(sizes) % size)
            joined.append(torch.cat([*parts, padding]))
            if column is not columns[-1]:
                copies.append((parts, joined[-1].split([*sizes, len(padding)])[:-1]))
    yield result, counters
    for parts, joined_parts in copies:
        torch._foreach_copy_(parts, list(joined_parts))


def _elements(tensor: Tensor, start: int, stop: int) -> Tensor:
    """A run of elements of a contiguous tensor, 1-D; itself where that is all."""
    flat = tensor if tensor.ndim == 1 else tensor.view(-1)
    return flat if stop - start == flat.numel() else flat[start:stop]


@lru_cache(maxsize=64)
def _newton_schulz(*options: Any) -> NewtonSchulz:
    return NewtonSchulz.make(*options)


def newton_schulz_of(options: Mapping[str, Any]) -> NewtonSchulz | OwnFunction:
    """How a parameter group orthogonalises.

    Raises:
        ConfigError: Options that cannot be used.
    """
    if callable(options["ns"]):
        if options["ns_steps"] is not None or options["ns_norm"] != "frobenius" or options["ns_form"] != "auto":
            raise ConfigError(
                "ns is a function, which ns_steps, ns_norm and ns_form have no meaning for; leave them out"
            )
        if options["ns_dtype"] not in ("auto", torch.bfloat16, torch.float32, torch.float64):
            raise ConfigError(f"ns_dtype is 'auto', bfloat16, float32 or float64, found {options['ns_dtype']!r}")
        return OwnFunction(options["ns"], options["ns_dtype"])
    ns, steps = options["ns"], options["ns_steps"]
    if not isinstance(ns, str | list | tuple):
        raise ConfigError(f"ns is the name of a preset, coefficients or a function, found {ns!r}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
        raise ConfigError(f"ns_steps is a whole number or None, found {steps!r}")
    return _newton_schulz(*(_hashable(options[key]) for key in ("ns", "ns_steps", "ns_norm", "ns_dtype", "ns_form")))


def shown(value: Any) -> Any:
    """An option as a state or a message can hold it: functions by name."""
    if isinstance(value, torch.dtype) or not callable(value):
        return value
    return f"function {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"


def without_functions(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Saved options but functions, of which a state has the names only: a group keeps what it was built with."""
    named = {key for key, value in options.items() if isinstance(value, str) and value.startswith("function ")}
    return {key: value for key, value in options.items() if key not in named and shown(own.get(key)) is own.get(key)}


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value


def _scaled(grads: list[Tensor], options: Mapping[str, Any], factor: float) -> list[Tensor]:
    scale = -factor if options["maximize"] else factor
    return grads if scale == 1.0 else list(torch._foreach_mul(grads, scale))


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """All to one dtype; no copies where they have it."""
    return tensors if all(tensor.dtype == dtype for tensor in tensors) else [tensor.to(dtype) for tensor in tensors]
