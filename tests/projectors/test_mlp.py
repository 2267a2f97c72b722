"""The MLP projector: one token per patch, LLaVA's names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlkit.errors import LayoutError
from vlkit.packing import Layout, Packed
from vlkit.projectors.mlp import KEYS, MLPProjector, MLPProjectorConfig


def test_it_is_llavas_sequence_of_layers() -> None:
    """nn.Sequential(linear, GELU, linear) with the same weights, loaded by its own names."""
    theirs = nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 11))
    ours = MLPProjector(MLPProjectorConfig(in_dim=7, out_dim=11))
    ours.load_state_dict(KEYS.to_ours(theirs.state_dict()))
    assert set(KEYS.to_theirs(ours.state_dict())) == set(theirs.state_dict())
    features = Packed(torch.randn(17, 7), Layout.from_grids([(3, 5), (1, 1, 1), (1, 1)]))
    tokens = ours(features)
    torch.testing.assert_close(tokens.tokens, theirs(features.tokens))
    assert tokens.layout == features.layout


def test_a_grid_of_tokens_is_the_grid_of_patches() -> None:
    config = MLPProjectorConfig(in_dim=7, out_dim=5, hidden_dim=9)
    assert config.out_grid((2, 3, 5)) == (2, 3, 5)
    assert config.merge_size == 1
    assert MLPProjector(config).mlp.fc1.out_features == 9


def test_mistakes_are_named() -> None:
    projector = MLPProjector(MLPProjectorConfig(in_dim=7, out_dim=5))
    with pytest.raises(LayoutError, match=r"\(4, 6\); expected 7 channels"):
        projector(Packed(torch.zeros(4, 6), Layout.from_grids([(2, 2)])))
    with pytest.raises(LayoutError, match="grid"):
        projector(Packed(torch.zeros(4, 7), Layout((4,))))
