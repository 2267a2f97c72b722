"""The patch merger: its formula at every level, published names, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.layers.merge_cases import GRIDS, by_hand, features
from vlkit.errors import ConfigError, LayoutError
from vlkit.packing import Layout, Packed
from vlkit.projectors.patch_merger import KEYS, QWEN3_KEYS, PatchMerger, PatchMergerConfig


def merger(**changes: object) -> PatchMerger:
    made = PatchMerger(PatchMergerConfig(in_dim=3, out_dim=5).replace(**changes)).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def mlp(state: dict[str, Tensor], level: str, x: Tensor) -> Tensor:
    """linear -> exact GELU -> linear, by the weights' names."""
    hidden = x @ state[f"{level}.mlp.fc1.weight"].T + state[f"{level}.mlp.fc1.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ state[f"{level}.mlp.fc2.weight"].T + state[f"{level}.mlp.fc2.bias"]


def normed(state: dict[str, Tensor], level: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return (
        x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{level}.norm.weight"]
        + state[f"{level}.norm.bias"]
    )


def test_one_level_is_its_formula() -> None:
    """The norm is over one patch, before patches meet; the activation is the exact GELU."""
    made, packed = merger(), features(GRIDS)
    state = made.state_dict()
    want = mlp(state, "main", by_hand(packed.with_tokens(normed(state, "main", packed.tokens)), 2))
    found = made(packed)
    torch.testing.assert_close(found.tokens, want)
    assert found.layout == packed.layout.merged(2)


def test_with_rms_norm() -> None:
    made, packed = merger(norm="rms"), features(GRIDS)
    state = made.state_dict()
    scaled = packed.tokens / (packed.tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state["main.norm.weight"]
    torch.testing.assert_close(made(packed).tokens, mlp(state, "main", by_hand(packed.with_tokens(scaled), 2)))


def test_further_levels_have_their_norm_over_the_block() -> None:
    made, packed = merger(in_dim=9, num_levels=3), features(GRIDS, dim=9)
    state = made.state_dict()
    first, *deep = (packed.with_tokens(level) for level in packed.tokens.split(3, dim=1))
    want = [mlp(state, "main", by_hand(first.with_tokens(normed(state, "main", first.tokens)), 2))]
    want += [mlp(state, f"deep.{i}", normed(state, f"deep.{i}", by_hand(level, 2))) for i, level in enumerate(deep)]
    torch.testing.assert_close(made(packed).tokens, torch.cat(want, dim=1))


def test_other_block_sizes() -> None:
    made, packed = merger(merge_size=3), features([(3, 9), (2, 6, 3)])
    state = made.state_dict()
    want = mlp(state, "main", by_hand(packed.with_tokens(normed(state, "main", packed.tokens)), 3))
    torch.testing.assert_close(made(packed).tokens, want)


def test_the_grid_of_tokens_is_known_beforehand() -> None:
    made, packed = merger(), features(GRIDS)
    assert made(packed).layout.grids == tuple(made.config.out_grid(grid) for grid in packed.layout.grids or ())


def test_an_image_changes_no_bit_of_another() -> None:
    made, packed = merger(in_dim=6, num_levels=2), features(GRIDS, dim=6)
    other = packed.tokens.clone()
    other.split(packed.layout.lengths)[1].fill_(float("nan"))
    pairs = zip(made(packed).unpack(), made(packed.with_tokens(other)).unpack(), strict=True)
    assert [torch.equal(a, b) for a, b in pairs] == [True, False, True, True, True]


def test_published_names() -> None:
    with torch.device("meta"):
        old = KEYS.to_theirs(PatchMerger(PatchMergerConfig(norm="rms")).state_dict())
        deep = PatchMerger(PatchMergerConfig(in_dim=2 * 1152, out_dim=4096, num_levels=2)).state_dict()
        new = QWEN3_KEYS.to_theirs(deep)
    assert {name: tuple(t.shape) for name, t in old.items()} == {
        "merger.ln_q.weight": (1280,),
        "merger.mlp.0.weight": (5120, 5120),
        "merger.mlp.0.bias": (5120,),
        "merger.mlp.2.weight": (3584, 5120),
        "merger.mlp.2.bias": (3584,),
    }
    linear = {"linear_fc1": (4608, 4608), "linear_fc2": (4096, 4608)}
    want = {"merger.norm.weight": (1152,), "merger.norm.bias": (1152,)}
    want |= {"deepstack_merger_list.0.norm.weight": (4608,), "deepstack_merger_list.0.norm.bias": (4608,)}
    for level in ("merger", "deepstack_merger_list.0"):
        for name, shape in linear.items():
            want |= {f"{level}.{name}.weight": shape, f"{level}.{name}.bias": shape[:1]}
    assert {name: tuple(t.shape) for name, t in new.items()} == want
    assert set(QWEN3_KEYS.to_ours({n: torch.empty(t.shape) for n, t in new.items()})) == set(deep)


def test_bad_input_is_named() -> None:
    made = merger()
    with pytest.raises(LayoutError, match="item 1: a grid of 3x4 patches cannot be merged 2x2"):
        made(features([(2, 2), (3, 4)]))
    with pytest.raises(LayoutError, match="only a layout with grids"):
        made(Packed(torch.zeros(4, 3, dtype=torch.float64), Layout((4,))))
    with pytest.raises(LayoutError, match=r"features have shape \(4, 2\); expected 3 channels"):
        made(features([(2, 2)], dim=2))
    with pytest.raises(ConfigError, match="in_dim=10 is not a multiple of num_levels=4"):
        PatchMergerConfig(in_dim=10, num_levels=4)


def test_no_images_give_no_tokens() -> None:
    made = merger(in_dim=6, num_levels=2)
    assert made(Packed(torch.zeros(0, 6, dtype=torch.float64), Layout((), ()))).tokens.shape == (0, 10)
