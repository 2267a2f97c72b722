"""KeyMap: the published names of a checkpoint and ours, one table read in two directions.

    KEYS = KeyMap(
        rename("trunk.{layer}.{norm}.{kind}", "blocks.{layer}.{norm}.{kind}", norm={"norm0": "norm1", ...}),
        split("trunk.{layer}.wqkv.{kind}", "blocks.{layer}.attn.{part}.{kind}", part=("q", "k", "v")),
        stack("layers.{layer}.experts.{expert}.up_proj.weight", "blocks.{layer}.experts.up"),
        drop("layers.{layer}.rotary_emb.inv_freq"),
    )
    KEYS.mounted(theirs="vision_tower.", ours="vision.") + projector.KEYS.mounted(theirs="mm.", ours="projector.")

    their names and shapes + our names and shapes -> plan_load -> [Step] -> filled one tensor at a time
    our names and shapes                          -> plan_save -> [Step] -> written one tensor at a time

A map is total and injective both ways: a name that no rule knows, a name that two rules know, a parameter that nothing
fills, and a shape that differs are errors, all of them in one grouped report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from vlkit.errors import ConfigError, KeyMismatchError
from vlkit.hub.report import NUMBER, KeyReport, ShapeMismatch, collapse
from vlkit.hub.rules import Pattern, Rule, drop, rename, reshape, split, stack

__all__ = [
    "Chosen",
    "KeyMap",
    "KeyReport",
    "Pattern",
    "Rule",
    "Step",
    "choose_keymap",
    "collapse",
    "drop",
    "rename",
    "reshape",
    "split",
    "stack",
]

Shapes = Mapping[str, Sequence[int]]
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Step:
    """How one target tensor is made.

    Attributes:
        target: Name of the tensor that is made: ours on loading, theirs on saving.
        sources: Names that it is made from. On loading: one, or one per row of a stack, in order. On saving: one per
            part.
        shape: Its shape.
        rule: The rule that says how.
        part: On loading, the block of each source.
        row: On saving, the row of each source, or None for the whole.
    """

    target: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    rule: Rule
    part: int = 0
    row: int | None = None

    def pieces(self, read: Read) -> Iterator[tuple[int | None, Tensor]]:
        """On loading: (row of the parameter or None for all of it, what goes there), one source at a time.

        Pieces are views of the sources where that is possible, so at most one source is needed at once.
        """
        for row in range(len(self.sources)):
            yield (row if self.rule.over is not None else None), self.piece(row, read)

    def piece(self, row: int, read: Read) -> Tensor:
        """On loading: what one source gives, a row of a stack or, as source 0, the whole parameter."""
        return self.rule.block(read(self.sources[row]), self.part)

    def load(self, read: Read) -> Tensor:
        """On loading: the parameter, as one new tensor or as a view of its only source."""
        pieces = [piece for _, piece in self.pieces(read)]
        return pieces[0] if self.rule.over is None else torch.stack(pieces)

    def save(self, read: Read) -> Tensor:
        """On saving: the tensor to write, as a view where that is possible."""
        return self.save_from(lambda source, row: read(source) if row is None else read(source)[row])

    def save_from(self, read: Callable[[str, int | None], Tensor]) -> Tensor:
        """`save`, where the rows of a stack are read one by one."""
        return self.rule.join([read(source, self.row) for source in self.sources])


@dataclass
class _Filling:
    """The tensors found for one parameter: row of the stack (0 where there is none) -> name."""

    rule: Rule
    part: int
    fields: dict[str, str]
    sources: dict[int, str] = field(default_factory=dict)


class KeyMap:
    """Rules between published names and ours. See the top of this file."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules
        # Names of a checkpoint differ mostly in their numbers; which rules come into question is found once for all that do.
        self._likely_theirs: dict[str, list[Rule]] = {}
        self._likely_ours: dict[str, list[Rule]] = {}

    def __add__(self, other: KeyMap) -> KeyMap:
        return KeyMap(*self.rules, *other.rules)

    def __repr__(self) -> str:
        return "KeyMap(\n" + "".join(f"    {rule}\n" for rule in self.rules) + ")"

    def mounted(self, *, theirs: str = "", ours: str = "") -> KeyMap:
        """The map of a part, as the whole sees it: under a prefix on either side."""
        return KeyMap(*(rule.mounted(theirs, ours) for rule in self.rules))

    def read_only(self) -> KeyMap:
        """The map of another published spelling: `KEYS + OLD_KEYS.read_only()` loads both and writes the first."""
        return KeyMap(*(replace(rule, read_only=True) for rule in self.rules))

    # Loading.

    def plan_load(self, theirs: Shapes, ours: Shapes | None = None, *, strict: bool = True) -> list[Step]:
        """How every parameter is made from a checkpoint, from names and shapes alone.

        Args:
            theirs: Name -> shape of every tensor of the checkpoint.
            ours: Name -> shape of every parameter of the model; None takes whatever the checkpoint gives.
            strict: False tolerates missing and unexpected names, never shapes. `compare` also gives the report.

        Returns:
            One step per parameter that is filled, in the order of `ours`.

        Raises:
            KeyMismatchError: All that does not fit, in one report.
        """
        steps, report = self.compare(theirs, ours)
        if report.num_problems if strict else report.mismatched or report.ambiguous:
            raise KeyMismatchError(str(report))
        return steps

    def compare(self, theirs: Shapes, ours: Shapes | None = None) -> tuple[list[Step], KeyReport]:
        """The steps of `plan_load` for what fits, and a report of what does not. Raises nothing."""
        report = KeyReport(num_parameters=len(ours) if ours is not None else 0)
        found = self._assign(theirs, ours, report)
        steps = []
        for target in found if ours is None else ours:
            filling = found.get(target)
            if filling is None:
                report.missing[target] = self._expected_name(target, report)
                continue
            step = _checked_step(target, filling, theirs, None if ours is None else tuple(ours[target]), report)
            if step is not None:
                steps.append(step)
        return steps, report

    def _assign(self, theirs: Shapes, ours: Shapes | None, report: KeyReport) -> dict[str, _Filling]:
        found: dict[str, _Filling] = {}
        for name in theirs:
            matches = self._reading(name)
            if len(matches) > 1:
                report.ambiguous.append(f"{name} is matched by " + " and by ".join(str(rule) for rule, _ in matches))
            if len(matches) != 1:
                report.unexpected += [] if matches else [name]
                continue
            rule, fields = matches[0]
            if rule.ours is None:
                report.ignored.append(name)
                continue
            targets = [rule.our_name(fields, part) for part in range(rule.num_parts)]
            known = [ours is None or target in ours for target in targets]
            if not any(known):
                (report.ignored if rule.optional else report.unexpected).append(name)
                continue
            if not all(known):
                absent = [target for target, there in zip(targets, known, strict=True) if not there]
                report.ambiguous.append(f"{name} also makes {', '.join(absent)}, which the model does not have")
            row = int(fields[rule.over]) if rule.over is not None else 0
            for part, target in enumerate(targets):
                if ours is not None and target not in ours:
                    continue
                filling = found.setdefault(target, _Filling(rule, part, fields))
                if filling.rule is not rule or row in filling.sources:
                    first = next(iter(filling.sources.values()))
                    report.ambiguous.append(f"{target} would be filled by {first} and by {name}")
                else:
                    filling.sources[row] = name
        return found

    def _expected_name(self, target: str, report: KeyReport) -> str:
        """The name that would fill a parameter."""
        matches = self._writing(target)
        if len(matches) == 1:
            rule, fields = matches[0]
            return rule.their_name(fields)
        if len(matches) > 1:
            report.ambiguous.append(f"{target} is matched by " + " and by ".join(str(rule) for rule, _ in matches))
        return "(no rule)" if not matches else "(two rules)"

    # Saving.

    def plan_save(self, ours: Shapes) -> list[Step]:
        """How every published tensor is made from the parameters of a model.

        Args:
            ours: Name -> shape of every parameter.

        Returns:
            One step per published tensor, in the order of `ours`.

        Raises:
            KeyMismatchError: A parameter that no rule or two rules match, parts that are missing or do not fit.
        """
        problems: list[str] = []
        groups: dict[tuple[Rule, tuple[tuple[str, str], ...]], dict[int, str]] = {}
        for name in ours:
            matches = self._writing(name)
            if len(matches) != 1:
                rules = " and by ".join(str(rule) for rule, _ in matches)
                problems.append(f"{name} is matched by {rules}" if matches else f"{name} has no published name")
                continue
            rule, fields = matches[0]
            part = rule.parts.index(fields.pop(rule.part)) if rule.part is not None else 0
            groups.setdefault((rule, tuple(sorted(fields.items()))), {})[part] = name
        steps: dict[str, Step] = {}
        for (rule, pairs), by_part in groups.items():
            fields = dict(pairs)
            absent = [rule.our_name(fields, part) for part in range(rule.num_parts) if part not in by_part]
            if absent:
                problems.append(f"{rule.their_name(fields)} cannot be written without {', '.join(absent)}")
                continue
            sources = tuple(by_part[part] for part in range(rule.num_parts))
            try:
                made = _save_steps(rule, fields, sources, [tuple(ours[source]) for source in sources])
            except (ValueError, RuntimeError, IndexError) as error:
                shapes = ", ".join(f"{source} {list(ours[source])}" for source in sources)
                problems.append(f"{rule.their_name(fields)} cannot be made from {shapes}: {error}")
                continue
            for step in made:
                if step.target in steps:
                    first = steps[step.target].sources[0]
                    problems.append(f"{step.target} would be made from {first} and from {step.sources[0]}")
                steps[step.target] = step
        if problems:
            raise KeyMismatchError("names do not fit:\n" + "\n".join(f"  {line}" for line in collapse(problems)[:20]))
        return list(steps.values())

    def _reading(self, name: str) -> list[tuple[Rule, dict[str, str]]]:
        likely = self._likely_theirs.get(shape := NUMBER.sub("0", name))
        if likely is None:
            likely = [rule for rule in self.rules if rule.theirs.may_match(name)]
            self._likely_theirs[shape] = likely
        return [(rule, fields) for rule in likely if (fields := rule.match_theirs(name)) is not None]

    def _writing(self, name: str) -> list[tuple[Rule, dict[str, str]]]:
        likely = self._likely_ours.get(shape := NUMBER.sub("0", name))
        if likely is None:
            writing = [rule for rule in self.rules if not rule.read_only]
            likely = [rule for rule in writing if rule.ours is not None and rule.ours.may_match(name)]
            self._likely_ours[shape] = likely
        return [(rule, fields) for rule in likely if (fields := rule.match_ours(name)) is not None]

    # Whole state dicts.

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict with our names. Tensors are views where that is possible; stacks are new.

        Raises:
            KeyMismatchError: A name without a rule, or a stack with a hole.
        """
        steps = self.plan_load({name: tensor.shape for name, tensor in state.items()})
        return {step.target: step.load(state.__getitem__) for step in steps}

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_ours`, except for what was dropped.

        Raises:
            KeyMismatchError: A name without a rule, or a part without the others.
        """
        steps = self.plan_save({name: tensor.shape for name, tensor in state.items()})
        return {step.target: step.save(state.__getitem__) for step in steps}


@dataclass(frozen=True)
class Chosen:
    """The map that `choose_keymap` chose: its place in the list, the steps of its `plan_load`, and its report."""

    index: int
    steps: list[Step]
    report: KeyReport


def choose_keymap(
    maps: Sequence[KeyMap],
    theirs: Shapes,
    ours: Shapes,
    *,
    strict: bool = True,
    layout: int | None = None,
    written: int | None = None,
) -> Chosen:
    """The map under which a checkpoint fits a model, for families that were published in several layouts.

    Names and shapes decide. Where they fit two maps that read the same numbers, the first is taken; where the two read
    different numbers (square matrices that one layout stores transposed) nothing in the file can tell, so that is refused.

    Args:
        maps: The layouts of a family.
        theirs: Name -> shape of every tensor of the checkpoint.
        ours: Name -> shape of every parameter of the model.
        strict: False takes the nearest map and tolerates missing and unexpected names, never shapes.
        layout: The index of the map to use, if that is known; the others are then not looked at.
        written: The index that the files claim; it decides only where names and shapes cannot.

    Raises:
        KeyMismatchError: The report of the nearest map; or two maps fit and mean different things.
        ConfigError: `layout` is no index of the list.
    """
    if layout is not None and not (type(layout) is int and 0 <= layout < len(maps)):
        raise ConfigError(f"layout: expected a number from 0 to {len(maps) - 1}, found {layout!r}")
    tried = range(len(maps)) if layout is None else (layout,)
    found = [Chosen(index, *maps[index].compare(theirs, ours)) for index in tried]
    least = min(chosen.report.num_problems for chosen in found)
    nearest = [chosen for chosen in found if chosen.report.num_problems == least]
    best = nearest[0]
    if least if strict else best.report.mismatched or best.report.ambiguous:
        which = f"layout {best.index} of {len(maps)} is the nearest: " if len(maps) > 1 and layout is None else ""
        raise KeyMismatchError(f"{which}{best.report}")
    for other in nearest[1:]:
        differ = _differences(best, other, theirs)
        if differ:
            claimed = next((chosen for chosen in nearest if chosen.index == written), None)
            if claimed is not None:
                return claimed
            raise KeyMismatchError(
                f"names and shapes fit layout {best.index} and layout {other.index}, which read "
                f"{', '.join(collapse(differ)[:5])} differently (square matrices, one of them transposed?); nothing in the "
                f"file tells which it is: pass layout={best.index} or layout={other.index}"
            )
    return best


def _differences(one: Chosen, two: Chosen, theirs: Shapes) -> list[str]:
    """Parameters that two maps fill with different numbers."""
    others = {step.target: step for step in two.steps}
    known: dict[tuple[int, int, int, int, tuple[int, ...]], bool] = {}

    def same(a: Step, b: Step) -> bool:
        if a.sources != b.sources or (a.rule.over is None) != (b.rule.over is None):
            return False
        if a.part == b.part and a.rule.cuts_like(b.rule):
            return True
        shape = tuple(theirs[a.sources[0]])
        key = (id(a.rule), a.part, id(b.rule), b.part, shape)
        if key not in known:  # the functions are anybody's, so the question is put to numbers
            probe = torch.arange(math.prod(shape)).view(shape)
            known[key] = torch.equal(a.rule.block(probe, a.part), b.rule.block(probe, b.part))
        return known[key]

    differ = [step.target for step in one.steps if step.target not in others or not same(step, others[step.target])]
    return differ + sorted(others.keys() - {step.target for step in one.steps})


def _checked_step(
    target: str, filling: _Filling, theirs: Shapes, wanted: tuple[int, ...] | None, report: KeyReport
) -> Step | None:
    """The step of one parameter, or None with a line in the report."""
    rule, rows = filling.rule, sorted(filling.sources)
    num_rows = len(rows)
    if rule.over is not None:
        num_rows = rows[-1] + 1 if wanted is None else (wanted[0] if wanted else 0)
        absent = list(islice((row for row in range(num_rows) if row not in filling.sources), 1000))
        surplus = [row for row in rows if row >= num_rows]
        if absent:
            names = collapse(rule.their_name(filling.fields | {rule.over: str(row)}) for row in absent)
            more = "" if len(rows) + len(absent) >= num_rows else f", and on to row {num_rows - 1}"
            report.missing[target] = ", ".join(names) + more
        report.unexpected += [filling.sources[row] for row in surplus]
        if absent or surplus:
            return None
    sources = tuple(filling.sources[row] for row in rows)
    block: tuple[int, ...] | None = None
    for source in sources:
        their_shape = tuple(theirs[source])
        try:
            made, reason = _block_shape(rule, their_shape, filling.part), ""
        except (ValueError, RuntimeError, IndexError) as error:
            made, reason = None, str(error).splitlines()[0]
        if block is None:
            block = made
        expected = block if wanted is None else wanted[1:] if rule.over is not None else wanted
        if made is None or made != expected:
            report.mismatched.append(ShapeMismatch(source, their_shape, target, expected, made, reason))
            return None
    assert block is not None
    return Step(target, sources, (num_rows, *block) if rule.over is not None else block, rule, part=filling.part)


def _block_shape(rule: Rule, shape: tuple[int, ...], part: int) -> tuple[int, ...]:
    if rule.to_ours is None and not rule.parts:
        return shape
    return tuple(rule.block(torch.empty(shape, device="meta"), part).shape)


def _save_steps(
    rule: Rule, fields: Mapping[str, str], sources: tuple[str, ...], shapes: list[tuple[int, ...]]
) -> list[Step]:
    """The steps that write one group of parts: one, or one per row of a stack."""
    if rule.over is None:
        return [Step(rule.their_name(fields), sources, rule.joined_shape(shapes), rule)]
    if not all(shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError("the parts have different numbers of rows")
    joined = rule.joined_shape([shape[1:] for shape in shapes])
    return [Step(rule.their_name(fields, row), sources, joined, rule, row=row) for row in range(shapes[0][0])]
