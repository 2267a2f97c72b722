"""docs/robustness.md names tests; each of them exists, and every row has one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "robustness.md").read_text(encoding="utf-8")
ROWS = {int(row[1]): row[0] for row in re.finditer(r"^\| (\d+) \|.*$", TEXT, re.MULTILINE)}


def named(text: str) -> list[tuple[str, str]]:
    """File and function of every test in a text; a file is named once for those that follow."""
    found, file = [], ""
    for path, function in re.findall(r"`([\w/]+\.py)?::(\w+)`", text):
        file = path or file
        found.append((file, function))
    return found


def test_rows_are_numbered_without_a_hole() -> None:
    assert list(ROWS) == list(range(1, len(ROWS) + 1))
    assert len(ROWS) >= 22


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_tests_that_exist(row: int) -> None:
    tests = named(ROWS[row])
    assert tests
    for file, function in tests:
        assert re.search(rf"^def {function}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE), (
            file,
            function,
        )
