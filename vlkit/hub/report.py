"""KeyReport: what does not fit between a checkpoint and a model, in a form that a person can read.

The numbers of a name are collapsed, and a count says how many names a line stands for:
blocks.{0..26}.attn.q.weight (27)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole dotted component
_FIELD = re.compile(r"\{\w+\}")
_MAX_LINES = 12
_WRAPPERS = ("module.", "_orig_mod.", "model.", "base_model.model.", "transformer.")


def collapse(names: Iterable[str]) -> list[str]:
    """Names with their numbers collapsed: ["a.0.w", "a.1.w", "b"] -> ["a.{0..1}.w (2)", "b"]."""
    groups: dict[str, list[list[int]]] = {}
    for name in names:
        numbers = [int(number[:18]) for number in NUMBER.findall(name)]
        groups.setdefault(NUMBER.sub("{}", name), []).append(numbers)
    lines = []
    for shape, rows in groups.items():
        line = shape
        for column in zip(*rows, strict=True):
            line = line.replace("{}", _span(sorted(set(column))), 1)
        lines.append(f"{line} ({len(rows)})" if len(rows) > 1 else line)
    return lines


def _span(values: Sequence[int]) -> str:
    """3 | {0..26} | {0,2,5} | {0,2..9,12}: runs of whole numbers."""
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    if len(runs) > 8:
        return f"{{{values[0]}..{values[-1]}, with gaps}}"
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"


@dataclass(frozen=True)
class ShapeMismatch:
    """A tensor whose shape is not the parameter's.

    Attributes:
        theirs: Name in the checkpoint.
        their_shape: Its shape there.
        ours: Name of the parameter.
        our_shape: Its shape.
        made: The shape that the rule makes of the tensor, or None where it cannot be applied.
        reason: Why it cannot be applied, where that is more than two different shapes.
    """

    theirs: str
    their_shape: tuple[int, ...]
    ours: str
    our_shape: tuple[int, ...] | None
    made: tuple[int, ...] | None
    reason: str = ""


@dataclass
class KeyReport:
    """What a plan found.

    Attributes:
        missing: Parameter -> the name in the checkpoint that would fill it.
        unexpected: Names in the checkpoint that no rule knows, or whose parameter the model does not have.
        mismatched: Tensors of another shape.
        ambiguous: Names that two rules claim, or parameters that two tensors fill: one sentence each.
        ignored: Names that a rule says to ignore. Never an error.
        num_parameters: Parameters of the model.
    """

    missing: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[ShapeMismatch] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    num_parameters: int = 0

    @property
    def num_problems(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.mismatched) + len(self.ambiguous)

    def __str__(self) -> str:
        counts = {
            "missing": len(self.missing),
            "unexpected": len(self.unexpected),
            "of another shape": len(self.mismatched),
            "ambiguous": len(self.ambiguous),
        }
        lines = ["names do not fit: " + ", ".join(f"{n} {what}" for what, n in counts.items() if n)]
        if self.missing:
            lines.append("missing in the checkpoint (parameter <- expected name):")
            lines += _limited([f"{o} <- {t}" for o, t in _collapse_pairs(self.missing.items())])
        if self.unexpected:
            lines.append("unexpected in the checkpoint:")
            lines += _limited(collapse(self.unexpected))
        if self.mismatched:
            lines.append("of another shape (checkpoint -> model):")
            lines += _limited(_mismatch_lines(self.mismatched))
        if self.ambiguous:
            lines.append("ambiguous:")
            lines += _limited(collapse(self.ambiguous))
        cause = self.likely_cause()
        if cause:
            lines.append(f"likely cause: {cause}")
        return "\n".join(lines)

    def likely_cause(self) -> str:
        """One sentence for the usual mistakes, or nothing."""
        if self.mismatched and not self.missing and not self.unexpected:
            return _shape_cause(self.mismatched)
        expected, found = _shapes_of(self.missing.values()), _shapes_of(self.unexpected)
        for wrapper in _WRAPPERS:
            if expected and {wrapper + name for name in expected} <= found:
                return f"every name begins with {wrapper!r}: it was saved from a wrapped model; save the inner one"
            if found and {wrapper + name for name in found} <= expected:
                return f"the names lack {wrapper!r}: the checkpoint is of an inner module; load it into that module"
        if self.num_parameters and len(self.missing) == self.num_parameters:
            return "nothing fits: this is a checkpoint of another family, or of another part of the model"
        if self.mismatched:
            return _shape_cause(self.mismatched)
        if self.missing and not self.unexpected:
            return "the checkpoint has fewer layers or parts than the config says, or is incomplete"
        if self.unexpected and not self.missing:
            return "the checkpoint has more layers or parts than the config says (adapters, quantised weights, a head?)"
        return ""


def _shapes_of(names: Iterable[str]) -> set[str]:
    """Names without their numbers and fields."""
    return {NUMBER.sub("{}", _FIELD.sub("{}", name)) for name in names}


def _limited(lines: list[str]) -> list[str]:
    shown = [f"  {line}" for line in lines[:_MAX_LINES]]
    return [*shown, f"  ... and {len(lines) - _MAX_LINES} more lines"] if len(lines) > _MAX_LINES else shown


def _collapse_pairs(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs of names, grouped by the left one; the right one is the first of its group with its numbers left out."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for left, right in pairs:
        groups.setdefault(NUMBER.sub("{}", left), []).append((left, right))
    out = []
    for group in groups.values():
        right = group[0][1] if len(group) == 1 else NUMBER.sub("N", group[0][1])
        out.append((collapse(left for left, _ in group)[0], right))
    return out


def _mismatch_lines(mismatched: Sequence[ShapeMismatch]) -> list[str]:
    groups: Counter[tuple[str, str]] = Counter()
    names: dict[tuple[str, str], list[str]] = {}
    for m in mismatched:
        text = f"{list(m.their_shape)}"
        if m.made is not None and m.made != m.their_shape:
            text += f", which makes {list(m.made)}"
        if m.our_shape is not None:
            text += f" -> {list(m.our_shape)}"
        if m.reason:
            text += f" ({m.reason})"
        key = (NUMBER.sub("{}", m.ours), text)
        groups[key] += 1
        names.setdefault(key, []).append(m.ours)
    return [f"{collapse(names[key])[0]}: {key[1]}" for key in groups]


def _shape_cause(mismatched: Sequence[ShapeMismatch]) -> str:
    pairs = [(m.made, m.our_shape) for m in mismatched if m.made is not None and m.our_shape is not None]
    if len(pairs) < len(mismatched):
        return "the tensors are arranged differently than this key map says: another layout of the family"
    if all(len(a) == len(b) and a != b and sorted(a) == sorted(b) for a, b in pairs):
        return "the tensors are stored transposed: another layout of the family"
    rows_only = all(len(a) == len(b) and a[1:] == b[1:] for a, b in pairs)
    if rows_only and all("embed" in m.ours or "head" in m.ours for m in mismatched):
        return f"the vocabulary was resized; build the model with vocab_size={pairs[0][0][0]}"
    return "the config is of another size of the family"
