"""Models from names and parts: what may be changed, and what is said when it does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import vlkit
from vlkit.errors import ConfigError, UnknownModelError
from vlkit.models import pretrained
from vlkit.registry import component


def test_parts_are_given_by_name_config_or_changed_fields() -> None:
    tower = component("vision", "moonvit-tiny").configs["moonvit-tiny"].replace(dim=48)
    model = vlkit.compose(vision=tower, llm="qwen3-moe-tiny")
    assert model.config.projector.in_dim == 48
    deeper = vlkit.create_model("kimi-vl-tiny", llm={"num_layers": 3}, vision={"dim": 64}, device="meta")
    assert (len(deeper.llm.blocks), deeper.config.projector.in_dim, deeper.config.family) == (3, 64, "kimi-vl")


def test_projector_widths_follow_a_swapped_decoder() -> None:
    model = vlkit.create_model(
        "kimi-vl-a3b", llm="qwen3-0.6b", image_token_id=151655, stop_ids=(151645,), device="meta"
    )
    assert model.config.projector.out_dim == 1024
    assert model.config.family is None


def test_dtype_and_device() -> None:
    model = vlkit.create_model("kimi-vl-tiny", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.llm.blocks[1].mlp.router.bias.dtype == torch.float32
    assert all(p.is_meta for p in vlkit.create_model("kimi-vl-tiny", device="meta").parameters())


def test_initial_weights_are_drawn_and_scaled() -> None:
    """No parameter is left as it was allocated: all finite, none constant but norms, biases and scales."""
    torch.manual_seed(0)
    for name in vlkit.list_models("*-tiny"):
        for key, parameter in vlkit.create_model(name).requires_grad_(False).named_parameters():
            assert bool(parameter.isfinite().all()), key
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            assert spread > 0 or "norm" in key or key.endswith("bias"), f"{key} is constant"
            assert spread < 2, f"{key} has spread {spread}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"llm": {"num_layer": 3}}, "no field 'num_layer'; did you mean 'num_layers'"),
        ({"image_token": 3}, "no field 'image_token'; did you mean 'image_token_id'"),
        ({"image_token_id": 999}, "999 lies outside the vocabulary of 320"),
        ({"vision": 3}, "expected a registered name or a config"),
        ({"llm": {"vocab_size": 100}}, "lies outside the vocabulary of 100"),
    ],
)
def test_bad_overrides_are_named(overrides: dict, words: str) -> None:
    with pytest.raises((ConfigError, TypeError), match=words):
        vlkit.create_model("kimi-vl-tiny", **overrides)


def test_pretrained_needs_published_weights() -> None:
    with pytest.raises(ConfigError, match="no published weights are known"):
        vlkit.create_model("kimi-vl-tiny", pretrained=True)
    with pytest.raises(ConfigError, match="changed models have no published weights"):
        vlkit.create_model("kimi-vl-a3b", pretrained=True, llm={"num_layers": 2})


@pytest.mark.parametrize("options", [{}, {"allow_pickle": True}])
def test_pickled_weights_of_a_registered_model_are_read_when_asked_for(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repositories of AndesVL hold no others."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(pretrained, "from_pretrained", lambda name, **found: asked.update(found, name=name))
    vlkit.create_model("andesvl-1b", pretrained=True, **options)
    assert asked["name"] == "OPPOer/AndesVL-1B-Instruct"
    assert asked["allow_pickle"] is bool(options)


def test_processor_of_a_composition_and_of_a_published_model() -> None:
    model = vlkit.compose(vision="moonvit-tiny", llm="qwen3-tiny")
    processor = vlkit.create_processor(model)
    assert processor.config.image.patch_size == model.config.vision.patch_size
    with pytest.raises(ConfigError, match="from_pretrained"):
        vlkit.create_processor("kimi-vl-a3b")
    with pytest.raises(UnknownModelError):
        vlkit.create_processor("kimi-vl-b3a")
    foreign = vlkit.compose(vision="moonvit-tiny", llm="qwen3-tiny", image_token_id=7)
    with pytest.raises(ConfigError, match="image_token_id is 7"):
        vlkit.create_processor(foreign)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("qwen3-vl-tiny", {"stop_ids": [5]}),
        ("qwen2-vl-tiny", {"projector": "mlp"}),
        ("andesvl-tiny", {"vision": "moonvit-tiny"}),
        ("qwen-vl-tiny", {"llm": "llama-tiny"}),
    ],
)
def test_a_changed_model_keeps_the_format_of_its_chats(name: str, overrides: dict[str, Any]) -> None:
    """Placeholders and marks are those of the registered model; images are sized for the parts that are there."""
    model = vlkit.create_model(name, **overrides)
    processor = vlkit.create_processor(model)
    assert processor.config.chat == vlkit.create_processor(name).config.chat
    image = Image.new("RGB", (57, 31))
    batch = processor([{"role": "user", "content": [{"type": "image", "image": image}]}])
    assert model(batch).logits.tokens.isfinite().all()


@pytest.mark.parametrize(
    ("tower", "mean"),
    [
        ("aimv2-tiny", 0.48145466),
        ("moonvit-tiny", 0.5),
        ("timm:vit_tiny_patch16_224.augreg_in21k", 0.5),
        ("timm:vit_small_patch14_dinov2.lvd142m", 0.485),
    ],
)
def test_pixels_are_normalised_as_the_tower_was_trained(tower: str, mean: float) -> None:
    model = vlkit.compose(vision=tower, llm="qwen3-tiny", device="meta")
    assert vlkit.create_processor(model).config.image.mean[0] == mean
