"""The pixel-shuffle projector: its formula, published sizes and names, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.layers.merge_cases import GRIDS, by_hand, features
from vlkit.errors import LayoutError
from vlkit.packing import Layout, Packed
from vlkit.projectors.pixel_shuffle import KEYS, PixelShuffleConfig, PixelShuffleProjector


@pytest.mark.parametrize("norm", ["pre", "none"])
def test_projector_is_its_formula(norm: str) -> None:
    """The norm is over one patch, before patches meet; the activation is the exact GELU."""
    projector = PixelShuffleProjector(PixelShuffleConfig(in_dim=3, out_dim=5, norm=norm)).double()  # type: ignore[arg-type]
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter)
    packed = features(GRIDS)
    tokens = packed.tokens
    if projector.norm is not None:
        tokens = F.layer_norm(tokens, (3,), projector.norm.weight, projector.norm.bias, 1e-5)
    hidden = by_hand(packed.with_tokens(tokens), 2) @ projector.fc1.weight.T + projector.fc1.bias
    want = (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) @ projector.fc2.weight.T + projector.fc2.bias
    torch.testing.assert_close(projector(packed).tokens, want)
    assert (projector.norm is None) == (norm == "none")


def test_the_grid_of_tokens_is_known_beforehand() -> None:
    config = PixelShuffleConfig(in_dim=3, out_dim=5)
    projected = PixelShuffleProjector(config).double()(features(GRIDS))
    assert projected.layout.grids == tuple(config.out_grid(grid) for grid in features(GRIDS).layout.grids or ())


def test_an_image_changes_no_bit_of_another() -> None:
    projector = PixelShuffleProjector(PixelShuffleConfig(in_dim=3, out_dim=5)).double()
    packed = features(GRIDS)
    other = packed.tokens.clone()
    other.split(packed.layout.lengths)[1].fill_(float("nan"))
    pairs = zip(projector(packed).unpack(), projector(packed.with_tokens(other)).unpack(), strict=True)
    assert [torch.equal(a, b) for a, b in pairs] == [True, False, True, True, True]


def test_published_sizes_and_names() -> None:
    with torch.device("meta"):
        projector = PixelShuffleProjector(PixelShuffleConfig())
    assert sum(p.numel() for p in projector.parameters()) == 30_679_808
    assert {name: tuple(t.shape) for name, t in KEYS.to_theirs(projector.state_dict()).items()} == {
        "pre_norm.weight": (1152,),
        "pre_norm.bias": (1152,),
        "linear_1.weight": (4608, 4608),
        "linear_1.bias": (4608,),
        "linear_2.weight": (2048, 4608),
        "linear_2.bias": (2048,),
    }


def test_hidden_width_can_be_chosen() -> None:
    projector = PixelShuffleProjector(PixelShuffleConfig(in_dim=3, out_dim=5, merge_size=3, hidden_dim=7))
    assert projector.fc1.weight.shape == (7, 27)
    assert projector(Packed(torch.randn(9, 3), Layout.from_grids([(3, 3)]))).tokens.shape == (1, 5)


def test_bad_input_is_named() -> None:
    projector = PixelShuffleProjector(PixelShuffleConfig(in_dim=3, out_dim=5)).double()
    with pytest.raises(LayoutError, match="item 1: a grid of 3x4 patches cannot be merged 2x2"):
        projector(features([(2, 2), (3, 4)]))
    with pytest.raises(LayoutError, match="only a layout with grids"):
        projector(Packed(torch.zeros(4, 3, dtype=torch.float64), Layout((4,))))
    with pytest.raises(LayoutError, match=r"features have shape \(4, 2\); expected 3 channels"):
        projector(features([(2, 2)], dim=2))


def test_no_images_give_no_tokens() -> None:
    projector = PixelShuffleProjector(PixelShuffleConfig(in_dim=3, out_dim=5))
    assert projector(Packed(torch.zeros(0, 3), Layout((), ()))).tokens.shape == (0, 5)
