"""QK-Clip: after a step, the projections of heads whose attention logits have grown beyond a limit are scaled back.

    with record_max_logits(model) as max_logits:            # the largest logit of every head, by module name
        loss = model(batch).loss; loss.backward()           # as many micro-batches as there are
    optimizer.step()
    reduce_max_logits_(max_logits, group)                   # where ranks saw different data
    qk_clip_(model, max_logits, tau=100.0)

A logit is the scaled score of a query and a key that it sees, before the softmax. The weights alone are scaled; no
optimizer has a part in it, and its momentum stays as it is.

Source: MuonClip in Kimi K2, arXiv:2507.20534, section 2.1; for grouped queries, as Megatron-LM does it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.errors import ConfigError, LayoutError, NonFiniteError
from vlkit.optim.groups import HasHeads, Heads
from vlkit.packing import Layout, Segments

CHUNK_BYTES = 1 << 24  # of scores that exist at once

# Powers of gamma on the channels of each role, so that every term of a score gets gamma once. The rotated key of latent
# attention belongs to all heads and keeps its size, so its query takes all of it.
EXPONENTS: dict[str, Callable[[float], float]] = {
    "q": lambda alpha: alpha,
    "k": lambda alpha: 1 - alpha,
    "q_nope": lambda alpha: alpha,
    "k_nope": lambda alpha: 1 - alpha,
    "q_rope": lambda alpha: 1.0,
    "v": lambda alpha: 0.0,
}


@runtime_checkable
class Attention(HasHeads, Protocol):
    """An attention whose scores can be computed again: the classes of vlkit.layers."""

    @property
    def scale(self) -> float: ...
    @property
    def causal(self) -> bool: ...
    @property
    def normalizes_heads(self) -> bool: ...

    def queries_and_keys(self, x: Tensor, rotary: Any) -> tuple[Tensor, Tensor]: ...


@contextmanager
def record_max_logits(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the largest logit of every head in all forwards inside the context.

    Queries and keys are projected a second time and multiplied in fp32 in pieces of CHUNK_BYTES, whatever kernel the
    forward itself uses; outside of the context nothing is computed and no hook is left. It costs about what the
    attention's own forward does without its values, so record every few steps where that is too much.

    Args:
        model: Any module; recorded are the attentions in it that follow `Attention`.

    Yields:
        fp32 [heads] by module name; -inf for what has not run, on every rank for the same modules.

    Raises:
        ConfigError: The model has no such attention.
        LayoutError: A forward with a cache, whose older keys are not at hand.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no attention whose logits can be recorded; vlkit.layers has LatentAttention, "
            "GroupedQueryAttention and SelfAttention"
        )
    records = {name: torch.full((_num_heads(module, "q"),), -torch.inf) for name, module in found.items()}
    hooks = [
        module.register_forward_pre_hook(partial(_record, records, name), with_kwargs=True)  # type: ignore[attr-defined]
        for name, module in found.items()
    ]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _record(records: dict[str, Tensor], name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    if given.get("cache") is not None:
        raise LayoutError(f"{name}: logits are recorded of whole sequences; run the forward without a cache")
    q, k = module.queries_and_keys(given["x"], given["rotary"])
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k))  # what attention multiplies
    found = max_logits_per_head(q, k, given["layout"], causal=module.causal, scale=module.scale).float()
    records[name] = torch.maximum(records[name].to(found.device), found)


def max_logits_per_head(
    q: Float[Tensor, "tokens heads head_dim"],
    k: Float[Tensor, "tokens kv_heads head_dim"],
    layout: Layout | Segments,
    *,
    causal: bool,
    scale: float,
) -> Float[Tensor, " heads"]:
    """The largest scale * q . k over all pairs that attend to each other, in fp32 (fp64 for fp64 input).

    Args:
        layout: The items; tokens of different items never meet.
        causal: A query meets the keys up to its own.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    bounds = (layout.cu_seqlens("cpu") if isinstance(layout, Layout) else layout.offsets).tolist()
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    largest = torch.full((num_heads,), -torch.inf, dtype=wide, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for first, last in pairwise(bounds):
            rows = max(1, CHUNK_BYTES // (num_heads * (last - first) * largest.element_size()))
            keys = k[first:last].to(wide).permute(1, 2, 0)  # [kv_heads, head_dim, keys]
            for start in range(first, last, rows):
                stop = min(start + rows, last)
                queries = q[start:stop].to(wide).unflatten(1, (num_kv_heads, -1))  # [rows, kv_heads, group, head_dim]
                seen = stop - first if causal else last - first
                scores = torch.matmul(
                    queries.permute(1, 2, 0, 3), keys[:, None, :, :seen]
                )  # [kv_heads, group, rows, keys]
                if causal:
                    later = torch.ones(stop - start, seen, dtype=torch.bool, device=q.device).triu(start - first + 1)
                    scores.masked_fill_(later, -torch.inf)
                largest = torch.maximum(largest, (scores * scale).amax((-2, -1)).flatten())
    return largest


def reduce_max_logits_(max_logits: dict[str, Tensor], process_group: dist.ProcessGroup | None = None) -> None:
    """The largest over all ranks of the group, on every rank, by one reduction. Every rank has to call it.

    Args:
        max_logits: From `record_max_logits` on the same model.
        process_group: The ranks that saw different data; None is all.
    """
    names = list(max_logits)
    device = next((values.device for values in max_logits.values() if values.device.type != "cpu"), torch.device("cpu"))
    joined = torch.cat([max_logits[name].to(device) for name in names])
    dist.all_reduce(joined, dist.ReduceOp.MAX, group=process_group)
    max_logits.update(zip(names, joined.split([len(max_logits[name]) for name in names]), strict=True))


@torch.no_grad()
def qk_clip_(
    model: nn.Module, max_logits: Mapping[str, Tensor], tau: float = 100.0, alpha: float = 0.5
) -> dict[str, Tensor]:
    """Scale the heads whose largest logit S exceeds tau so that it would have been tau.

    With gamma = min(1, tau / S): rows of q times gamma^alpha, rows of k times gamma^(1 - alpha), with their biases. In
    latent attention this holds for the channels without position; rows of q that are rotated take gamma, since their
    key is shared by all heads and keeps its size. Query heads that share a key head take the smallest gamma among them.
    Heads within the limit keep every bit, and so do values and outputs of all.

    Works on plain and on sharded parameters (DTensor, with rows or columns apart); every rank has to be given the same
    logits. Nothing is changed unless all can be.

    Args:
        model: What the logits were recorded of.
        max_logits: Largest logit of each head, by module name; -inf for heads that have not run.
        tau: The limit.
        alpha: The share of the queries.

    Returns:
        gamma of every head, by module name.

    Raises:
        ConfigError: A name that is no attention, another number of heads, an attention that brings q and k to one length,
            where scaled projections change nothing, or one whose projections are not plain linear layers.
        NonFiniteError: A logit that is NaN or infinite.
    """
    if not tau > 0 or not 0 <= alpha <= 1:
        raise ConfigError(f"QK-Clip needs tau above 0 and alpha in [0, 1], found tau={tau} and alpha={alpha}")
    modules = {name: _clippable(model, name, logits) for name, logits in max_logits.items()}
    bad = [
        name for name, logits in max_logits.items() if bool(torch.isnan(logits).any() | torch.isposinf(logits).any())
    ]
    if bad:
        raise NonFiniteError(f"QK-Clip: logits of {bad[0]} are not finite: {max_logits[bad[0]].tolist()}")
    gammas: dict[str, Tensor] = {}
    for name, module in modules.items():
        gamma = torch.where(max_logits[name] > tau, tau / max_logits[name], 1.0).float()
        group = len(gamma) // _num_heads(module, "k")  # query heads per key head
        gammas[name] = gamma.view(-1, group).amin(1).repeat_interleave(group)
        for key, axis in module.head_axes().items():
            if axis.axis == 0:
                factors = torch.cat([_row_factors(heads, gammas[name], alpha) for heads in axis.heads])
                for parameter in getattr(module, key).parameters():
                    _scale_rows(parameter, factors)
    return gammas


def _clippable(model: nn.Module, name: str, logits: Tensor) -> Any:
    """The attention of this name, if it can be clipped.

    Raises:
        ConfigError: It cannot; the message says why.
    """
    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"QK-Clip: {name!r} is no module of {type(model).__name__}") from None
    if not isinstance(module, Attention):
        raise ConfigError(
            f"QK-Clip: {name} is a {type(module).__name__}, which does not say what its heads are made of"
        )
    if module.normalizes_heads:
        raise ConfigError(
            f"QK-Clip: {name} normalises q and k of every head, so scaling their projections changes no logit, and none can "
            "grow; leave it out of max_logits"
        )
    if logits.shape != (_num_heads(module, "q"),):
        raise ConfigError(
            f"QK-Clip: {name} has {_num_heads(module, 'q')} heads, max_logits has shape {tuple(logits.shape)} for it"
        )
    for key in module.head_axes():
        linear = getattr(module, key)
        if type(linear).forward is not nn.Linear.forward:
            raise ConfigError(
                f"QK-Clip: {name}.{key} is a {type(linear).__name__}; only rows of a plain nn.Linear can be scaled. Merge "
                "adapters first"
            )
        for kind, parameter in linear.named_parameters():
            placements = getattr(parameter, "placements", ())
            if any(type(placement).__name__ not in ("Shard", "Replicate") for placement in placements):
                raise ConfigError(
                    f"QK-Clip: {name}.{key}.{kind} is placed as {placements}; expected Shard or Replicate, one axis per mesh "
                    "dimension"
                )
    return module


def _num_heads(module: Attention, letter: Literal["q", "k"]) -> int:
    """Heads of the queries, or of the keys."""
    return next(
        heads.num_heads
        for axis in module.head_axes().values()
        for heads in axis.heads
        if any(role.startswith(letter) for role, _ in heads.channels)
    )


def _row_factors(heads: Heads, gamma: Float[Tensor, " heads"], alpha: float) -> Float[Tensor, " rows"]:
    """What each row of these heads is multiplied with; query heads that share a key head have one gamma."""
    of_head = gamma.view(heads.num_heads, -1)[:, :1]  # [heads, 1]
    return torch.cat(
        [(of_head ** EXPONENTS[role](alpha)).expand(-1, size) for role, size in heads.channels], 1
    ).flatten()


def _scale_rows(parameter: Tensor, factors: Float[Tensor, " rows"]) -> None:
    """Multiply the rows that this rank holds, in fp32, rounded once."""
    local, first = _local_rows(parameter)
    mine = factors[first : first + len(local)].to(local.device).view(-1, *[1] * (local.ndim - 1))
    local.copy_(local * mine.to(torch.promote_types(local.dtype, torch.float32)))


def _local_rows(parameter: Any) -> tuple[Tensor, int]:
    """What this rank holds of a parameter, and which of its rows comes first."""
    if not hasattr(parameter, "placements"):
        return parameter, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), offsets[0]
