"""One HTML page that holds all it shows: strips with answers and mistakes, curves, expert load.

Result -> render -> text of index.html, without a single outside resource
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from string import Template
from typing import NamedTuple

from vlkit.demo.strips import Strip

SHOWN_STRIPS = 60
SHOWN_MISTAKES = 120


class Step(NamedTuple):
    """One training step.

    Attributes:
        seconds: Since the training began.
        samples: Strips seen so far.
        loss: Mean cross-entropy of the answers' tokens, in nats.
        rate: Learning rate of the hidden matrices.
    """

    seconds: float
    samples: int
    loss: float
    rate: float


class Check(NamedTuple):
    """How well strips of unseen writers were read at one moment; `exact` is the share of whole strings that were right."""

    seconds: float
    exact: float


class Reading(NamedTuple):
    """A strip and what the model answered."""

    strip: Strip
    answer: str

    @property
    def right(self) -> bool:
        return self.answer == self.strip.text


@dataclass(frozen=True, kw_only=True)
class Result:
    """All that the page tells.

    Attributes:
        title: What the model is made of, in one line.
        readings: Unseen strips as the saved model read them in a fresh process.
        steps: The training, in order.
        checks: Looks at unseen writers while training.
        load: Tokens that each expert of each MoE layer received while reading; empty for dense decoders.
        tree: The model as a text tree.
        facts: Pairs for the table at the end (name, value).
        commands: Commands to try next, (what it does, command).
        stopped: Whether the training was stopped by hand.
    """

    title: str
    readings: Sequence[Reading]
    steps: Sequence[Step]
    checks: Sequence[Check]
    load: Sequence[Sequence[int]] = ()
    tree: str = ""
    facts: Sequence[tuple[str, str]] = ()
    commands: Sequence[tuple[str, str]] = ()
    stopped: bool = False
    digits: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        same_length = [r for r in self.readings if len(r.answer) == len(r.strip.text)]
        right = sum(a == b for r in same_length for a, b in zip(r.answer, r.strip.text, strict=True))
        object.__setattr__(self, "digits", (right, sum(len(r.answer) for r in same_length)))

    @property
    def num_exact(self) -> int:
        return sum(r.right for r in self.readings)


def render(result: Result) -> str:
    """The page."""
    mistakes = [r for r in result.readings if not r.right]
    exact = result.num_exact / max(len(result.readings), 1)
    right, aligned = result.digits
    tiles = [
        (
            _percent(exact),
            "whole strings right",
            f"{result.num_exact} of {len(result.readings)} strips by unseen writers",
        ),
        (_percent(right / max(aligned, 1)), "digits right", "where the answer has the right length"),
        (f"{result.steps[-1].seconds:.0f} s" if result.steps else "0 s", "of training", _training_note(result)),
    ]
    template = resources.files("vlkit.demo").joinpath("data/report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=html.escape(result.title),
        tiles="".join(
            f'<div class="tile"><b>{value}</b><span>{html.escape(what)}</span><small>{html.escape(note)}</small></div>'
            for value, what, note in tiles
        ),
        strips=_cards(result.readings[:SHOWN_STRIPS]),
        mistakes=_cards(mistakes[:SHOWN_MISTAKES]) or '<p class="quiet">None.</p>',
        mistakes_note=_mistakes_note(len(mistakes)),
        lengths=_lengths(result.readings),
        confusions=_confusions(result.readings),
        curves=_curves(result),
        experts=_experts(result.load),
        tree=html.escape(result.tree),
        facts="".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in result.facts),
        commands="".join(
            f"<p>{html.escape(what)}</p><pre><code>{html.escape(command)}</code></pre>"
            for what, command in result.commands
        ),
    )


def _training_note(result: Result) -> str:
    if not result.steps:
        return "stopped before the first step"
    note = f"{result.steps[-1].samples:,} strips, {len(result.steps):,} steps"
    return note + ", stopped by hand" if result.stopped else note


def _mistakes_note(count: int) -> str:
    shown = f"; the first {SHOWN_MISTAKES} are shown" if count > SHOWN_MISTAKES else ""
    return f"{count} strips were misread{shown}. The struck-out text is the answer, under it is what was written."


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _cards(readings: Iterable[Reading]) -> str:
    return "".join(_card(reading) for reading in readings)


def _card(reading: Reading) -> str:
    rows, columns = reading.strip.pixels.shape
    answer = html.escape(reading.answer) or "(nothing)"
    said = f"<b>{answer}</b>" if reading.right else f"<s>{answer}</s><b>{html.escape(reading.strip.text)}</b>"
    return (
        f'<figure class="{"right" if reading.right else "wrong"}">'
        f'<img src="{picture_uri(reading.strip)}" width="{2 * columns}" height="{2 * rows}" '
        f'alt="handwritten {html.escape(reading.strip.text)}"><figcaption>{said}</figcaption></figure>'
    )


def picture_uri(strip: Strip) -> str:
    """The strip as a PNG inside a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(strip.pixels).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _lengths(readings: Sequence[Reading]) -> str:
    """Share of exact answers by the number of digits."""
    rows = []
    for length in sorted({len(r.strip.text) for r in readings}):
        of_length = [r for r in readings if len(r.strip.text) == length]
        share = sum(r.right for r in of_length) / len(of_length)
        rows.append(
            f'<div class="bar"><span>{length} digit{"s" if length > 1 else ""}</span>'
            f'<i><i style="width:{100 * share:.1f}%"></i></i><span>{100 * share:.0f}%</span>'
            f"<small>of {len(of_length)}</small></div>"
        )
    return "".join(rows)


def _confusions(readings: Sequence[Reading]) -> str:
    """A 10 x 10 table: rows are what was written, columns what was read."""
    counts = [[0] * 10 for _ in range(10)]
    for reading in readings:
        if len(reading.answer) == len(reading.strip.text) and reading.answer.isdecimal() and reading.answer.isascii():
            for true, read in zip(reading.strip.text, reading.answer, strict=True):
                counts[int(true)][int(read)] += 1
    head = "".join(f"<th>{digit}</th>" for digit in range(10))
    rows = []
    for written, row in enumerate(counts):
        total = max(sum(row), 1)
        cells = "".join(
            f'<td class="{"hit" if column == written else "miss"}" style="--share:{count / total:.3f}">{count or ""}</td>'
            for column, count in enumerate(row)
        )
        rows.append(f"<tr><th>{written}</th>{cells}</tr>")
    return f'<table class="confusions"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _curves(result: Result) -> str:
    if not result.steps:
        return '<p class="quiet">Stopped before the first step.</p>'
    end = max([result.steps[-1].seconds, *(c.seconds for c in result.checks)])
    loss = [(s.seconds, s.loss) for s in result.steps]
    smooth = _smooth(loss)
    exact = [(c.seconds, 100 * c.exact) for c in result.checks]
    rate = [(s.seconds, s.rate) for s in result.steps]
    read = f"{exact[-1][1]:.0f}%" if exact else ""
    return (
        _chart("Loss", "nats per token", smooth, end, f"{smooth[-1][1]:.2f}", faint=_thin(loss))
        + _chart("Unseen writers", "whole strings right, in %", exact, end, read, top=100, dots=True)
        + _chart("Learning rate", "of the hidden matrices", _thin(rate), end, f"{max(y for _, y in rate):.3g} at most")
    )


Points = list[tuple[float, float]]


def _thin(points: Points, most: int = 240) -> Points:
    stride = -(-len(points) // most)
    return points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])


def _smooth(points: Points) -> Points:
    """A running mean over a fiftieth of the training."""
    window = max(1, len(points) // 50)
    means = []
    total = 0.0
    for index, (x, y) in enumerate(points):
        total += y - (points[index - window][1] if index >= window else 0)
        means.append((x, total / min(index + 1, window)))
    return _thin(means)


def _chart(
    title: str,
    unit: str,
    points: Points,
    end: float,
    value: str,
    *,
    top: float | None = None,
    faint: Points | None = None,
    dots: bool = False,
) -> str:
    """A line over seconds, as inline SVG: a plot between x = 40 and 312, y = 12 and 152, and its labels around."""
    left, right, upper, lower = 40, 312, 12, 152
    highest = top or _round_up(max((y for _, y in [*points, *(faint or [])]), default=1.0))
    end = end or 1.0

    def x_of(seconds: float) -> str:
        return f"{left + (right - left) * seconds / end:.1f}"

    def y_of(height: float) -> str:
        return f"{lower - (lower - upper) * min(height / highest, 1):.1f}"

    def line(of: Points) -> str:
        return " ".join(f"{x_of(x)},{y_of(y)}" for x, y in of)

    ticks = "".join(
        f'<line x1="{left}" x2="{right}" y1="{y_of(tick)}" y2="{y_of(tick)}"/>'
        f'<text x="{left - 6}" y="{y_of(tick)}" dy="3" text-anchor="end">{tick:.3g}</text>'
        for tick in (highest * k / 4 for k in range(5))
    )
    times = "".join(
        f'<text x="{x_of(end * k / 4)}" y="{lower + 16}" text-anchor="{"end" if k == 4 else "middle"}">{end * k / 4:.0f} s</text>'
        for k in range(5)
    )
    marks = "".join(f'<circle cx="{x_of(x)}" cy="{y_of(y)}" r="2.6"/>' for x, y in points) if dots else ""
    raw = f'<polyline class="faint" points="{line(faint)}"/>' if faint else ""
    return (
        f'<figure class="chart"><figcaption><b>{html.escape(title)}</b><output>{html.escape(value)}</output>'
        f"<small>{html.escape(unit)}</small></figcaption>"
        f'<svg viewBox="0 0 320 176" role="img" aria-label="{html.escape(title)} over time; {html.escape(value)}">'
        f'{ticks}{times}{raw}<polyline points="{line(points)}"/>{marks}</svg></figure>'
    )


def _round_up(value: float) -> float:
    """The next number whose quarters read well: 1, 2, 4 or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if value <= step * power * 1.0001)


def _experts(load: Sequence[Sequence[int]]) -> str:
    if not load:
        return '<p class="quiet">This decoder has no experts.</p>'
    layers = []
    for index, counts in enumerate(load):
        total, mean = max(sum(counts), 1), max(sum(counts) / max(len(counts), 1), 1e-9)
        highest = max(*counts, 1)
        bars = "".join(
            f'<div class="expert" title="expert {expert}: {count:,} tokens">'
            f'<i style="height:{100 * count / highest:.1f}%"></i><span>{100 * count / total:.0f}%</span></div>'
            for expert, count in enumerate(counts)
        )
        layers.append(
            f'<div class="layer"><h3>MoE layer {index + 1}</h3><div class="experts">{bars}'
            f'<div class="even" style="bottom:calc(1.4rem + (100% - 1.4rem) * {mean / highest:.3f})"></div></div>'
            f"<small>busiest expert: {highest / mean:.2f} times the mean</small></div>"
        )
    return "".join(layers)
