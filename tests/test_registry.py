"""Names are found by wildcard, and a wrong one is answered with the nearest; plug-ins add theirs."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint

import pytest
from torch import nn

import vlkit
from vlkit import registry
from vlkit.config import Config, Size
from vlkit.errors import ConfigError, UnknownModelError, VlkitError


class ToyConfig(Config):
    dim: Size = 8


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.load_plugins()
    for table in ("_components", "_by_config", "_prefixes", "_models", "_families"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))


def test_wildcards() -> None:
    assert set(vlkit.list_models("kimi-vl-*")) >= {"kimi-vl-a3b", "kimi-vl-a3b-thinking", "kimi-vl-tiny"}
    assert vlkit.list_components("vision", "moon*tiny") == ["moonvit-tiny"]
    assert vlkit.list_models("nothing*") == []


def test_near_misses_are_suggested() -> None:
    with pytest.raises(UnknownModelError, match=r"'kimi-vl-a3'.*kimi-vl-a3b.*register_model"):
        vlkit.create_model("kimi-vl-a3")
    with pytest.raises(UnknownModelError, match="moonvit"):
        vlkit.compose(vision="monvit", llm="qwen3-tiny")
    with pytest.raises(UnknownModelError, match="vision, projector, llm"):
        vlkit.list_components("tower")


def test_a_name_is_given_once() -> None:
    with pytest.raises(VlkitError, match="'moonvit' is registered already"):
        registry.register_component(
            "vision", ToyConfig, nn.Identity, {"moonvit": ToyConfig(), "moonvit-tiny": ToyConfig()}
        )
    with pytest.raises(VlkitError, match="'toy-tiny'"):
        registry.register_component("vision", ToyConfig, nn.Identity, {"toy": ToyConfig()})
    with pytest.raises(VlkitError, match="kind 'tower'"):
        registry.register_component("tower", ToyConfig, nn.Identity, {"toy": ToyConfig(), "toy-tiny": ToyConfig()})


def test_a_prefix_makes_configs_of_names() -> None:
    """For parts with more sizes than can be listed."""
    toys = registry.register_component("vision", ToyConfig, nn.Identity, {"toy": ToyConfig(), "toy-tiny": ToyConfig()})
    registry.register_prefix("vision", "toy", lambda name: ToyConfig(dim=int(name)))
    found = registry.component("vision", "toy:12")
    assert found.configs == {"toy:12": ToyConfig(dim=12)}
    assert (found.name, found.module) == (toys.name, toys.module)
    with pytest.raises(UnknownModelError, match=r"'toi:12'.*toy"):
        registry.component("vision", "toi:12")
    with pytest.raises(VlkitError, match="'toy' is registered already"):
        registry.register_prefix("vision", "toy", lambda name: ToyConfig())
    with pytest.raises(VlkitError, match="kind 'tower'"):
        registry.register_prefix("tower", "toy", lambda name: ToyConfig())


def test_a_plug_in_registers_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    def imported() -> None:
        registry.register_component(
            "vision", ToyConfig, nn.Identity, {"toy": ToyConfig(), "toy-tiny": ToyConfig(dim=2)}
        )

    module = types.ModuleType("toy_plugin")
    module.imported = imported  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_plugin", module)

    class Entry:
        name, value = "toy", "toy_plugin"

        def load(self) -> None:
            imported()

    monkeypatch.setattr(
        registry.importlib.metadata, "entry_points", lambda group: [Entry()] if group == "vlkit.plugins" else []
    )
    registry.load_plugins.cache_clear()
    assert "toy" in vlkit.list_components("vision")
    assert registry.component("vision", "toy-tiny").configs["toy-tiny"] == ToyConfig(dim=2)


def test_a_broken_plug_in_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("broken", "no_such_module_anywhere", "vlkit.plugins")
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [entry])
    registry.load_plugins.cache_clear()
    with pytest.raises(VlkitError, match=r"plug-in 'broken' \(no_such_module_anywhere\)"):
        vlkit.list_models()
    registry.load_plugins.cache_clear()


def test_an_unregistered_config_says_how_to_register() -> None:
    with pytest.raises(UnknownModelError, match="ToyConfig is not registered"):
        vlkit.compose(vision=ToyConfig(), llm="qwen3-tiny")


def test_parts_that_do_not_fit_are_refused_with_both_numbers() -> None:
    projector = registry.component("projector", "pixel-shuffle-tiny").configs["pixel-shuffle-tiny"]
    with pytest.raises(ConfigError, match="takes 77 channels but the tower gives"):
        vlkit.compose(vision="moonvit-tiny", projector=projector.replace(in_dim=77), llm="qwen3-tiny")
    with pytest.raises(ConfigError, match="gives 77 channels but the decoder"):
        vlkit.create_model("kimi-vl-tiny", projector={"out_dim": 77})
