"""The picture of a run: loss, learning rates, fill of the packs and balance of the experts, step by step.

metrics.jsonl -> four panels, one above the other, stages marked -> picture.svg
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlkit.errors import MissingDependencyError
from vlkit.training.metrics import METRICS, read_metrics

PICTURE = "picture.svg"
_FILLS = {"token_fill": "tokens", "patch_fill": "patches"}
_EXPERTS = {"max_violation": "largest over mean, less 1", "entropy": "entropy of the load", "dead": "without a token"}


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
    panels = _panels(entries)
    with mpl.rc_context({"svg.hashsalt": "vlkit", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8, 0.6 + 2.1 * len(panels)), layout="constrained")
        for axes, (title, lines) in zip(
            figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True
        ):
            for name, points in lines.items():
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 40 else "")
            for step, stage in _beginnings(entries):
                axes.axvline(step - 0.5, color="0.6", linewidth=0.8)
                axes.text(
                    step - 0.5,
                    0.02,
                    f" {stage}",
                    transform=axes.get_xaxis_transform(),
                    va="bottom",
                    color="0.4",
                    fontsize=8,
                )
            axes.set_title(title, loc="left", fontsize=9)
            axes.grid(alpha=0.3)
            if len(lines) > 1:
                axes.legend(fontsize=7, frameon=False)
        axes.set_xlabel("step")
        partial = folder / f".{PICTURE}.partial"
        figure.savefig(partial, format="svg", metadata={"Date": None})
    os.replace(partial, folder / PICTURE)
    return folder / PICTURE


Lines = dict[str, list[tuple[int, float]]]


def _panels(entries: Sequence[dict[str, Any]]) -> list[tuple[str, Lines]]:
    """Title and lines of each panel; the loss is always there."""
    rates = {part for entry in entries for part in entry.get("rates", {})}
    found = [
        ("loss", {"loss": _line(entries, "loss")}),
        ("learning rate", {part: _line(entries, "rates", part) for part in sorted(rates)}),
        ("fill of the packs", {name: _line(entries, key) for key, name in _FILLS.items()}),
        ("experts", {name: _line(entries, "experts", key) for key, name in _EXPERTS.items()}),
    ]
    told = [(title, {name: points for name, points in lines.items() if points}) for title, lines in found]
    return [(title, lines) for title, lines in told if lines] or [("loss", {})]


def _line(entries: Sequence[dict[str, Any]], *path: str) -> list[tuple[int, float]]:
    """Step and value, where there is one."""
    points = []
    for entry in entries:
        value: Any = entry
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            points.append((entry["step"], float(value)))
    return points


def _beginnings(entries: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """First told step and name of every stage."""
    found: list[tuple[int, str]] = []
    for entry in entries:
        if "stage" in entry and (not found or found[-1][1] != entry["stage"]):
            found.append((entry["step"], entry["stage"]))
    return found
