"""Which parameters Muon takes, and which AdamW: decided by what a parameter is for, never by its shape alone.

groups = muon_param_groups(model)
print(groups.report)                        # name, shape, route, reason of every parameter
optimizer = Muon(groups, lr=2e-4)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from vlkit.errors import ConfigError

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
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Routed:
    """One parameter: where it goes, and why."""

    name: str
    shape: tuple[int, ...]
    route: Route
    reason: str


@dataclass(frozen=True)
class Report:
    """Every parameter of the model once; printing it gives a table."""

    rows: tuple[Routed, ...]

    def names(self, route: Route) -> list[str]:
        return [row.name for row in self.rows if row.route == route]

    def __str__(self) -> str:
        shapes = ["x".join(map(str, row.shape)) or "scalar" for row in self.rows]
        name_width = max((len(row.name) for row in self.rows), default=0)
        shape_width = max(map(len, shapes), default=0)
        lines = [
            f"{row.name:{name_width}}  {shape:>{shape_width}}  {row.route:5}  {row.reason}"
            for row, shape in zip(self.rows, shapes, strict=True)
        ]
        counts = ", ".join(f"{len(self.names(route))} {route}" for route in ("muon", "adamw", "none"))
        return "\n".join([*lines, counts])


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
    for stability in long runs.

    Args:
        model: Any module.
        muon: Regular expressions, searched in parameter names.
        adamw: The same.
        router: Route of expert routers.
        patch_embed: Route of the patch embedding.
        decay_vectors: False puts what rule 3 catches in a group of its own with weight_decay 0.

    Raises:
        ConfigError: A pattern that matches nothing, a name matched from both sides, or a vector sent to Muon.

    Source: Moonlight, arXiv:2502.16982, section 2.2, and the guidance of the Muon repository for embeddings, heads and
        first layers.
    """
    for option, value in (("router", router), ("patch_embed", patch_embed)):
        if value not in ("muon", "adamw"):
            raise ConfigError(f"{option}: {value!r} is not one of 'muon', 'adamw'")
    patterns = {"muon": _compiled("muon", muon), "adamw": _compiled("adamw", adamw)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    rows: list[Routed] = []
    members: dict[str, list[tuple[str, Tensor]]] = {"muon": [], "adamw": [], "vectors": []}
    seen: set[int] = set()
    for name, parameter, owners in _walk(model):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        route, reason = _by_request(name, parameter, patterns) or _by_rule(
            name, parameter, owners, id(parameter) in embeddings, router, patch_embed
        )
        rows.append(Routed(name, tuple(parameter.shape), route, reason))
        if route == "muon" and isinstance(owners[-1], nn.Conv1d | nn.ConvTranspose1d):
            parameter.muon_flatten = True  # type: ignore[attr-defined]  # 3-D, but not a stack of matrices
        if route != "none":
            members["vectors" if reason == "vector" and not decay_vectors else route].append((name, parameter))
    _all_matched(patterns, [row.name for row in rows])

    options: dict[str, dict[str, Any]] = {
        "muon": {"algorithm": "muon"},
        "adamw": {"algorithm": "adamw"},
        "vectors": {"algorithm": "adamw", "weight_decay": 0.0},
    }
    groups = [
        {"params": [p for _, p in members[key]], "param_names": [n for n, _ in members[key]], **options[key]}
        for key in options
        if members[key]
    ]
    return ParamGroups(groups, Report(tuple(rows)))


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
