"""What a model is made of, as text that people can look at: a tree of parts with parameters, memory, and the price of an image.

model -> Row, Row, ... -> aligned lines
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from vlkit.config import Config
from vlkit.layers.moe import MoE
from vlkit.models.vlm import VisionLanguageModel, VLMConfig
from vlkit.processing import ImageRule

MAX_DEPTH = 4


class Row(NamedTuple):
    """One line of the tree."""

    label: str
    kind: str
    numbers: str


def tree(module: nn.Module, name: str, *, max_depth: int = MAX_DEPTH) -> str:
    """Parts of a model, their parameters, and what one token uses where that is less.

    Blocks that are built alike are one line. Works on the meta device.

    Args:
        name: Written at the root.
        max_depth: Levels below the root.
    """
    rows = [Row(name, kind_of(module), _numbers(module)), *_rows(module, "", max_depth)]
    label = max(len(row.label) for row in rows)
    kind = max(len(row.kind) for row in rows)
    return "\n".join(f"{row.label:<{label}}  {row.kind:<{kind}}  {row.numbers}".rstrip() for row in rows)


def kind_of(module: nn.Module) -> str:
    """What a module is called: a part by its config, because several decoders are one class; others by their class."""
    config = getattr(module, "config", None)
    if isinstance(config, Config) and not isinstance(config, VLMConfig):
        return type(config).__name__.removesuffix("Config")
    return type(module).__name__


def _rows(module: nn.Module, indent: str, depth: int) -> Iterator[Row]:
    children = [(n, c) for n, c in _children(module) if count(c)]
    for index, (name, child) in enumerate(children):
        last = index == len(children) - 1
        yield Row(indent + ("└─ " if last else "├─ ") + name, kind_of(child), _numbers(child, each=" × " in name))
        if depth > 1 and not isinstance(child, nn.Linear | nn.Embedding):
            yield from _rows(child, indent + ("   " if last else "│  "), depth - 1)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Direct children; the members of a list one by one, equal neighbours as one."""
    for name, child in module.named_children():
        if not isinstance(child, nn.ModuleList):
            yield name, child
            continue
        members = list(child)
        start = 0
        for index in range(1, len(members) + 1):
            if index == len(members) or _shape(members[index]) != _shape(members[start]):
                alike = index - start
                place = f"{name}[{start}]" if len(members) > alike and alike == 1 else name
                yield (f"{place} × {alike}" if alike > 1 else place), members[start]
                start = index


def _shape(module: nn.Module) -> tuple[object, ...]:
    return tuple((n, tuple(p.shape)) for n, p in module.named_parameters())


def _numbers(module: nn.Module, *, each: bool = False) -> str:
    total, active = count(module), count(module, active=True)
    text = f"{short(total):>8}" + (" each" if each else "")
    if active < total:
        text += f", {short(active).strip()} active"
    if isinstance(module, nn.Linear):
        text += f"   {module.in_features} → {module.out_features}"
    elif isinstance(module, nn.Embedding):
        text += f"   {module.num_embeddings} × {module.embedding_dim}"
    elif isinstance(module, MoE):
        experts, top_k = module.router.weight.shape[0], module.router.top_k
        text += f"   {top_k} of {experts} experts"
    return text


def count(module: nn.Module, *, active: bool = False) -> int:
    """Parameters, shared ones once; with `active` only those that one token uses."""
    total = sum(p.numel() for p in module.parameters())
    if active:
        total -= sum(m.inactive_parameters() for m in module.modules() if isinstance(m, MoE))
    return total


def short(number: float, unit: str = "") -> str:
    """A number with three figures: 16.4 B, 412 M, 75.3 k."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g} {letter}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def num_bytes(number: float) -> str:
    """Bytes with three figures, in powers of 1000: 32.8 GB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"


def memory(model: VisionLanguageModel) -> list[tuple[str, str]]:
    """Bytes of the weights, of what training holds besides activations, and of the cache per token."""
    total = model.num_parameters()
    rows = getattr(model.llm, "cache_rows", ())
    values = 0
    for row in rows:
        size = 1
        for side in row:
            size *= side
        values += size
    values *= len(model.llm.blocks)
    lines = [
        ("weights", f"{num_bytes(2 * total)} in bf16, {num_bytes(4 * total)} in fp32"),
        # fp32 weights and gradients, and one (Muon) or two (AdamW) fp32 buffers; what AdamW has beside Muon is little
        (
            "to train in fp32",
            f"about {num_bytes(12 * total)} with Muon, {num_bytes(16 * total)} with AdamW, and activations",
        ),
    ]
    if values:
        longest = model.config.llm.max_positions  # type: ignore[attr-defined]
        lines.append(
            (
                "cache in bf16",
                f"{num_bytes(2 * values)} per token, {num_bytes(2 * values * longest)} for {longest:,} tokens",
            )
        )
    return lines


def image_cost(rule: ImageRule, width: int, height: int) -> str:
    """What becomes of an image of this size, in one line.

    Raises:
        ImageError: The rule refuses such an image.
    """
    plan = rule.target_size(height, width)
    rows, columns = plan.grid
    steps = [f"{width}x{height} pixels"]
    if plan.resized != (height, width):
        steps.append(f"resized to {plan.resized[1]}x{plan.resized[0]}")
    if plan.canvas != plan.resized:
        steps.append(f"padded to {plan.canvas[1]}x{plan.canvas[0]}")
    steps.append(f"{rows} rows of {columns} patches ({rows * columns:,})")
    steps.append(f"{rule.num_tokens(plan.grid):,} tokens")
    return " → ".join(steps)
