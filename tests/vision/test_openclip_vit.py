"""Qwen-VL's OpenCLIP tower by itself: published sizes and names, packing at any grid, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from vlkit.errors import ConfigError, KeyMismatchError, LayoutError
from vlkit.packing import Layout, Packed
from vlkit.testing.batches import random_patches
from vlkit.vision.openclip_vit import OpenCLIPViT, OpenCLIPViTConfig, keys

GRIDS = [(3, 5), (1, 1), (4, 4), (9, 2)]


def tiny(**changes: object) -> OpenCLIPViT:
    config = OpenCLIPViTConfig(dim=30, num_layers=2, num_heads=5, mlp_dim=44, patch_size=3, position_grid=(4, 4))
    return OpenCLIPViT(config.replace(**changes))


def test_published_sizes() -> None:
    with torch.device("meta"):
        tower = OpenCLIPViT(OpenCLIPViTConfig())
    assert sum(p.numel() for p in tower.parameters()) == 1_842_770_688
    assert {m.eps for m in tower.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    published = {name: tuple(t.shape) for name, t in keys(tower.config).to_theirs(tower.state_dict()).items()}
    assert len(published) == 4 + 48 * 12
    assert published["conv1.weight"] == (1664, 3, 14, 14)
    assert published["positional_embedding"] == (256, 1664)
    assert published["transformer.resblocks.47.attn.in_proj.weight"] == (4992, 1664)
    assert published["transformer.resblocks.0.mlp.c_proj.weight"] == (1664, 8192)
    assert not [name for name in published if "class" in name or "ln_post" in name or "conv1.bias" in name]


def test_in_proj_repeats_q_k_and_v_for_every_head() -> None:
    """Row by row: head h, then q, k or v, then the channel."""
    tower = tiny()
    state = tower.state_dict()
    rows = keys(tower.config).to_theirs(state)["transformer.resblocks.1.attn.in_proj.bias"]
    parts = [state[f"blocks.1.attn.{part}.bias"] for part in "qkv"]
    for row, value in enumerate(rows):
        head, part, channel = row // 18, row % 18 // 6, row % 6
        assert value == parts[part][head * 6 + channel]


def test_names_survive_the_round_trip() -> None:
    tower = tiny()
    state = tower.state_dict()
    again = keys(tower.config).to_ours(keys(tower.config).to_theirs(state))
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)
    published = keys(tower.config).to_theirs(state)
    published["positional_embedding"] = torch.zeros(15, 30)
    with pytest.raises(KeyMismatchError, match=r"\[15, 30\]"):
        keys(tower.config).plan_load(
            {name: tensor.shape for name, tensor in published.items()}, {n: t.shape for n, t in state.items()}
        )


def test_packed_equals_alone_at_any_grid() -> None:
    tower = tiny().double()
    packed = random_patches(GRIDS, tower.config.patch_dim, dtype=torch.float64)
    together = tower(packed)
    assert together.layout == packed.layout
    for part, grid, ours in zip(packed.unpack(), GRIDS, together.unpack(), strict=True):
        assert (tower(Packed(part, Layout.from_grids([grid]))).tokens - ours).abs().max() < 1e-13


def test_the_time_steps_of_a_clip_are_images() -> None:
    tower = tiny()
    patches = torch.randn(12, tower.config.patch_dim)
    clip = tower(Packed(patches, Layout.from_grids([(2, 2, 3)])))
    frames = tower(Packed(patches, Layout.from_grids([(2, 3), (2, 3)])))
    assert clip.layout.grids == ((2, 2, 3),)
    assert torch.equal(clip.tokens, frames.tokens)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="dim=30 is not a multiple of num_heads=4"):
        tiny(num_heads=4)
    with pytest.raises(LayoutError, match="from_grids"):
        tiny()(Packed(torch.zeros(4, 27), Layout((4,))))
    with pytest.raises(LayoutError, match=r"\(4, 26\); expected 27 values"):
        tiny()(Packed(torch.zeros(4, 26), Layout.from_grids([(2, 2)])))
