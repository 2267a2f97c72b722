"""The picture of a run: loss, what is said of answers, learning rates, fill of the packs and experts, step by step.

metrics.jsonl -> a panel of each, one above the other, stages marked -> picture.svg
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vlkit.errors import MissingDependencyError
from vlkit.training.metrics import METRICS, read_metrics

PICTURE = "picture.svg"
_FILLS = {"token_fill": "tokens", "patch_fill": "patches"}
_EXPERTS = {"max_violation": "largest over mean, less 1", "entropy": "entropy of the load", "dead": "without a token"}
_LOOKS = (("#0072b2", "-"), ("#d55e00", "--"), ("#009e73", ":"), ("#cc79a7", "-."))
"""Colour and dashes of the lines of a panel, apart for eyes of every kind and in print (Okabe and Ito)."""


def draw_picture(folder: Path) -> Path:
    """Draw what a run's metrics say; panels of which they say nothing are left out.

    The file is the same for the same metrics.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingDependencyError("a picture of the run needs matplotlib: pip install 'vlkit[viz]'") from missing
    entries = read_metrics(folder / METRICS)
    drawn, stages = panels(entries), beginnings(entries)
    with mpl.rc_context({"svg.hashsalt": "vlkit", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8, 0.8 + 2.1 * len(drawn)), layout="constrained")
        column = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, lines) in zip(column, drawn, strict=True):
            for (name, points), (color, style) in zip(lines.items(), _LOOKS, strict=False):
                steps, values = zip(*points, strict=True)
                marker = "." if len(points) < 40 else ""
                axes.plot(steps, values, label=name, color=color, linestyle=style, linewidth=1.3, marker=marker)
            for step, _ in stages:
                axes.axvline(step, color="0.6", linewidth=0.8)
            axes.set_ylabel(title)
            if title == "learning rate" and _far_apart(lines):
                axes.set_yscale("log", nonpositive="mask")
            axes.grid(alpha=0.3)
            if len(lines) > 1 or list(lines) != [title]:
                beside = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.1}  # no curve runs there
                axes.legend(fontsize=8, frameon=False, ncols=len(lines), **beside)
        top, bottom = column[0], column[-1]
        for number, (step, stage) in enumerate(stages):  # names of short stages would run into each other
            top.annotate(
                stage,
                (step, 1),
                xycoords=top.get_xaxis_transform(),
                xytext=(0, 3 + 10 * (number % 3 if len(stages) > 2 else 0)),
                textcoords="offset points",
                color="0.3",
                fontsize=8,
            )
        bottom.xaxis.get_major_locator().set_params(integer=True)
        bottom.set_xlabel("step")
        partial = folder / f".{PICTURE}.partial"
        figure.savefig(partial, format="svg", metadata={"Date": None})
    os.replace(partial, folder / PICTURE)
    return folder / PICTURE


Lines = dict[str, list[tuple[int, float | None]]]


def panels(entries: Sequence[dict[str, Any]]) -> list[tuple[str, Lines]]:
    """Title and lines of each panel; lines that are the same are one, under all their names."""
    rates = {part for entry in entries for part in entry.get("rates", {})}
    found = [
        ("loss", {"loss": _line(entries, "loss")}),
        ("answers", {name: _line(entries, name) for name in ("reward", "accuracy")}),
        ("learning rate", {part: _line(entries, "rates", part) for part in sorted(rates)}),
        ("fill of the packs", {name: _line(entries, key) for key, name in _FILLS.items()}),
        ("experts", {name: _line(entries, "experts", key) for key, name in _EXPERTS.items()}),
    ]
    told = [(title, _joined(lines)) for title, lines in found]
    return [(title, lines) for title, lines in told if lines] or [("loss", {})]


def _joined(lines: Lines) -> Lines:
    names: dict[tuple[tuple[int, float | None], ...], list[str]] = {}
    for name, points in lines.items():
        if any(value is not None for _, value in points):
            names.setdefault(tuple(points), []).append(name)
    return {", ".join(same): list(points) for points, same in names.items()}


def _far_apart(lines: Lines) -> bool:
    """Whether most of what is drawn would lie on the zero line, as a stage at 2e-5 does behind one at 1e-3."""
    values = [value for points in lines.values() for _, value in points if value]
    return bool(values) and max(values) > 20 * median(values)


def _line(entries: Sequence[dict[str, Any]], *path: str) -> list[tuple[int, float | None]]:
    """Step and value; none where nothing is told, as of a part that rests, so that a line is broken there."""
    points: list[tuple[int, float | None]] = []
    for entry in entries:
        value: Any = entry
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        points.append((entry["step"], float(value) if isinstance(value, int | float) else None))
    return points


def beginnings(entries: Sequence[dict[str, Any]]) -> list[tuple[float, str]]:
    """Where a stage begins, behind the last step of the one before, which is always told; and its name."""
    found: list[tuple[float, str]] = []
    before = 0
    for entry in entries:
        if "stage" in entry and (not found or found[-1][1] != entry["stage"]):
            found.append((before + 0.5, entry["stage"]))
        before = entry["step"]
    return found
