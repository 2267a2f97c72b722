"""Merging blocks of patches: which patches meet, for several images and clips at once."""

from __future__ import annotations

import pytest
import torch

from tests.layers.merge_cases import GRIDS, by_hand, features
from vlkit.layers.merge import merge_blocks, merged_grid
from vlkit.packing import Layout, Packed


@pytest.mark.parametrize("grids", [GRIDS, GRIDS[:1], [(4, 6)] * 3], ids=str)
def test_blocks_are_patches_side_by_side(grids: list[tuple[int, ...]]) -> None:
    packed = features(grids)
    merged = merge_blocks(packed, 2)
    assert merged.layout == packed.layout.merged(2)
    assert merged.layout.grids == tuple(merged_grid(grid, 2) for grid in packed.layout.grids or ())
    assert torch.equal(merged.tokens, by_hand(packed, 2))


def test_other_block_sizes() -> None:
    packed = features([(3, 9), (6, 3)])
    assert torch.equal(merge_blocks(packed, 3).tokens, by_hand(packed, 3))
    assert merge_blocks(packed, 1).tokens is packed.tokens


def test_gradients_find_their_patch() -> None:
    packed = features(GRIDS)
    packed.tokens.requires_grad_()
    weights = torch.randn(packed.layout.merged(2).num_tokens, 12, dtype=torch.float64)
    grads = [
        torch.autograd.grad((merged * weights).sum(), packed.tokens)[0]
        for merged in (merge_blocks(packed, 2).tokens, by_hand(packed, 2))
    ]
    assert torch.equal(*grads)


def test_no_images_give_no_blocks() -> None:
    assert merge_blocks(Packed(torch.zeros(0, 3), Layout((), ())), 2).tokens.shape == (0, 12)
