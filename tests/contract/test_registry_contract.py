"""What always holds, for every registered model and every registered part. Registering something puts it through this."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import vlkit
from vlkit.models import VisionLanguageModel, VLMConfig
from vlkit.models.factory import build
from vlkit.registry import KINDS, component, model_spec
from vlkit.testing import contract

DEFAULTS = {"vision": "moonvit-tiny", "projector": "pixel-shuffle-tiny", "llm": "qwen3-tiny"}


def compositions() -> dict[str, VLMConfig]:
    """Every tiny model, and every tiny part in a composition with the default others."""
    found = {name: model_spec(name).config for name in vlkit.list_models("*-tiny")}
    for kind in KINDS:
        for name in vlkit.list_components(kind, "*-tiny"):
            parts = {**DEFAULTS, kind: name}
            config = vlkit.compose(**parts, device="meta").config
            if config not in found.values():
                found[f"{kind}={name}"] = config
    return found


SUBJECTS = compositions()


@cache
def model_of(name: str, dtype: torch.dtype) -> VisionLanguageModel:
    torch.manual_seed(0)
    return build(SUBJECTS[name], dtype=dtype)


@pytest.fixture(params=SUBJECTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_packed_equals_alone(name: str, dtype: torch.dtype) -> None:
    contract.packed_equals_alone(model_of(name, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_items_are_isolated(name: str, dtype: torch.dtype) -> None:
    contract.items_are_isolated(model_of(name, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cache_equals_full(name: str, dtype: torch.dtype) -> None:
    contract.cache_equals_full(model_of(name, dtype))


def test_batch_equals_single(name: str) -> None:
    contract.batch_equals_single(model_of(name, torch.float64))


def test_checkpointing_changes_no_bit(name: str) -> None:
    contract.checkpointing_changes_no_bit(model_of(name, torch.float32))


def test_same_seed_same_bits(name: str) -> None:
    contract.same_seed_same_bits(SUBJECTS[name])


def test_gradients_reach_everything(name: str) -> None:
    contract.gradients_reach_everything(model_of(name, torch.float32))


COMPILED_ALWAYS = ("moonvit-tiny", "moonlight-tiny", "qwen3-tiny")  # the others in the slow run


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        pytest.param(kind, name, marks=[] if name in COMPILED_ALWAYS else pytest.mark.slow)
        for kind in ("vision", "llm")
        for name in vlkit.list_components(kind, "*-tiny")
    ],
)
def test_blocks_compile(kind: str, part: str) -> None:
    torch.manual_seed(0)
    model = vlkit.compose(**{**DEFAULTS, kind: part}, dtype=torch.float32)
    contract.blocks_compile(model, [kind])


def test_config_round_trips(name: str) -> None:
    contract.config_round_trips(SUBJECTS[name])


def test_saves_and_loads_the_same_bits(name: str, tmp_path) -> None:
    contract.saves_and_loads_the_same_bits(model_of(name, torch.bfloat16), tmp_path)


def test_key_map_is_total_and_injective(name: str) -> None:
    contract.key_map_is_total_and_injective(model_of(name, torch.float32))


def test_bad_input_is_named(name: str) -> None:
    contract.bad_input_is_named(model_of(name, torch.float32))


@pytest.mark.parametrize("model", vlkit.list_models())
def test_placeholders_equal_image_tokens(model: str) -> None:
    contract.placeholders_equal_image_tokens(model_spec(model))


@pytest.mark.parametrize("model", vlkit.list_models())
def test_parameter_counts(model: str) -> None:
    """Built on meta, total and active parameters are what the registry says."""
    spec = model_spec(model)
    built = vlkit.create_model(model, device="meta")
    assert (built.num_parameters(), built.num_parameters(active=True)) == (
        spec.num_parameters,
        spec.num_active_parameters,
    )


@pytest.mark.parametrize("model", vlkit.list_models())
def test_every_config_round_trips(model: str) -> None:
    contract.config_round_trips(model_spec(model).config)


@pytest.mark.parametrize(("kind", "part"), [(k, n) for k in KINDS for n in vlkit.list_components(k)])
def test_every_part_builds_on_meta(kind: str, part: str) -> None:
    """No part computes values while it is built, at any size; its config survives JSON."""
    made = component(kind, part)
    config = made.configs[part]
    assert made.config.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        module = made.module(config)
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
