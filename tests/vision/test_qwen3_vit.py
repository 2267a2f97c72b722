"""Levels and positions of the Qwen3-VL tower."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.vision.tower_cases import difference, patches_of, tiny
from vlkit.packing import Layout
from vlkit.vision.qwen3_vit import Qwen3ViTConfig


@torch.no_grad()
def test_levels_are_the_features_of_towers_cut_off_after_the_tap() -> None:
    """The last block comes first, then the taps in order."""
    tower = tiny("qwen3-vit", num_layers=4, taps=(0, 2))
    packed = patches_of(tower, [(3, 5), (2, 2, 4)])
    levels = tower(packed).tokens.split(tower.config.dim, dim=1)
    assert len(levels) == tower.config.num_levels == 3
    for level, num_layers in zip(levels, (4, 1, 3), strict=True):
        cut = tiny("qwen3-vit", num_layers=num_layers, taps=())
        state = {name: tensor for name, tensor in tower.state_dict().items() if name in cut.state_dict()}
        cut.load_state_dict(state)
        assert torch.equal(level, cut(packed).tokens)


@torch.no_grad()
def test_the_table_is_sampled_with_aligned_corners() -> None:
    """By the formula: place r of h reads row r * (side - 1) / (h - 1), or 0 where h is 1; the same in every frame."""
    tower = tiny("qwen3-vit", position_grid=(5, 5), taps=())
    table = tower.positions.table
    layout = Layout.from_grids([(1, 7), (2, 3, 4), (9, 1), (5, 5)])
    want = []
    for time, rows, columns in layout.grids or ():
        frame = [
            sum(max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j)) * table[i, j] for i in range(5) for j in range(5))
            for y in (row * 4 / max(rows - 1, 1) for row in range(rows))
            for x in (column * 4 / max(columns - 1, 1) for column in range(columns))
        ]
        want.append(torch.stack(frame).repeat(time, 1))  # type: ignore[arg-type]
    found = tower.positions(layout, mode="bilinear", align_corners=True)
    assert difference(found, torch.cat(want)) < 1e-12


@torch.no_grad()
def test_the_table_is_added_to_the_embedded_patches() -> None:
    """Blocks that add nothing leave patch @ weight + bias + position."""
    tower = tiny("qwen3-vit", num_layers=2, taps=(0,), position_grid=(3, 4))
    for block in tower.blocks:
        for linear in (block.attn.out, block.mlp.fc2):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    packed = patches_of(tower, [(3, 4)])
    want = F.linear(packed.tokens, tower.patch_embed.proj.weight, tower.patch_embed.proj.bias)
    want = want + tower.positions.table.flatten(0, 1)
    assert difference(tower(packed).tokens, torch.cat([want, want], dim=1)) < 1e-13


def test_without_taps_there_is_one_level() -> None:
    config = Qwen3ViTConfig(taps=())
    assert (config.num_levels, config.out_dim) == (1, 1152)
    assert (Qwen3ViTConfig().num_levels, Qwen3ViTConfig().out_dim) == (4, 4608)
