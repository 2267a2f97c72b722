"""One rule of a key map: how some tensors of a published checkpoint become parameters of ours, and back.

    their tensors  T[expert]                                                 one tensor, or one per stacked number
    our parameters O[part][expert] = to_ours(block `part` of T[expert])      one parameter, or one per part

    rename, reshape: one T, one O.      split: one T, several parts.      stack: several T, rows of one O.

A pattern is a whole name with fields in braces: `blocks.{layer}.{kind}`. The fields `layer`, `block` and `expert` are
decimal integers; `path` is any name with its dots, for parts whose names stay as they are; any other field is a word of
letters, digits and underscores, or one of the choices given for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

Choices = Sequence[str] | Mapping[str, str]
TensorFunction = Callable[[Tensor], Tensor]

INTEGER_FIELDS = ("layer", "block", "expert")
_INTEGER = r"0|[1-9][0-9]{0,8}"  # no leading zeros, so that a name has one spelling
_WORD = r"[A-Za-z0-9_]+"
_PATH = r"[A-Za-z0-9_.]+"
_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, eq=False)
class Pattern:
    """A whole name with fields.

    Attributes:
        text: The name; a field is written `{name}`.
        words: What a field may be, where that is limited.
    """

    text: str
    words: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if len(set(self.fields)) != len(self.fields):
            raise ValueError(f"pattern {self.text!r} names a field twice")
        if re.search(r"[{}]", _FIELD.sub("", self.text)):
            raise ValueError(f"pattern {self.text!r} has a brace that belongs to no field")

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, in order."""
        return tuple(_FIELD.findall(self.text))

    @cached_property
    def _pieces(self) -> tuple[str, ...]:
        return tuple(_FIELD.split(self.text))  # every second piece is the name of a field

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        out, end = "", 0
        for found in _FIELD.finditer(self.text):
            name = found[1]
            if name in self.words:
                inner = "|".join(re.escape(word) for word in self.words[name])
            else:
                inner = _INTEGER if name in INTEGER_FIELDS else _PATH if name == "path" else _WORD
            out += re.escape(self.text[end : found.start()]) + f"(?P<{name}>{inner})"
            end = found.end()
        return re.compile(out + re.escape(self.text[end:]))

    @cached_property
    def _regex_of_components(self) -> re.Pattern[str]:
        def loosened(component: str) -> str:
            fields = _FIELD.findall(component)
            if any(name == "path" or "." in "".join(self.words.get(name, ())) for name in fields):
                return ".+"
            return r"[^.]+" if fields or component.isdigit() else re.escape(component)

        return re.compile(r"\.".join(map(loosened, self.text.split("."))))

    def may_match(self, name: str) -> bool:
        """Whether the name, or one that differs from it only in components that are numbers, can fit."""
        return self._regex_of_components.fullmatch(name) is not None

    def match(self, name: str) -> dict[str, str] | None:
        """The value of every field, or None if the name is another one."""
        found = self._regex.fullmatch(name)
        return found.groupdict() if found else None

    def format(self, values: Mapping[str, str]) -> str:
        """The name with these values; a field without one stays as it is written."""
        pieces = list(self._pieces)
        for place, field in enumerate(self.fields):
            pieces[2 * place + 1] = values.get(field, f"{{{field}}}")
        return "".join(pieces)

    def mounted(self, prefix: str) -> Pattern:
        """The pattern under a prefix."""
        if "{" in prefix or "}" in prefix:
            raise ValueError(f"a prefix has no fields, found {prefix!r}")
        return Pattern(prefix + self.text, self.words)


@dataclass(frozen=True, eq=False)
class Rule:
    """One rule. Made by `rename`, `split`, `stack`, `reshape` and `drop`.

    Attributes:
        theirs: Names in the published checkpoint.
        ours: Names in the model; None where the tensor is ignored.
        words: Their word -> our word, for the fields with choices that both sides have.
        part: Field that only `ours` has: one parameter per block of their tensor.
        parts: Values of that field, in the order of the blocks.
        over: Field that only `theirs` has: one tensor per row of our parameter.
        dim: Axis of their tensor that is cut into parts.
        sizes: Proportions of the parts along that axis.
        groups: How often the parts repeat along that axis (q, k, v of head 0, q, k, v of head 1, ...).
        to_ours: Applied to every block on loading.
        to_theirs: Its inverse, applied on saving.
        optional: The model may have no such parameter; their tensor is then ignored.
        read_only: Another published spelling: read, never written.
    """

    theirs: Pattern
    ours: Pattern | None
    words: Mapping[str, Mapping[str, str]]
    part: str | None = None
    parts: tuple[str, ...] = ()
    over: str | None = None
    dim: int = 0
    sizes: tuple[int, ...] = ()
    groups: int = 1
    to_ours: TensorFunction | None = None
    to_theirs: TensorFunction | None = None
    optional: bool = False
    read_only: bool = False

    @property
    def num_parts(self) -> int:
        return len(self.parts) or 1

    @cached_property
    def _words_back(self) -> dict[str, dict[str, str]]:
        return {field: {ours: theirs for theirs, ours in words.items()} for field, words in self.words.items()}

    def match_theirs(self, name: str) -> dict[str, str] | None:
        """The fields of a published name, in their words, or None."""
        return self.theirs.match(name)

    def match_ours(self, name: str) -> dict[str, str] | None:
        """The fields of a parameter's name, in their words, or None."""
        found = None if self.ours is None else self.ours.match(name)
        if found is None:
            return None
        return {field: self._words_back[field][word] if field in self.words else word for field, word in found.items()}

    def our_name(self, fields: Mapping[str, str], part: int = 0) -> str:
        """The parameter that block `part` of their tensor makes."""
        assert self.ours is not None
        values = {field: self.words[field][word] if field in self.words else word for field, word in fields.items()}
        if self.part is not None:
            values[self.part] = self.parts[part]
        return self.ours.format(values)

    def their_name(self, fields: Mapping[str, str], row: int | None = None) -> str:
        """The published name; `row` is the number of the stacked field, which otherwise stays in braces."""
        values = {field: word for field, word in fields.items() if field != self.part}
        if self.over is not None and row is not None:
            values[self.over] = str(row)
        return self.theirs.format(values)

    def block(self, tensor: Tensor, part: int) -> Tensor:
        """Our block of one of their tensors; a view where that is possible.

        Raises:
            ValueError: The axis cannot be cut in these proportions.
        """
        if self.parts:
            self._check_axis(tensor)
            dim = self.dim % tensor.ndim
            unit = tensor.shape[dim] // (sum(self.sizes) * self.groups)
            start, size = sum(self.sizes[:part]) * unit, self.sizes[part] * unit
            if self.groups == 1:
                tensor = tensor.narrow(dim, start, size)
            else:
                grouped = tensor.unflatten(dim, (self.groups, sum(self.sizes) * unit))
                tensor = grouped.narrow(dim + 1, start, size).flatten(dim, dim + 1)
        return self.to_ours(tensor) if self.to_ours is not None else tensor

    def join(self, blocks: Sequence[Tensor]) -> Tensor:
        """The inverse of `block` for all parts.

        Raises:
            ValueError: Blocks whose sizes are not in the proportions of the rule.
        """
        if self.to_theirs is not None:
            blocks = [self.to_theirs(block) for block in blocks]
        if not self.parts:
            return blocks[0]
        self._check_blocks([tuple(block.shape) for block in blocks])
        dim = self.dim % blocks[0].ndim
        if self.groups == 1:
            return torch.cat(list(blocks), dim)
        grouped = [block.unflatten(dim, (self.groups, -1)) for block in blocks]
        return torch.cat(grouped, dim + 1).flatten(dim, dim + 1)

    def joined_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape that `join` makes of blocks with these shapes.

        Raises:
            ValueError: As `join`.
        """
        if self.to_theirs is not None:
            shapes = [tuple(self.to_theirs(torch.empty(shape, device="meta")).shape) for shape in shapes]
        if not self.parts:
            return shapes[0]
        self._check_blocks(shapes)
        joined = list(shapes[0])
        joined[self.dim] = sum(shape[self.dim] for shape in shapes)
        return tuple(joined)

    def _check_blocks(self, shapes: Sequence[tuple[int, ...]]) -> None:
        dims = len(shapes[0])
        if not -dims <= self.dim < dims:
            raise ValueError(f"they have no axis {self.dim} to be joined along")
        lengths = [shape[self.dim] for shape in shapes]
        others = {(*shape[: self.dim % dims], *shape[self.dim % dims + 1 :]) for shape in shapes}
        unit = sum(lengths) // (sum(self.sizes) * self.groups)
        if len(others) > 1 or lengths != [size * unit * self.groups for size in self.sizes]:
            raise ValueError(f"along axis {self.dim} they do not have the proportions {list(self.sizes)}")

    def _check_axis(self, tensor: Tensor) -> None:
        if not -tensor.ndim <= self.dim < tensor.ndim:
            raise ValueError(f"shape {list(tensor.shape)} has no axis {self.dim} to cut into {', '.join(self.parts)}")
        length, step = tensor.shape[self.dim], sum(self.sizes) * self.groups
        if length % step:
            raise ValueError(f"axis {self.dim} has length {length}, which is not a multiple of {step}")

    def cuts_like(self, other: Rule) -> bool:
        """Whether the two certainly do the same with the numbers of a tensor."""
        ours, theirs = (
            (rule.to_ours, rule.parts and (len(rule.parts), rule.dim, rule.sizes, rule.groups))
            for rule in (self, other)
        )
        return ours == theirs

    def mounted(self, theirs: str, ours: str) -> Rule:
        """The rule under a prefix on either side."""
        mounted_ours = self.ours.mounted(ours) if self.ours is not None else None
        return replace(self, theirs=self.theirs.mounted(theirs), ours=mounted_ours)

    def __repr__(self) -> str:
        ours = self.ours.text if self.ours is not None else "nothing"
        return f"{self.theirs.text} <-> {ours}"


def rename(theirs: str, ours: str, *, optional: bool = False, **choices: Choices) -> Rule:
    """One tensor, one parameter, the same numbers.

    Args:
        theirs: Name in the published checkpoint.
        ours: Name in the model, with the same fields.
        optional: The model may have no such parameter (a head that is tied to the embedding); the tensor is then
            ignored. A parameter that the model has is always needed.
        **choices: What a field may be; a mapping also translates: `norm={"norm0": "norm1", "norm1": "norm2"}`.
    """
    return _rule(theirs, ours, choices, optional=optional)


def reshape(theirs: str, ours: str, to_ours: TensorFunction, to_theirs: TensorFunction, **choices: Choices) -> Rule:
    """One tensor, one parameter, arranged differently: a convolution's kernel and a linear layer's matrix.

    Args:
        theirs: Name in the published checkpoint.
        ours: Name in the model, with the same fields.
        to_ours: Their tensor -> our parameter. Must run on the meta device: shapes are planned with it.
        to_theirs: Its inverse.
        **choices: What a field may be.
    """
    return _rule(theirs, ours, choices, to_ours=to_ours, to_theirs=to_theirs)


def split(
    theirs: str,
    ours: str,
    *,
    dim: int = 0,
    sizes: Sequence[int] = (),
    groups: int = 1,
    to_ours: TensorFunction | None = None,
    to_theirs: TensorFunction | None = None,
    over: str | None = None,
    **choices: Choices,
) -> Rule:
    """One tensor of several blocks, one parameter per block.

    `split("layers.{layer}.wqkv.{kind}", "blocks.{layer}.{part}.{kind}", part=("q", "k", "v"))` for weights and biases;
    `split("experts.gate_up_proj", "experts.{part}", part=("gate", "up"), dim=1)` for stacked, fused experts.

    Args:
        theirs: Name in the published checkpoint.
        ours: Name in the model, with one field more; its choices are the blocks, in order.
        dim: Axis that is cut.
        sizes: Proportions of the blocks, such as (8, 1, 1); equal by default.
        groups: How often the blocks repeat along the axis (once per head where q, k and v are interleaved by head).
        to_ours: Applied to every block, such as a transposition. Must run on the meta device.
        to_theirs: Its inverse.
        over: Field that only `theirs` has, where the tensor is also one of a stack, as in `stack`.
        **choices: What a field may be.
    """
    if set(_FIELD.findall(ours)) <= set(_FIELD.findall(theirs)):
        raise ValueError(f"split: {ours!r} needs one field that {theirs!r} does not have")
    return _rule(
        theirs,
        ours,
        choices,
        over=over,
        dim=dim,
        sizes=tuple(sizes),
        groups=groups,
        to_ours=to_ours,
        to_theirs=to_theirs,
    )


def stack(
    theirs: str,
    ours: str,
    over: str = "expert",
    *,
    to_ours: TensorFunction | None = None,
    to_theirs: TensorFunction | None = None,
    **choices: Choices,
) -> Rule:
    """One tensor per number of a field, rows of one parameter: `stack("experts.{expert}.up.weight", "experts.up")`.

    Args:
        theirs: Name in the published checkpoint.
        ours: Name in the model, without the field.
        over: The field. Its numbers run from 0 without a hole.
        to_ours: Applied to every tensor, such as a transposition. Must run on the meta device.
        to_theirs: Its inverse.
        **choices: What a field may be.
    """
    return _rule(theirs, ours, choices, over=over, to_ours=to_ours, to_theirs=to_theirs)


def drop(theirs: str, **choices: Choices) -> Rule:
    """A tensor that some checkpoints carry and no model needs: ignored on load, never written."""
    return Rule(Pattern(theirs, _pattern_words(theirs, choices, set(choices))), None, {})


def _rule(
    theirs: str,
    ours: str,
    choices: Mapping[str, Choices],
    *,
    over: str | None = None,
    dim: int = 0,
    sizes: tuple[int, ...] = (),
    groups: int = 1,
    to_ours: TensorFunction | None = None,
    to_theirs: TensorFunction | None = None,
    optional: bool = False,
) -> Rule:
    where = f"rule {theirs!r} <-> {ours!r}"
    their_fields, our_fields = set(_FIELD.findall(theirs)), set(_FIELD.findall(ours))
    if (to_ours is None) != (to_theirs is None):
        raise ValueError(f"{where}: to_ours and to_theirs are given together")
    only_theirs, only_ours = their_fields - our_fields, our_fields - their_fields
    if only_theirs != ({over} if over is not None else set()):
        raise ValueError(f"{where}: fields {sorted(only_theirs)} have no counterpart; only a stacked field may")
    if len(only_ours) > 1:
        raise ValueError(f"{where}: fields {sorted(only_ours)} have no counterpart; only the parts of a split may")
    part = only_ours.pop() if only_ours else None
    parts: tuple[str, ...] = ()
    if part is not None:
        parts = tuple(choices.get(part, ()))
        if len(parts) < 2 or isinstance(choices[part], (str, Mapping)):
            raise ValueError(f"{where}: {part}= must list the parts in the order of their blocks")
        sizes = sizes or (1,) * len(parts)
        if len(sizes) != len(parts) or min(sizes) < 1 or groups < 1:
            raise ValueError(f"{where}: {len(parts)} parts cannot have sizes {sizes} in {groups} groups")
    words = {
        field: dict(given) if isinstance(given, Mapping) else {word: word for word in given}
        for field, given in choices.items()
        if field != part
    }
    for field, translation in words.items():
        if len(set(translation.values())) != len(translation):
            raise ValueError(f"{where}: two words of {field!r} have the same translation")
    their_words = _pattern_words(theirs, choices, {field for field in choices if field != part})
    our_words = {field: tuple(translation.values()) for field, translation in words.items()}
    if part is not None:
        our_words[part] = parts
    return Rule(
        theirs=Pattern(theirs, their_words),
        ours=Pattern(ours, our_words),
        words=words,
        part=part,
        parts=parts,
        over=over,
        dim=dim,
        sizes=sizes,
        groups=groups,
        to_ours=to_ours,
        to_theirs=to_theirs,
        optional=optional,
    )


def _pattern_words(text: str, choices: Mapping[str, Choices], expected: set[str]) -> dict[str, tuple[str, ...]]:
    """The words of the fields of their pattern; an option that is no field is a misspelt one."""
    fields = set(_FIELD.findall(text))
    unknown = [name for name in expected if name not in fields]
    if unknown:
        raise TypeError(f"pattern {text!r} has no field {unknown[0]!r}")
    words = {}
    for name in expected:
        given = choices[name]
        if isinstance(given, str) or not all(isinstance(word, str) and word for word in given) or not given:
            raise ValueError(f"pattern {text!r}: {name}= must be a list of words, found {given!r}")
        words[name] = tuple(given)
    return words
