"""Which parameters Muon takes, and which AdamW, as which matrices and at which rate: by what a parameter is for, never by
its shape alone.

    freeze(model, ["vision"], thaw=["vision.blocks.26"])
    groups = muon_param_groups(model, lr={"llm": 2e-5, "vision": 2e-6}, layer_decay={"vision": 0.8})
    print(groups.report)                        # name, shape, route, rate, decay, matrices and reason of every parameter
    optimizer = Muon(groups, lr=1e-4)           # the rate of what `lr` did not name

Parts of a model are named by the beginnings of parameter names, in whole words between dots; a star stands for one word:
"vision", "llm.blocks.0", "llm.blocks.*.mlp", and "" for everything. Of several that fit, the one with most words decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from vlkit.errors import ConfigError
from vlkit.optim.units import Cut, units_of

Route = Literal["muon", "adamw", "none"]

# Bare parameters that are tables of vectors rather than matrices that act on activations.
TABLES = {
    *(
        "table",
        "pos_embed",
        "position_embedding",
        "position_embeddings",
        "positional_embedding",
        "pos_emb",
        "cls_token",
    ),
    *(
        "class_token",
        "class_embedding",
        "reg_token",
        "register_tokens",
        "dist_token",
        "mask_token",
        "query",
        "queries",
        "latent",
    ),
    *("latents", "query_tokens", "relative_position_bias_table"),
}
HEADS = {"lm_head", "head", "classifier", "score", "output_head"}
FUSED_HALVES = {("GluMlp", "fc1")}  # timm's gated MLP: gate and up in one matrix
STACKS = {"blocks", "layers"}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Heads(Protocol):
    @property
    def num_heads(self) -> int: ...
    @property
    def channels(self) -> tuple[tuple[str, int], ...]: ...


class HeadAxis(Protocol):
    @property
    def axis(self) -> Literal[0, 1]: ...
    @property
    def heads(self) -> Sequence[Heads]: ...


@runtime_checkable
class HasHeads(Protocol):
    """An attention that says what its projections are made of; vlkit.layers.heads has the words."""

    def head_axes(self) -> Mapping[str, HeadAxis]: ...


@dataclass(frozen=True)
class Routed:
    """One parameter: where it goes, and why.

    Attributes:
        name: As named_parameters has it; the first of a tied one.
        shape: Its own.
        route: The algorithm, or none.
        reason: What decided.
        lr: Its learning rate; None is the optimizer's.
        factor: What layer-wise decay multiplied into lr.
        decays: Whether weight decay reaches it.
        matrices: Shapes of the matrices that Muon sees, with how many there are of each.
    """

    name: str
    shape: tuple[int, ...]
    route: Route
    reason: str
    lr: float | None = None
    factor: float = 1.0
    decays: bool = True
    matrices: tuple[tuple[int, int, int], ...] = ()

    def cells(self) -> tuple[str, ...]:
        """What a table says of it, column by column."""
        shape = "x".join(map(str, self.shape)) or "scalar"
        if self.route == "none":
            return self.name, shape, self.route, "", "", "", self.reason
        rate = "lr" if self.lr is None else f"{self.lr:.3g}"
        rate += "" if self.factor == 1 else f" (x{self.factor:.3g})"
        matrices = " + ".join(f"{rows}x{cols}" if n == 1 else f"{n} {rows}x{cols}" for n, rows, cols in self.matrices)
        return self.name, shape, self.route, rate, "decay" if self.decays else "no decay", matrices, self.reason


@dataclass(frozen=True)
class Report:
    """Every parameter of the model once; printing it gives a table."""

    rows: tuple[Routed, ...]

    def names(self, route: Route) -> list[str]:
        return [row.name for row in self.rows if row.route == route]

    def num_parameters(self) -> dict[str, tuple[int, int]]:
        """(trained, not trained) elements of each part of the model."""
        counts: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            part = row.name.split(".")[0]
            trained, still = counts.get(part, (0, 0))
            numel = math.prod(row.shape)
            counts[part] = (trained, still + numel) if row.route == "none" else (trained + numel, still)
        return counts

    def __str__(self) -> str:
        cells = [row.cells() for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
        counts = ", ".join(f"{len(self.names(route))} {route}" for route in ("muon", "adamw", "none"))
        return "\n".join([*(line.rstrip() for line in lines), counts])


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer; `report` says how they came about."""

    def __init__(self, groups: Sequence[dict[str, Any]], report: Report) -> None:
        super().__init__(groups)
        self.report = report


def muon_param_groups(
    model: nn.Module,
    *,
    muon: Sequence[str] = (),
    adamw: Sequence[str] = (),
    router: Literal["muon", "adamw"] = "muon",
    patch_embed: Literal["adamw", "muon"] = "adamw",
    decay_vectors: bool = True,
    lr: Mapping[str, float] | None = None,
    layer_decay: Mapping[str, float] | None = None,
    splits: Literal["declared", "heads"] = "declared",
) -> ParamGroups:
    """Split the trainable parameters of a model into groups for Muon.

    The first rule that fits decides:

    1. frozen or empty: in no group
    2. `parameter.use_muon` is set, or a pattern of `muon` or `adamw` matches the name: as asked
    3. a vector once axes of length 1 are gone (norm gains, biases, scales): adamw
    4. embeddings, and tables of vectors by name (position tables, class tokens, resampler queries): adamw
    5. output heads, by name or because they share their weight with an embedding: adamw
    6. the patch embedding, or a convolution on at most 4 channels: adamw, or as `patch_embed` says
    7. the weight of an expert router: muon, or as `router` says
    8. everything else is a matrix that acts on activations, or a stack of them: muon

    Tied weights are listed once, under the first name. Weight decay reaches norm gains too: Moonlight found it crucial
    for stability in long runs. What AdamW has of a module that says `decays = False` never decays (the temperature of SigLIP).

    Every rate of `lr` makes groups of its own, whose "lr" a scheduler then multiplies (LambdaLR, CosineAnnealingLR) or
    replaces (OneCycleLR takes a list). As which matrices Muon sees a parameter is noted on the parameter (`muon_cut`),
    for the optimizer that is built next.

    Args:
        model: Any module.
        muon: Regular expressions, searched in parameter names.
        adamw: The same.
        router: Route of expert routers.
        patch_embed: Route of the patch embedding.
        decay_vectors: False puts what rule 3 catches in a group of its own with weight_decay 0.
        lr: Learning rate of each part of the model, see the top of this file. What no part names gets the optimizer's.
        layer_decay: For parts with a stack of L blocks (a tower, a decoder), a factor d in (0, 1]: block j = 1 ... L learns at
            lr * d^(L + 1 - j), what the part has before its blocks as block 0 would, what comes after them at lr.
        splits: "declared" treats as one matrix what acts as one: a fused weight of q, k and v is three. "heads" also cuts the
            projections of every attention that has `head_axes` into heads: rows of q, k and v, or of what makes them from a
            latent, and columns of the output. Attributes of the parameter (muon_splits and its kin) come before both.

    Raises:
        ConfigError: A pattern or part that names nothing, a name matched from both sides, two parts that fit a name equally
            well, a vector sent to Muon, or layer_decay where there are no blocks or no lr.

    Source: Moonlight, arXiv:2502.16982, section 2.2, and the guidance of the Muon repository for embeddings, heads and
        first layers. Layer-wise decay: BEiT, arXiv:2106.08254, section 3.1, in the form of its published code.
    """
    for option, value, known in (
        ("router", router, ("muon", "adamw")),
        ("patch_embed", patch_embed, ("muon", "adamw")),
        ("splits", splits, ("declared", "heads")),
    ):
        if value not in known:
            raise ConfigError(f"{option}: {value!r} is not one of {', '.join(map(repr, known))}")
    patterns = {"muon": _compiled("muon", muon), "adamw": _compiled("adamw", adamw)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    walked = list(_first_names(model))
    names = [name for name, _, _ in walked]
    rates = _rates(names, lr or {}, _layer_factors(model, names, layer_decay or {}))
    rows: list[Routed] = []
    members: dict[tuple[str, float | None], list[tuple[str, Tensor]]] = {}
    for name, parameter, owners in walked:
        route, reason = _by_request(name, parameter, patterns) or _by_rule(
            name, parameter, owners, id(parameter) in embeddings, router, patch_embed
        )
        still = (reason == "vector" and not decay_vectors) or not getattr(owners[-1], "decays", True)
        kind = "vectors" if route == "adamw" and still else route
        rate, factor = rates[name]
        shapes: tuple[tuple[int, int, int], ...] = ()
        if route == "muon":
            parameter.muon_cut = _cut(name, parameter, owners, splits)  # type: ignore[attr-defined]
            shapes = tuple((units.count, units.rows, units.cols) for units in units_of(parameter, name))
        rows.append(
            Routed(name, tuple(parameter.shape), route, reason, rate, factor, kind not in ("vectors", "none"), shapes)
        )
        if route != "none":
            members.setdefault((kind, rate), []).append((name, parameter))
    _all_matched(patterns, names)

    options: dict[str, dict[str, Any]] = {
        "muon": {"algorithm": "muon"},
        "adamw": {"algorithm": "adamw"},
        "vectors": {"algorithm": "adamw", "weight_decay": 0.0},
    }
    groups = [
        {
            "params": [parameter for _, parameter in held],
            "param_names": [name for name, _ in held],
            **options[kind],
            **({} if rate is None else {"lr": rate}),
        }
        for (kind, rate), held in sorted(members.items(), key=lambda item: list(options).index(item[0][0]))
    ]
    return ParamGroups(groups, Report(tuple(rows)))


def freeze(model: nn.Module, parts: Sequence[str], *, thaw: Sequence[str] = ()) -> None:
    """Set requires_grad: off for the named parts, on for those of `thaw`; where both fit, the one with most words decides.

    What nobody names stays as it is. An optimizer has to be built afterwards: its groups hold what is trained.

    Args:
        model: Any module.
        parts: Parts of the model, see the top of this file.
        thaw: The same.

    Raises:
        ConfigError: A part that names nothing, or one that is to be frozen and trained.
    """
    if isinstance(parts, str) or isinstance(thaw, str):
        raise ConfigError(f"freeze takes lists of parts, found the text {parts if isinstance(parts, str) else thaw!r}")
    both = set(parts) & set(thaw)
    if both:
        raise ConfigError(f"freeze: {sorted(both)[0]!r} is to be frozen and to be trained")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, part in _longest("freeze", [*parts, *thaw], list(parameters)).items():
        if part is not None:
            parameters[name].requires_grad_(part in thaw)


# Names


def _longest(option: str, parts: Sequence[str], names: Sequence[str]) -> dict[str, str | None]:
    """The part that decides for each name: of those that fit, the one with most words, then with fewest stars."""
    split = {part: part.split(".") if part else [] for part in parts}
    found: dict[str, str | None] = {}
    used: set[str] = set()
    for name in names:
        words = name.split(".")
        fitting = [
            (len(wanted), -wanted.count("*"), part)
            for part, wanted in split.items()
            if len(wanted) <= len(words) and all(a in ("*", b) for a, b in zip(wanted, words, strict=False))
        ]
        used.update(part for *_, part in fitting)
        best = max(fitting, default=None)
        tied = [part for *rank, part in fitting if best is not None and tuple(rank) == best[:2]]
        if len(tied) > 1:
            raise ConfigError(
                f"{option}: {tied[0]!r} and {tied[1]!r} fit {name} equally well; say which with more words"
            )
        found[name] = None if best is None else best[2]
    for part in parts:
        if part not in used:
            known = list(dict.fromkeys(name.split(".")[0] for name in names))
            raise ConfigError(
                f"{option}: {part!r} names no parameter; parts of this model are {', '.join(known)}, and names look like "
                f"{names[0] if names else 'nothing: it has none'}"
            )
    return found


def _rates(
    names: list[str], lr: Mapping[str, float], factors: Mapping[str, float]
) -> dict[str, tuple[float | None, float]]:
    """(learning rate or None, factor of layer-wise decay in it) of each name."""
    for key, rate in lr.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            raise ConfigError(f"lr: {key!r} has the rate {rate!r}, expected a number that is not negative")
    rates: dict[str, tuple[float | None, float]] = {}
    for name, part in _longest("lr", list(lr), names).items():
        factor = factors.get(name)
        if factor is not None and part is None:
            raise ConfigError(f"layer_decay multiplies a rate, and lr names none for {name}; add it to lr")
        rates[name] = (None, 1.0) if part is None else (lr[part] * (factor or 1.0), factor or 1.0)
    return rates


def _layer_factors(model: nn.Module, names: list[str], layer_decay: Mapping[str, float]) -> dict[str, float]:
    """d^(L + 1 - k) of every name in a part with layer-wise decay."""
    factors: dict[str, float] = {}
    for part, decay in layer_decay.items():
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise ConfigError(f"layer_decay: {part!r} has the factor {decay!r}, expected one in (0, 1]")
        inside = [name for name, found in _longest("layer_decay", [part], names).items() if found is not None]
        stack, num_blocks = _stack_of(model, part)
        depth = 0
        for name in inside:
            if name.startswith(stack):
                depth = int(name[len(stack) :].split(".")[0]) + 1
            elif depth:
                depth = num_blocks + 1  # behind the last block, in the order in which the part lists its modules
            factors[name] = decay ** (num_blocks + 1 - depth)
    return factors


def _stack_of(model: nn.Module, part: str) -> tuple[str, int]:
    """(beginning of the names of the blocks, how many blocks there are)."""
    try:
        module = model.get_submodule(part)
    except AttributeError:
        raise ConfigError(f"layer_decay: {part!r} is no module of the model") from None
    found = [
        (name, len(child))
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList | nn.Sequential) and name.split(".")[-1] in STACKS
    ]
    if len(found) != 1:
        raise ConfigError(
            f"layer_decay: {part!r} has {len(found)} stacks named {' or '.join(sorted(STACKS))}, expected one; "
            "name the tower or the decoder itself"
        )
    name, num_blocks = found[0]
    return ".".join([*([part] if part else []), name, ""]), num_blocks


# Matrices


def _cut(name: str, parameter: Tensor, owners: list[nn.Module], splits: str) -> Cut:
    """What the modules around a parameter say about its matrices."""
    flatten = isinstance(owners[-1], nn.Conv1d | nn.ConvTranspose1d)  # 3-D, but not a stack of matrices
    if len(owners) < 2 or parameter.ndim != 2:
        return Cut(flatten=flatten)
    parent, child = owners[-2], name.split(".")[-2]
    if (type(parent).__name__, child) in FUSED_HALVES:
        return Cut(sizes=(parameter.shape[0] // 2,) * 2)
    axis = parent.head_axes().get(child) if isinstance(parent, HasHeads) else None
    if axis is None:
        return Cut()
    widths = [(heads.num_heads, sum(size for _, size in heads.channels)) for heads in axis.heads]
    if splits == "heads":
        return Cut(axis.axis, tuple(width for num_heads, width in widths for _ in range(num_heads)))
    return Cut(axis.axis, tuple(num_heads * width for num_heads, width in widths)) if len(widths) > 1 else Cut()


# Routes


def _first_names(model: nn.Module) -> Iterator[tuple[str, Tensor, list[nn.Module]]]:
    """Every parameter once, under its first name."""
    seen: set[int] = set()
    for name, parameter, owners in _walk(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter, owners


def _walk(model: nn.Module) -> Iterator[tuple[str, Tensor, list[nn.Module]]]:
    """(name, parameter, modules from the model down to the owner) for every parameter, shared ones under every name."""

    def visit(module: nn.Module, prefix: str, above: list[nn.Module]) -> Iterator[tuple[str, Tensor, list[nn.Module]]]:
        chain = [*above, module]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter, chain
        for name, child in module._modules.items():
            if child is not None:
                yield from visit(child, f"{prefix}{name}.", chain)

    yield from visit(model, "", [])


def _compiled(option: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    if isinstance(patterns, str):
        raise ConfigError(f"{option}: expected a list of patterns, found the text {patterns!r}; write [{patterns!r}]")
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ConfigError(f"{option}: {error.pattern!r} is no regular expression: {error}") from error


def _by_request(name: str, parameter: Tensor, patterns: dict[str, list[re.Pattern[str]]]) -> tuple[Route, str] | None:
    if not parameter.requires_grad:
        return "none", "frozen"
    if not parameter.numel():
        return "none", "empty"
    asked: dict[str, str] = {
        route: f"pattern {pattern.pattern!r}"
        for route, candidates in patterns.items()
        for pattern in candidates
        if pattern.search(name)
    }
    if len(asked) == 2:
        raise ConfigError(f"{name} is asked for by muon ({asked['muon']}) and by adamw ({asked['adamw']})")
    if not asked and hasattr(parameter, "use_muon"):
        asked = {"muon" if parameter.use_muon else "adamw": "use_muon"}
    if not asked:
        return None
    ((route, reason),) = asked.items()
    if route == "muon" and parameter.ndim < 2:
        raise ConfigError(
            f"{name} has shape {tuple(parameter.shape)} and cannot go to Muon, as {reason} asks: it is no matrix"
        )
    return ("muon" if route == "muon" else "adamw"), reason


def _by_rule(
    name: str,
    parameter: Tensor,
    owners: list[nn.Module],
    is_embedding: bool,
    router: Literal["muon", "adamw"],
    patch_embed: Literal["adamw", "muon"],
) -> tuple[Route, str]:
    owner, *path = owners[-1], *name.split(".")
    leaf, parents = path[-1], path[:-1]
    if sum(size > 1 for size in parameter.shape) < 2:
        return "adamw", "vector"
    if is_embedding:
        tied = not isinstance(owner, nn.Embedding | nn.EmbeddingBag)
        return "adamw", "output head, tied to the embedding" if tied else "embedding"
    if leaf in TABLES:
        return "adamw", "table"
    if parents and parents[-1] in HEADS:
        return "adamw", "output head"
    is_patch_embed = any("PatchEmbed" in type(module).__name__ for module in owners[-2:])
    if is_patch_embed or (isinstance(owner, CONVOLUTIONS) and owner.in_channels <= 4):
        return patch_embed, "patch embedding"
    if type(owner).__name__.endswith("Router") or "router" in parents[-1:]:
        return router, "router"
    if type(owner).__name__ == "Experts":
        return "muon", "experts"
    if isinstance(owner, CONVOLUTIONS):
        return "muon", "convolution"
    return "muon", "matrix" if parameter.ndim == 2 else "stack of matrices"


def _all_matched(patterns: dict[str, list[re.Pattern[str]]], names: list[str]) -> None:
    for route, candidates in patterns.items():
        for pattern in candidates:
            if not any(pattern.search(name) for name in names):
                raise ConfigError(
                    f"{route} pattern {pattern.pattern!r} matches no parameter; the first names are {names[:3]}"
                )
