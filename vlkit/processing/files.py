"""Reading small files that others wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlkit.errors import ConfigError


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ConfigError: It cannot be read, is not UTF-8 or not JSON, holds NaN, or names a key twice.
    """
    try:
        return json.loads(path.read_bytes().decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return values
