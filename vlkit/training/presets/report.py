"""Presets as text: an overview, all that is known of a stage with sources, and a list of stages in TOML to edit."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from vlkit.training.presets.fact import Fact, Facts, Stage, Unknown

WIDTH = 120
SURE = {"read": "", "summary": ", as a summary has it", "recalled": ", from memory"}


def overview(stages: Sequence[Stage]) -> str:
    """One line per stage: what trains, how long its sequences are, its highest rate, and how much a run has to say."""
    rows = [("stage", "trains", "length", "rate", "to say", "")]
    for stage in stages:
        length = _first(stage, "data.pack_tokens", "data.max_tokens")
        rows.append(
            (
                stage.name,
                _words(stage.sets.get("train")),
                length if length == "?" or not length else f"{int(length):,}",
                _words(stage.sets.get("optimizer.lr")),
                str(len(stage.unknown())),
                stage.title,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def table(stage: Stage) -> str:
    """All that is known of a stage, with sources at the end, and what is not."""
    sources: dict[str, int] = {}
    return "\n".join(
        [
            f"{stage.name}: {stage.title}",
            *_lines(stage.about, 2, sources),
            "  in a run's config:",
            *_lines(stage.sets, 4, sources),
            *(f"  [{number}] {source}" for source, number in sources.items()),
        ]
    )


def toml(stages: Sequence[Stage]) -> str:
    """A config with these stages: what is known as values with their sources, what is unknown as comments.

    It is TOML as it stands; a run accepts it once model, data and the commented values are filled in.
    """
    family = stages[0].name.split("/")[0] if stages else "run"
    head = [
        f'run = "runs/{family}"',
        "",
        "[model]",
        '# folder = "..."                # or name = "..."; see `vlkit list`',
        "",
        "[data]",
        '# files = ["train.jsonl"]',
    ]
    short = [stage.name.split("/")[1] for stage in stages]
    whole = [stage.name.replace("/", "-") for stage in stages]  # of several recipes, in which names come twice
    names = short if len(set(short)) == len(short) else whole
    return "\n".join(head + [line for stage, name in zip(stages, names, strict=True) for line in _toml_of(stage, name)])


def _toml_of(stage: Stage, name: str) -> list[str]:
    lines = ["", "", f"# {stage.title}"]
    for what, entry in stage.about.items():
        lines += _comment(f"{what}: {_words(entry)} {_origin(entry)}")
    lines += ["[[stages]]", f'name = "{name}"', f'preset = "{stage.name}"']
    for path, entry in stage.sets.items():
        if isinstance(entry, Unknown):
            lines += _comment(f"{' or '.join(path.split('|'))} =    unknown: {entry.why}")
        else:
            lines += [*_comment(_origin(entry)), f"{path} = {_toml_value(entry.value)}"]
            if path == "epochs" and "batch|packs" in stage.sets:
                lines += _comment("with packs: steps = tokens of the data / those of a step, in the place of epochs")
    return lines


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 2, initial_indent="# ", subsequent_indent="#     ", break_long_words=False)


def _lines(facts: Facts, indent: int, sources: dict[str, int]) -> list[str]:
    named = {name.replace("|", " or "): entry for name, entry in facts.items()}
    width = max(map(len, named), default=0)
    lines = []
    for name, entry in named.items():
        if isinstance(entry, Fact):
            number = sources.setdefault(entry.source, len(sources) + 1)
            origin = f" [{number}{SURE[entry.sure]}]" + (f" {entry.note}" if entry.note else "")
        else:
            origin = f" {entry.why}"
        hanging = " " * (indent + width + 2)
        text = f"{' ' * indent}{name:<{width}}  {_words(entry)} {origin}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)
    return lines


def _origin(entry: Fact | Unknown) -> str:
    if isinstance(entry, Unknown):
        return f" ({entry.why})"
    return f"[{entry.source}{SURE[entry.sure]}{'; ' if entry.note else ''}{entry.note}]"


def _first(stage: Stage, *paths: str) -> str:
    return next((_words(stage.sets[path]) for path in paths if path in stage.sets), "")


def _words(entry: Fact | Unknown | None) -> str:
    """A value as people write it; ? where it is unknown."""
    if entry is None:
        return ""
    if isinstance(entry, Unknown):
        return "?"
    value = entry.value
    if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
        return " + ".join(value)
    if isinstance(value, float) and value >= 1e6:
        unit, sign = next((unit, sign) for unit, sign in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if value >= unit / 10)
        return f"{value / unit:g} {sign}"
    return value if isinstance(value, str) else _toml_value(value)


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", repr(value))
