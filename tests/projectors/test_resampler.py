"""The resampler by itself: fixed positions, images of unequal sizes, what is trained, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from vlkit.errors import ConfigError, LayoutError
from vlkit.optim import muon_param_groups
from vlkit.packing import Layout, Packed
from vlkit.projectors.resampler import KEYS, Resampler, ResamplerConfig, sincos_positions

GRIDS = [(3, 5), (1, 1), (1, 1), (4, 2), (2, 2)]


def tiny(**changes: object) -> Resampler:
    config = ResamplerConfig(in_dim=10, out_dim=24, num_queries=9, num_heads=3)
    return Resampler(config.replace(**changes))


def features(grids: list[tuple[int, ...]] = GRIDS, dim: int = 10, dtype: torch.dtype = torch.float32) -> Packed:
    layout = Layout.from_grids(grids)
    return Packed(torch.randn(layout.num_tokens, dim, dtype=dtype), layout)


def test_every_image_becomes_the_same_grid() -> None:
    tokens = tiny()(features())
    assert tokens.layout.grids == ((1, 3, 3),) * 5
    assert tokens.tokens.shape == (45, 24)
    assert {tiny().config.out_grid((t, 7, 2)) for t in (1, 4)} == {(1, 3, 3)}
    assert tiny().config.merge_size == 1


def test_packed_equals_alone_and_items_are_isolated() -> None:
    resampler = tiny().double()
    packed = features(dtype=torch.float64)
    together = resampler(packed).unpack()
    for item, (part, grid) in enumerate(zip(packed.unpack(), GRIDS, strict=True)):
        alone = resampler(Packed(part, Layout.from_grids([grid]))).tokens
        assert (alone - together[item]).abs().max() < 1e-14
    changed = packed.tokens.clone()
    changed[:15] = 7.0  # the first image
    after = resampler(packed.with_tokens(changed)).unpack()
    assert not torch.equal(after[0], together[0])
    assert all(torch.equal(a, b) for a, b in zip(after[1:], together[1:], strict=True))


def test_fixed_positions_encode_the_column_first() -> None:
    """Each half: sines, then cosines, of wavelengths that grow to 10000."""
    table = sincos_positions(3, 4, 16)
    for row in range(3):
        for column in range(4):
            for half, place in ((0, column), (8, row)):
                for i in range(4):
                    angle = place * 10000 ** (-i / 4)
                    assert abs(float(table[row, column, half + i]) - math.sin(angle)) < 1e-14
                    assert abs(float(table[row, column, half + 4 + i]) - math.cos(angle)) < 1e-14


def test_keys_have_positions_and_values_have_not() -> None:
    """Two grids of equal patches: only the keys differ. With equal values, attention cannot show it."""
    resampler = tiny()
    same = torch.randn(10).expand(6, 10)
    wide, high = (resampler(Packed(same, Layout.from_grids([grid]))).tokens for grid in ((1, 6), (6, 1)))
    torch.testing.assert_close(wide, high, atol=1e-6, rtol=0)
    various = torch.randn(6, 10)
    wide, high = (resampler(Packed(various, Layout.from_grids([grid]))).tokens for grid in ((1, 6), (6, 1)))
    assert (wide - high).abs().max() > 1e-4


def test_equal_widths_need_no_linear_layer_before_the_keys() -> None:
    resampler = tiny(in_dim=24)
    assert resampler.kv_proj is None
    assert "attn_pool.kv_proj.weight" not in KEYS.to_theirs(resampler.state_dict())
    assert resampler(features(dim=24)).tokens.shape == (45, 24)


def test_positions_are_stored_but_not_trained() -> None:
    resampler = tiny()
    assert [name for name, p in resampler.named_parameters() if not p.requires_grad] == ["positions.table"]
    torch.testing.assert_close(resampler.positions.table, sincos_positions(3, 3, 24).float())
    assert KEYS.to_theirs(resampler.state_dict())["attn_pool.pos_embed"].shape == (9, 24)
    resampler.positions.requires_grad_(True)  # as a fine-tuning that frees the whole resampler does
    routes = {row.name: row.route for row in muon_param_groups(resampler).report.rows}
    assert routes["positions.table"] == routes["query"] == "adamw"
    assert routes["attn.q.weight"] == routes["kv_proj.weight"] == routes["out.weight"] == "muon"


def test_names_survive_the_round_trip() -> None:
    state = tiny().state_dict()
    published = KEYS.to_theirs(state)
    assert published["attn_pool.attn.in_proj_weight"].shape == (72, 24)
    torch.testing.assert_close(published["proj"], state["out.weight"].T, atol=0, rtol=0)
    again = KEYS.to_ours(published)
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_no_images_give_no_tokens() -> None:
    resampler = tiny()
    tokens = resampler(Packed(torch.zeros(0, 10), Layout((), ())))
    assert tokens.tokens.shape == (0, 24)
    assert tokens.layout.num_items == 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"num_queries=10 is not a square number.*9 or 16"):
        tiny(num_queries=10)
    with pytest.raises(ConfigError, match="out_dim=24 is not a multiple of num_heads=5"):
        tiny(num_heads=5)
    with pytest.raises(ConfigError, match="out_dim=27 is not a multiple of 4"):
        tiny(out_dim=27)
    with pytest.raises(LayoutError, match=r"\(4, 9\); expected 10 channels"):
        tiny()(Packed(torch.zeros(4, 9), Layout.from_grids([(2, 2)])))
    with pytest.raises(LayoutError, match="grid"):
        tiny()(Packed(torch.zeros(4, 10), Layout((4,))))
