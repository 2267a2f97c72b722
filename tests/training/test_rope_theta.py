"""Another base for the rotary wavelengths of a decoder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import vlkit
from vlkit.errors import ConfigError
from vlkit.layers.rope import rotary_frequencies
from vlkit.testing import random_batch
from vlkit.training.rope_theta import set_rope_theta

KIMI_VL = (50_000.0, 800_000.0)


@pytest.mark.parametrize("name", ["kimi-vl-tiny", "qwen2-vl-tiny", "qwen-vl-tiny"])
def test_the_decoder_turns_by_the_new_base_and_the_tower_as_before(name: str) -> None:
    model = vlkit.create_model(name).eval()
    batch = random_batch(model, seed=1)
    assert batch.patches is not None
    with torch.no_grad():
        for weight in model.llm.blocks.parameters():
            weight.mul_(1 if weight.ndim == 1 else 8)  # fresh weights give scores so small that attention is a mean
        images, before = model.encode_images(batch.patches).tokens, model(batch).logits.tokens
    first, vision = model.llm.config, model.config.vision

    set_rope_theta(model, 16 * first.theta)

    with torch.no_grad():
        assert torch.equal(model.encode_images(batch.patches).tokens, images)
        after = model(batch).logits.tokens
        assert (after - before).abs().max() > 1e-4  # short texts feel it too
        built = vlkit.create_model(model.config).eval()  # a model that was built with it
        built.load_state_dict(model.state_dict())
        assert torch.equal(built(batch).logits.tokens, after)
        assert model.config.vision is vision
        set_rope_theta(model, first.theta)
        assert torch.equal(model(batch).logits.tokens, before)  # nothing else has changed
    assert model.config.llm == model.llm.config == first


@pytest.mark.parametrize("name", ["kimi-vl-tiny", "qwen2-vl-tiny"])
def test_saving_in_the_layout_of_the_hub_keeps_it(name: str, tmp_path: Path) -> None:
    model = vlkit.create_model(name).eval()
    set_rope_theta(model, 800_000, max_positions=131_072)
    model.save_pretrained(tmp_path / "long")
    found = vlkit.from_pretrained(tmp_path / "long").eval()
    assert found.config == model.config
    assert (found.config.llm.theta, found.config.llm.max_positions) == (800_000.0, 131_072)  # type: ignore[attr-defined]
    batch = random_batch(model)
    with torch.no_grad():
        assert torch.equal(found(batch).logits.tokens, model(batch).logits.tokens)


def test_wavelengths_of_kimi_vl() -> None:
    """Its 64 rotated channels: the longest wavelength, and how many pairs are longer than the longest sequence."""
    longest, beyond = [], []
    for theta in KIMI_VL:
        wavelengths = 2 * math.pi / rotary_frequencies(64, theta, dtype=torch.float64)
        assert wavelengths[0] == pytest.approx(2 * math.pi)
        longest.append(float(wavelengths[-1]))
        beyond.append(int((wavelengths > 131_072).sum()))
    assert longest == pytest.approx([2.24e5, 3.29e6], rel=2e-3)
    assert beyond == [2, 8]


def test_latent_attention_is_turned_in_its_rotary_part() -> None:
    model = vlkit.create_model("kimi-vl-tiny")
    set_rope_theta(model, KIMI_VL[1])
    assert model.llm.rope.dim == model.config.llm.rope_dim  # type: ignore[attr-defined]
    assert model.llm.rope.theta == KIMI_VL[1]


@pytest.mark.parametrize("theta", [0.0, 1, -5e4, math.inf, math.nan, "800000", True])
def test_a_base_that_is_none_is_refused_and_changes_nothing(theta: Any) -> None:
    model = vlkit.create_model("kimi-vl-tiny", device="meta")
    before = model.config
    with pytest.raises(ConfigError, match="is not a number above 1"):
        set_rope_theta(model, theta)
    with pytest.raises(ConfigError, match="max_positions"):
        set_rope_theta(model, 8e5, max_positions=0)
    assert model.config is before
    assert model.llm.rope.theta == before.llm.theta  # type: ignore[attr-defined]


def test_a_model_without_such_a_base_is_refused() -> None:
    model = vlkit.create_model("kimi-vl-tiny", device="meta")
    with pytest.raises(ConfigError, match="expected a VisionLanguageModel, found Decoder"):
        set_rope_theta(model.llm, 8e5)
    model.llm.rope = None
    with pytest.raises(ConfigError, match="MoonlightConfig describes a decoder without"):
        set_rope_theta(model, 8e5)
