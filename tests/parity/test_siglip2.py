"""SigLIP2 without rotary embedding against transformers' siglip, which resamples its table by the same rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.vision.tower_cases import difference, randomized
from vlkit.hub.keymap import KeyMap
from vlkit.layers.patch import patchify
from vlkit.packing import Layout, Packed
from vlkit.vision import SigLIP2, SigLIP2Config, load_starting_point, siglip2

transformers = pytest.importorskip("transformers")

GRIDS = [(3, 5), (1, 1), (4, 4), (1, 7), (9, 2)]  # rows and columns; one equals the table
CONFIG = SigLIP2Config(
    dim=48, num_layers=3, num_heads=4, mlp_dim=56, patch_size=6, position_grid=(4, 4), use_rope=False, norm_eps=1e-5
)
KEYS: KeyMap = siglip2.keys("patch_embedding", "position_embedding", convolution=True)


def reference() -> nn.Module:
    theirs = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, patch_size=6, image_size=24,
            layer_norm_eps=1e-5, vision_use_head=False, attn_implementation="eager",
        )
    )  # fmt: skip
    return randomized(theirs)


def test_features_and_gradients_of_odd_sizes(tmp_path: Path) -> None:
    """fp32; largest seen 1e-6 of the features, 2e-6 of the gradients."""
    theirs, ours = reference(), SigLIP2(CONFIG)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    load_starting_point(ours, tmp_path)
    images = [torch.randn(3, 6 * rows, 6 * columns) for rows, columns in GRIDS]
    packed = Packed(torch.cat([patchify(image, 6) for image in images]), Layout.from_grids(GRIDS))

    features = ours(packed).tokens
    want = torch.cat([theirs(image[None], interpolate_pos_encoding=True).last_hidden_state[0] for image in images])
    assert difference(features, want) < 1e-5

    seed = torch.randn(features.shape)
    (features * seed).sum().backward()
    (want * seed).sum().backward()
    gradients = KEYS.to_ours({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        # The softmax does not see what keys share, so the gradient of their bias is rounding alone.
        if not name.endswith("attn.k.bias"):
            assert difference(parameter.grad, gradients[name]) < 2e-5, name
