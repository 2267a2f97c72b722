"""Config: the frozen, checked, JSON-able description of a part or a model.

class MoonViTConfig(Config):          # becomes a frozen, keyword-only dataclass by itself
    dim: Size = 1152

MoonViTConfig(dim=0)                  # ConfigError: MoonViTConfig.dim: 0 is below 1
MoonViTConfig.from_dict({"dmi": 1})   # ConfigError: MoonViTConfig has no field 'dmi'; did you mean 'dim'?
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Self, dataclass_transform

from vlkit.errors import ConfigError


@dataclass(frozen=True)
class AtLeast:
    """Lower bound of a number in a config."""

    bound: float


@dataclass(frozen=True)
class AtMost:
    """Upper bound of a number in a config."""

    bound: float


_HUGE = 2**40  # beyond any width, count or id of a model: a config that asks for more is broken or hostile
Size = Annotated[int, AtLeast(1), AtMost(_HUGE)]
"""A whole number of at least one."""
Depth = Annotated[int, AtLeast(1), AtMost(4096)]
"""Layers, or pixels along a patch: a number that a model has thousands of at most."""
Count = Annotated[int, AtLeast(0), AtMost(_HUGE)]
"""A whole number of at least zero."""
Positive = Annotated[float, AtLeast(math.ulp(0.0))]
"""A real number above zero."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Config:
    """Base of all configs: subclasses are frozen keyword-only dataclasses whose fields are checked where they are made.

    Types and bounds are checked from the annotations. What relates several fields is checked in the subclass's `check`.
    Derived numbers are properties, so that they never go stale.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            value = _checked(getattr(self, name), hint, f"{type(self).__name__}.{name}")
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raise ConfigError where fields contradict each other."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed.

        Raises:
            ConfigError: An unknown field or a bad value.
        """
        _refuse_unknown(type(self), changes)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. Nested configs become dictionaries."""
        return {name: _plain(getattr(self, name)) for name in _hints(type(self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: Not a mapping, an unknown field, a missing one, or a bad value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__}: expected a JSON object, found {type(values).__name__}")
        _refuse_unknown(cls, values)
        missing = [
            f.name
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{cls.__name__}: missing {', '.join(missing)}")
        return cls(**values)


def _read_hints(cls: type[Config]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


_hints: Callable[[type[Config]], dict[str, Any]] = cache(_read_hints)  # type: ignore[assignment]


def _refuse_unknown(cls: type[Config], values: Mapping[str, Any]) -> None:
    known = list(_hints(cls))
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise ConfigError(f"{cls.__name__} has no field {name!r}{hint}")


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _checked(value: Any, hint: Any, where: str) -> Any:
    """The value as its annotation wants it (int to float, list to tuple, dict to Config), or ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _checked(value, args[0], where)
        for bound in args[1:]:
            if isinstance(bound, AtLeast) and value < bound.bound:
                raise ConfigError(
                    f"{where}: {value} is below {'or equal to 0' if 0 < bound.bound < 1 else bound.bound}"
                )
            if isinstance(bound, AtMost) and value > bound.bound:
                raise ConfigError(f"{where}: {value} is above {bound.bound}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        errors = []
        for choice in args:
            if choice is type(None):
                continue
            try:
                return _checked(value, choice, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is typing.Literal:
        if value not in args or type(value) not in {type(a) for a in args}:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_checked(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"{where}: expected {len(args)} values, found {len(value)}")
        return tuple(_checked(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    if isinstance(hint, type) and issubclass(hint, Config):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return hint.from_dict(value)
        raise ConfigError(f"{where}: expected a {hint.__name__}, found {type(value).__name__}")
    if hint is float and type(value) is int:
        value = float(value)
    if hint in (int, float, str, bool):
        if type(value) is not hint:
            raise ConfigError(f"{where}: expected {hint.__name__}, found {value!r} ({type(value).__name__})")
        if hint is float and not math.isfinite(value):
            raise ConfigError(f"{where}: {value} is not a finite number")
    return value
