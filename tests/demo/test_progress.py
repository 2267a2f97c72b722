"""What a person sees while the model learns."""

from __future__ import annotations

import io

import pytest

from vlkit.demo.progress import ProgressLine
from vlkit.demo.report import Check, Step
from vlkit.demo.train import History


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _history(steps: int, *, checks: int = 0) -> History:
    return History(
        steps=[Step(0.1 * i, 64 * i, 2.5, 0.01) for i in range(1, steps + 1)],
        checks=[Check(1.0, 0.37)] * checks,
        tokens=1000 * steps,
    )


@pytest.mark.parametrize("columns", [200, 80, 40])
def test_a_terminal_gets_one_line_that_fits(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = _Terminal()
    line = ProgressLine(stream)
    line.update(_history(1), done=0.01, left=99)
    line._shown = -1
    line.update(_history(2, checks=1), done=0.5, left=75)
    line.finish()
    shown = stream.getvalue()
    assert shown.count("\n") == 1
    first, second = shown.rstrip("\n").split("\r")[1:]
    assert len(first) == len(second) == columns - 1
    assert second.startswith(" 50%")
    if columns >= 80:
        for part in ("1:15 left", "loss 2.500", "unseen writers 37%", "strips/s"):
            assert part in second


def test_a_terminal_is_not_flooded() -> None:
    stream = _Terminal()
    line = ProgressLine(stream)
    for step in range(1, 200):
        line.update(_history(step), done=step / 200, left=1)
    assert stream.getvalue().count("\r") < 20


def test_a_file_gets_a_plain_line_now_and_then() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    for step in range(1, 201):
        line.update(_history(step, checks=1), done=step / 200, left=1)
    line.finish()
    lines = stream.getvalue().splitlines()
    assert 9 <= len(lines) <= 11
    assert "\r" not in stream.getvalue()
    assert all("loss 2.500" in text and "unseen writers 37%" in text for text in lines)
