"""What can be named: components by kind, models by name, families by the model_type of a checkpoint.

    register_component("vision", MoonViTConfig, MoonViT, {"moonvit": MoonViTConfig(), "moonvit-tiny": MoonViTConfig(dim=32, ...)})
    component("vision", "moonvit")          -> Component(kind, name, config class, module, named configs)
    component("vision", "timm:test_vit")    -> likewise; what stands behind a registered prefix is made into a config
    component_of(MoonViTConfig())           -> the same
    list_components("vision", "*tiny*")     -> ["moonvit-tiny"]

A package adds its own by an entry point of the group "vlkit.plugins" that names a module; importing that module registers.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from vlkit.config import Config
from vlkit.errors import UnknownModelError, VlkitError

if TYPE_CHECKING:
    from torch import nn

KINDS = ("vision", "projector", "llm")
PLUGIN_GROUP = "vlkit.plugins"
BUILT_IN = ("vlkit.vision", "vlkit.projectors", "vlkit.llm", "vlkit.models")  # imported at first look-up, like plug-ins


@dataclass(frozen=True)
class Component:
    """One part that can be named.

    Attributes:
        kind: "vision", "projector" or "llm".
        name: What its configs are tagged with in JSON; also the first of the named configs.
        config: Its config class.
        module: Makes the nn.Module from one config.
        configs: Named sizes. One of them is `<name>-tiny` and runs in milliseconds.
    """

    kind: str
    name: str
    config: type[Config]
    module: Callable[[Any], nn.Module]
    configs: Mapping[str, Config]


_components: dict[tuple[str, str], Component] = {}
_by_config: dict[type[Config], Component] = {}
_prefixes: dict[tuple[str, str], Callable[[str], Config]] = {}
_models: dict[str, Callable[[], Any]] = {}
_families: dict[str, Any] = {}


def register_component(
    kind: str, config: type[Config], module: Callable[[Any], nn.Module], configs: Mapping[str, Config]
) -> Component:
    """Make a part known under the names of its configs.

    Args:
        kind: "vision", "projector" or "llm".
        config: The config class; it identifies the part.
        module: Makes the nn.Module from one config.
        configs: Named configs. The first name is the part's own; one must be `<name>-tiny`.

    Raises:
        VlkitError: An unknown kind, a name or config class that is taken, or no tiny config.
    """
    if kind not in KINDS:
        raise VlkitError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if not configs or not all(isinstance(each, config) for each in configs.values()):
        raise VlkitError(f"{kind}: expected named configs of class {config.__name__}, found {dict(configs)!r}")
    name = next(iter(configs))
    if f"{name}-tiny" not in configs:
        raise VlkitError(
            f"{kind} {name!r} needs a config named {name + '-tiny'!r} that runs in milliseconds, for the contract tests"
        )
    for taken in configs:
        if (kind, taken) in _components:
            raise VlkitError(f"{kind} {taken!r} is registered already")
    if config in _by_config:
        raise VlkitError(f"{config.__name__} is registered already, as {_by_config[config].name!r}")
    made = Component(kind, name, config, module, dict(configs))
    _components.update({(kind, each): made for each in configs})
    _by_config[config] = made
    return made


def register_prefix(kind: str, prefix: str, make_config: Callable[[str], Config]) -> None:
    """Make `prefix:anything` a name of a part, for parts that have more named sizes than can be listed.

    Args:
        kind: "vision", "projector" or "llm".
        prefix: What stands before the colon.
        make_config: From what stands behind it to a config of a registered class; raises UnknownModelError with the nearest
            names.

    Raises:
        VlkitError: An unknown kind, or a prefix that is taken.
    """
    if kind not in KINDS:
        raise VlkitError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if (kind, prefix) in _prefixes:
        raise VlkitError(f"{kind} prefix {prefix!r} is registered already")
    _prefixes[kind, prefix] = make_config


def register_model(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Decorate a function that returns the ModelSpec called `name`; it runs when the model is asked for."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        if name in _models:
            raise VlkitError(f"model {name!r} is registered already")
        _models[name] = make
        return make

    return register


def register_family(name: str, family: Any) -> None:
    """Make a family's Hub layout known under its name."""
    if name in _families:
        raise VlkitError(f"family {name!r} is registered already")
    _families[name] = family


@cache
def load_plugins() -> None:
    """Import the built-in parts and every installed plug-in, once."""
    for module in BUILT_IN:
        importlib.import_module(module)
    for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP):
        try:
            entry.load()
        except Exception as error:
            raise VlkitError(f"plug-in {entry.name!r} ({entry.value}) failed to import: {error}") from error


def component(kind: str, name: str) -> Component:
    """The part of a kind that has a config of this name: one that is registered, or `prefix:name` of a registered prefix.

    Raises:
        UnknownModelError: With the nearest names.
    """
    load_plugins()
    if kind not in KINDS:
        raise UnknownModelError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    prefix, colon, rest = str(name).partition(":")
    if colon and (kind, prefix) in _prefixes:
        config = _prefixes[kind, prefix](rest)
        return replace(component_of(config), configs={name: config})
    if (kind, name) not in _components:
        raise unknown_name(
            f"{kind} component", name, [n for k, n in _components if k == kind], "vlkit.registry.register_component"
        )
    return _components[kind, name]


def component_of(config: Config) -> Component:
    """The part that a config belongs to.

    Raises:
        UnknownModelError: The class of the config is not registered.
    """
    load_plugins()
    if type(config) not in _by_config:
        raise UnknownModelError(
            f"{type(config).__name__} is not registered; call vlkit.registry.register_component with it, or use one of "
            + ", ".join(sorted(c.__name__ for c in _by_config))
        )
    return _by_config[type(config)]


def model_spec(name: str) -> Any:
    """The ModelSpec of a registered model.

    Raises:
        UnknownModelError: With the nearest names.
    """
    load_plugins()
    if name not in _models:
        raise unknown_name("model", name, _models, "vlkit.registry.register_model")
    return _models[name]()


def families() -> dict[str, Any]:
    """All registered families by name."""
    load_plugins()
    return dict(_families)


def list_models(pattern: str = "*") -> list[str]:
    """Sorted names of whole models that match a wildcard pattern such as "*kimi*"."""
    load_plugins()
    return sorted(fnmatch.filter(_models, pattern))


def list_components(kind: str, pattern: str = "*") -> list[str]:
    """Sorted names of the configs of one kind ("vision", "projector", "llm") that match a wildcard pattern."""
    load_plugins()
    if kind not in KINDS:
        raise UnknownModelError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    return sorted(fnmatch.filter([n for k, n in _components if k == kind], pattern))


def unknown_name(what: str, name: str, known: Iterable[str], register: str) -> UnknownModelError:
    """The error for a name that nothing has: with the three nearest, and how to add one."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.3) or known[:3]
    return UnknownModelError(
        f"no {what} is called {name!r}; the nearest are {', '.join(near)}. A new one is added with {register}"
    )
