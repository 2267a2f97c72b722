"""JSON that json.loads would take in silence is refused, with line and column."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlkit.errors import ConfigError, CorruptCheckpointError
from vlkit.hub.strict_json import parse_json, read_json


def refusal(data: bytes | str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_json(data if isinstance(data, bytes) else data.encode(), "config.json")
    return str(caught.value)


def test_an_object_is_read_as_json_reads_it() -> None:
    text = '{"a": [1, -2.5e3, true, null, "\\u00e9\\n"], "b": {"a": {}}, "c": 18446744073709551615}'

    assert parse_json(text.encode(), "x") == {"a": [1, -2500.0, True, None, "é\n"], "b": {"a": {}}, "c": 2**64 - 1}


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ('{\n  "a": 1,\n  "b": {"c": 2,\n   "c": 3}\n}', "line 4, column 4", "key 'c' appears twice"),
        ('{"a": 1, "\\u0061": 2}', "line 1, column 10", "key 'a' appears twice"),
        ('{"x": "a", "a": [{"a": 1}],\n"x": 0}', "line 2, column 1", "key 'x' appears twice"),
        ('{"a": NaN}', "line 1, column 7", "NaN is not"),
        ('{"a": ["NaN",\n -Infinity]}', "line 2, column 2", "-Infinity is not"),
        ('{"a": 1e999}', "line 1, column 7", "beyond the range"),
        ('{"a": ' + "9" * 5000 + "}", "line 1, column 7", "5000 digits"),
        ('{"a": 1 2}', "line 1, column 9", "not JSON"),
        ('{"a" 1}', "line 1, column 6", "not JSON"),
        ("", "line 1, column 1", "an empty file"),
        ("[1, 2]", "line 1, column 1", "found a list"),
        ('"text"', "line 1, column 1", "found a string"),
        ("3", "line 1, column 1", "found a number"),
        ("true", "line 1, column 1", "found a boolean"),
        ("null", "line 1, column 1", "found null"),
        ("version https://git-lfs.github.com/spec/v1\n", "line 1, column 1", "git lfs pull"),
        ("<!DOCTYPE html><html>", "line 1, column 1", "an HTML page"),
    ],
)
def test_what_is_refused_says_where_and_why(text: str, where: str, what: str) -> None:
    message = refusal(text)

    assert where in message
    assert what in message


def test_deep_nesting_is_refused_without_a_recursion_error() -> None:
    assert "nested deeper than" in refusal('{"a":' * 100_000 + "1" + "}" * 100_000)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ("{}".encode("utf-16"), "UTF-16"),
        ("{}".encode("utf-16-le"), "UTF-16"),
        ("{}".encode("utf-32"), "UTF-16 or UTF-32"),
        (b'{"a":\n "caf\xe9"}', "line 2, column 6: not UTF-8 (byte 0xe9)"),
    ],
)
def test_other_encodings_are_named(data: bytes, what: str) -> None:
    assert what in refusal(data)


def test_a_file_is_named_and_its_size_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        read_json(path)
    path.write_text('{"a": "' + "x" * 100 + '"}')
    assert len(read_json(path)["a"]) == 100
    with pytest.raises(ConfigError, match="109 bytes of JSON, more than the limit of 50"):
        read_json(path, max_bytes=50)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path / "config.json", tmp_path):
        with pytest.raises(ConfigError, match="not a regular file"):
            read_json(path)


def test_the_class_of_the_error_is_the_callers() -> None:
    with pytest.raises(CorruptCheckpointError):
        parse_json(b"{", "index", error=CorruptCheckpointError)
