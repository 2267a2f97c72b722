"""Whole models with towers of timm: by name, as JSON, and saved."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

import vlkit
from vlkit.registry import component, component_of
from vlkit.testing.batches import random_patches
from vlkit.vision.timm_vit import TimmViTConfig

pytest.importorskip("timm")

SMALL = (("img_size", 32), ("patch_size", 4), ("embed_dim", 48), ("depth", 2), ("num_heads", 4))


def test_models_are_made_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, and without memory."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked for a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = vlkit.compose(vision="timm:vit_small_patch14_dinov2.lvd142m", llm="qwen3-tiny", device="meta")
    assert model.config.vision.out_dim == model.config.projector.in_dim == 384
    assert model.config.vision.patch_dim == 3 * 14 * 14
    assert sum(p.numel() for p in model.vision.parameters()) == 22_056_192
    text = json.dumps(model.config.to_dict())
    assert type(model.config).from_dict(json.loads(text)) == model.config
    assert json.loads(text)["vision"]["type"] == "timm"
    found = component("vision", "timm:test_vit")
    assert found.configs["timm:test_vit"] == TimmViTConfig(name="test_vit")
    assert component_of(TimmViTConfig()) is component("vision", "timm-tiny")
    smaller = vlkit.create_model(model.config, vision={"num_layers": 3}, device="meta")
    assert len(smaller.vision.trunk.blocks) == 3


@pytest.mark.parametrize(
    "name", ["eva02_base_patch14_224", "vit_small_patch16_dinov3", "deit_tiny_distilled_patch16_224"]
)
def test_every_weight_is_drawn_and_saved(name: str, tmp_path: Path) -> None:
    """Built on meta as every model is; rotary angles are in no file."""
    config = TimmViTConfig(name=name, arguments=SMALL)
    model = vlkit.compose(vision=config, projector="mlp-tiny", llm="qwen3-tiny").eval()
    model.save_pretrained(tmp_path / "saved")
    again = vlkit.from_pretrained(tmp_path / "saved")
    patches = random_patches([(2, 3)], config.patch_dim)
    with torch.no_grad():
        assert torch.equal(again.vision(patches).tokens, model.vision(patches).tokens)
