"""Strict reading of JSON objects: what json.loads would accept in silence is an error with a line and a column.

Refused: another encoding than UTF-8, a byte order mark, duplicate keys, NaN and Infinity, numbers beyond 64 bits,
nesting without end, and anything that is not an object.
"""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from vlkit.errors import ConfigError, VlkitError
from vlkit.hub.strangers import stranger

MAX_JSON_BYTES = 64 * 2**20
MAX_DEPTH = 64
_MAX_INT_DIGITS = 20

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)

_COLON = re.compile(r"\s*:")


class _RefusedError(Exception):
    """The parser met something that is refused; `_locate` finds out where."""


def read_json(path: Path, *, error: type[VlkitError] = ConfigError, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        error: Class of the errors.
        max_bytes: Size beyond which the file is not read.

    Raises:
        error: The file cannot be read, is too large, or is refused; with line and column where there is one.
    """
    try:
        found = path.stat()
        size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path}: not a regular file")
        if size > max_bytes:
            raise error(f"{path}: {size} bytes of JSON, more than the limit of {max_bytes}")
        data = path.read_bytes()
    except FileNotFoundError as missing:
        raise error(f"{path}: no such file") from missing
    except OSError as failure:
        raise error(f"{path}: cannot be read: {failure.strerror}") from failure
    return parse_json(data, str(path), error=error)


def parse_json(data: bytes, where: str, *, error: type[VlkitError] = ConfigError) -> dict[str, Any]:
    """The object in some bytes of JSON.

    Args:
        data: The text, as UTF-8.
        where: How messages call it.
        error: Class of the errors.

    Raises:
        error: See the top of this file.
    """
    text = _decode(data, where, error)
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_bounded_int, parse_float=_finite_float
        )
    except json.JSONDecodeError as bad:
        found = stranger(data)
        hint = f" (this is {found})" if found else ""
        raise error(f"{where}: line {bad.lineno}, column {bad.colno}: not JSON: {bad.msg}{hint}") from None
    except (_RefusedError, RecursionError):
        reason, offset = _locate(text)
        raise error(f"{where}: {_position(text, offset)}: {reason}") from None
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        raise error(f"{where}: line 1, column 1: expected a JSON object, found {kind}")
    return value


def _decode(data: bytes, where: str, error: type[VlkitError]) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise error(f"{where}: line 1, column 1: the text is UTF-16 or UTF-32 or binary; JSON is UTF-8")
    if data.startswith(b"\xef\xbb\xbf"):
        raise error(f"{where}: line 1, column 1: the text begins with a byte order mark; save it as UTF-8 without one")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as bad:
        before = data[: bad.start].decode("utf-8")
        raise error(f"{where}: {_position(before, len(before))}: not UTF-8 (byte 0x{data[bad.start]:02x})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise _RefusedError
    return out


def _refuse(_: str) -> NoReturn:
    raise _RefusedError


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_INT_DIGITS:
        raise _RefusedError
    return int(digits)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _RefusedError
    return value


def _position(text: str, offset: int) -> str:
    line = text.count("\n", 0, offset) + 1
    return f"line {line}, column {offset - text.rfind(chr(10), 0, offset)}"


def _locate(text: str) -> tuple[str, int]:
    """Reason and offset of the first thing in well-formed JSON that is refused. Only runs when there is one."""
    open_brackets: list[set[str] | None] = []
    for token in _TOKEN.finditer(text):
        word = token[0]
        if word in "{[":
            open_brackets.append(set() if word == "{" else None)
            if len(open_brackets) > MAX_DEPTH:
                return f"nested deeper than {MAX_DEPTH} levels", token.start()
        elif word in "}]":
            open_brackets.pop()
        elif word.startswith('"'):
            keys = open_brackets[-1] if open_brackets else None
            if keys is None or not _COLON.match(text, token.end()):
                continue  # a value
            key = json.loads(word)
            if key in keys:
                return f"key {key!r} appears twice in one object", token.start()
            keys.add(key)
        elif word in ("NaN", "Infinity", "-Infinity"):
            return f"{word} is not a JSON number", token.start()
        elif word[0] in "-0123456789":
            whole = word.lstrip("-").isdigit()
            if whole and len(word) > _MAX_INT_DIGITS:
                return f"a whole number of {len(word)} digits; at most {_MAX_INT_DIGITS} are read", token.start()
            if not whole and not math.isfinite(float(word)):
                return f"{word} is beyond the range of a float", token.start()
    return "nested too deeply", 0
