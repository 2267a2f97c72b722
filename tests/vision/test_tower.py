"""What holds for the towers of square patches and one table: odd packs, tables and rotary embedding on and off."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.vision.tower_cases import difference, gradients, patches_of, tiny
from vlkit.errors import ConfigError, LayoutError
from vlkit.packing import Layout, Packed
from vlkit.registry import component

GRIDS = [(3, 5), (1, 1), (6, 6), (1, 7), (10, 2), (3, 5)]
towers = pytest.mark.parametrize("name", ["aimv2", "siglip2"])


@towers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@torch.no_grad()
def test_a_pack_gives_what_each_image_gives_alone(name: str, dtype: torch.dtype, tolerance: float) -> None:
    tower = tiny(name, dtype)
    packed = patches_of(tower, GRIDS)
    together = tower(packed)
    assert together.layout == packed.layout
    for ours, tokens, grid in zip(together.unpack(), packed.unpack(), GRIDS, strict=True):
        assert difference(ours, tower(Packed(tokens, Layout.from_grids([grid]))).tokens) < tolerance


@towers
@torch.no_grad()
def test_an_image_changes_no_bit_of_another(name: str) -> None:
    tower = tiny(name, torch.float32)
    packed = patches_of(tower, GRIDS)
    before = tower(packed).unpack()
    other = packed.tokens.clone()
    start, end = packed.layout.offsets[2:4]
    other[start:end] = float("nan")
    after = tower(packed.with_tokens(other)).unpack()
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, True, True, True]


@towers
@pytest.mark.parametrize("use_positions", [True, False])
@pytest.mark.parametrize("use_rope", [True, False])
@torch.no_grad()
def test_positions_come_from_the_table_and_from_rotary_embedding(
    name: str, use_positions: bool, use_rope: bool
) -> None:
    """With either, shuffled patches give other features, and rows are told from columns; with neither, nothing is."""
    tower = tiny(name, use_positions=use_positions, use_rope=use_rope)
    packed = patches_of(tower, [(3, 4)])
    features = tower(packed)
    order = torch.randperm(12)
    shuffled = tower(packed.with_tokens(packed.tokens[order])).tokens
    assert (difference(shuffled, features.tokens[order]) < 1e-12) is not (use_positions or use_rope)
    turned = packed.tokens.view(3, 4, -1).transpose(0, 1).flatten(0, 1)
    tall = tower(Packed(turned, Layout.from_grids([(4, 3)]))).tokens.view(4, 3, -1).transpose(0, 1).flatten(0, 1)
    assert (difference(tall, features.tokens) < 1e-12) is not (use_positions or use_rope)


@towers
@torch.no_grad()
def test_rotary_embedding_sees_differences_of_positions_alone(name: str) -> None:
    """Without a table, a window of a larger image whose other patches it cannot see gives what it gives alone.

    A 2 x 3 window at row 4, column 5 has angles that are all moved by the same amount.
    """
    tower = tiny(name, use_positions=False)
    packed = patches_of(tower, [(2, 3)])
    rotary = tower.rotary(Layout.from_grids([(7, 9)]), device="cpu")
    rows = torch.tensor([row * 9 + col for row in (4, 5) for col in (5, 6, 7)])
    moved = type(rotary)(rotary.cos[rows], rotary.sin[rows])
    x = tower.patch_embed(packed.tokens)
    segments = packed.layout.segments("cpu")
    alone = tower.forward_blocks(x, tower.rotary(packed.layout, device="cpu"), segments)
    assert difference(tower.forward_blocks(x, moved, segments), alone) < 1e-12


@towers
def test_bfloat16_stays_close(name: str) -> None:
    """Freshly drawn weights; largest seen 0.02 of the largest feature."""
    made = component("vision", name)
    tower: Any = made.module(made.configs[f"{name}-tiny"])
    packed = patches_of(tower, GRIDS)
    exact = tower(packed).tokens
    half = tower.bfloat16()(packed).tokens
    assert half.dtype == torch.bfloat16
    assert difference(half.float(), exact) < 0.05


@towers
def test_bad_input_is_named(name: str) -> None:
    tower = tiny(name)
    with pytest.raises(LayoutError, match="from_grids"):
        tower(Packed(torch.zeros(4, tower.config.patch_dim), Layout((4,))))
    with pytest.raises(LayoutError, match=r"patches have shape \(4, 47\); expected 48 values each: 3 channels of 4x4"):
        tower(Packed(torch.zeros(4, 47), Layout.from_grids([(2, 2)])))
    with pytest.raises(ConfigError, match="dim=36 is not a multiple of 4 \\* num_heads=16"):
        tower.config.replace(dim=36, num_heads=4)


@towers
def test_no_images_give_no_features(name: str) -> None:
    tower = tiny(name)
    features = tower(Packed(torch.zeros(0, tower.config.patch_dim), Layout((), ())))
    assert features.tokens.shape == (0, 32)
    assert all(not bool(grad.any()) for grad in gradients(tower, features.tokens))


# ---- published sizes and names


@pytest.mark.parametrize(
    ("kind", "name", "tensors", "parameters", "head_dim"),
    [
        ("aimv2", "aimv2-large", 173, 309_984_256, 128),
        ("aimv2", "aimv2-huge", 173, 682_031_616, 128),
        ("aimv2", "aimv2-1b", 173, 1_236_531_200, 128),
        ("aimv2", "aimv2-3b", 173, 2_723_017_728, 128),
        ("siglip2", "siglip2-base", 197, 86_433_024, 64),
        ("siglip2", "siglip2-so400m-patch14", 437, 412_987_248, 72),
    ],
)
def test_published_sizes_and_names(kind: str, name: str, tensors: int, parameters: int, head_dim: int) -> None:
    """Counts are those of transformers' models of these sizes without their heads, for images of 448, 512 and 378 pixels."""
    from vlkit.vision import aimv2, siglip2

    made = component("vision", kind)
    with torch.device("meta"):
        tower: Any = made.module(made.configs[name])
    assert sum(p.numel() for p in tower.parameters()) == parameters
    assert tower.config.head_dim == head_dim
    keys = {"aimv2": aimv2.KEYS, "siglip2": siglip2.KEYS}[kind]
    published = keys.to_theirs(tower.state_dict())
    assert len(published) == tensors
    assert set(keys.to_ours(published)) == set(tower.state_dict())
