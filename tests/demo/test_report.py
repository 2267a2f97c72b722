"""The page: complete in itself, true to its figures, and safe with whatever a model writes."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from vlkit.demo.digits import load_digits
from vlkit.demo.report import Check, Reading, Result, Step, _round_up, _thin, render
from vlkit.demo.strips import make_strips


class _Page(HTMLParser):
    """Collects what a page loads, and checks that its elements nest."""

    VOID = {"meta", "img", "line", "circle", "polyline", "br"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.images = 0
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.images += tag == "img"
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster", "action")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _parse(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


def _result(answers: list[str] | None = None, **changes: object) -> Result:
    strips = make_strips(load_digits("unseen"), 9, seed=0)
    answers = [s.text for s in strips] if answers is None else answers
    told = {
        "title": "a model",
        "readings": [Reading(s, a) for s, a in zip(strips, answers, strict=True)],
        "steps": [Step(0.5 * i, 64 * i, 2.0 / i, 0.01) for i in range(1, 500)],
        "checks": [Check(10.0, 0.25), Check(20.0, 0.5)],
        "load": [[3, 5, 0, 8], [1, 1, 1, 1]],
        "tree": "model\n└─ part",
        "facts": [("seed", "0")],
        "commands": [("Try", "vlkit generate folder")],
        **changes,
    }
    return Result(**told)  # type: ignore[arg-type]


def test_the_page_holds_all_it_shows() -> None:
    page = render(_result())
    found = _parse(page)
    assert found.images == 9
    assert all(source.startswith("data:image/png;base64,") for source in found.loads)
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)


def test_figures_on_the_page_are_those_of_the_run() -> None:
    strips = make_strips(load_digits("unseen"), 9, seed=0)
    answers = [s.text for s in strips[:6]] + ["x", "", strips[8].text + "1"]
    result = _result(answers)
    text = " ".join(_parse(render(result)).text)
    assert result.num_exact == 6
    assert "66.7%" in text
    assert "6 of 9 strips" in text
    assert "3 strips were misread" in text
    assert "(nothing)" in text


def test_what_a_model_writes_is_text_and_not_markup() -> None:
    hostile = "<img src=x onerror=alert(1)>"
    page = render(
        _result([hostile] * 9, title=hostile, tree=hostile, facts=[(hostile, hostile)], commands=[(hostile, hostile)])
    )
    assert "<img src=x" not in page
    assert all(source.startswith("data:") for source in _parse(page).loads)


@pytest.mark.parametrize(
    "changes", [{"steps": [], "checks": []}, {"load": []}, {"checks": []}, {"readings": []}, {"stopped": True}]
)
def test_a_run_cut_short_still_gives_a_page(changes: dict[str, object]) -> None:
    _parse(render(_result(**changes)))


def test_confusions_count_written_and_read_digits() -> None:
    strip = make_strips(load_digits("unseen"), 1, seed=0, min_digits=1, max_digits=1)[0]
    wrong = str((int(strip.text) + 1) % 10)
    page = render(_result(readings=[Reading(strip, wrong)] * 7))
    assert page.count(">7</td>") == 1
    assert 'class="miss" style="--share:1.000">7<' in page


def test_thinning_keeps_the_first_and_the_last_point() -> None:
    points = [(float(i), float(i)) for i in range(1001)]
    thin = _thin(points)
    assert len(thin) <= 242
    assert thin[0] == points[0]
    assert thin[-1] == points[-1]


def test_axes_end_above_the_highest_value() -> None:
    assert [_round_up(v) for v in (0.007, 0.9, 1.0, 3.0, 5.8, 0.0)] == pytest.approx([0.008, 1.0, 1.0, 4.0, 8.0, 1.0])
