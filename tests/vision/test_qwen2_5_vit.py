"""Windows of the Qwen2.5-VL tower: their order, and that attention stays in them."""

from __future__ import annotations

import pytest
import torch

from tests.vision.tower_cases import difference, patches_of, tiny
from vlkit.errors import LayoutError
from vlkit.packing import Layout, Packed
from vlkit.vision.qwen2_5_vit import Qwen25ViTConfig, window_order

GRIDS = [(1, 6, 5), (3, 8, 4), (1, 1, 1), (2, 1, 9), (1, 4, 4), (2, 5, 12)]


def test_windows_are_in_raster_order_and_smaller_at_the_edges() -> None:
    """6 x 5 cells in windows of 4 x 4."""
    order, windows = window_order(Layout.from_grids([(6, 5)]), 4)
    assert order.tolist() == [
        *(0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18), *(4, 9, 14, 19),
        *(20, 21, 22, 23, 25, 26, 27, 28), *(24, 29),
    ]  # fmt: skip
    assert windows.lengths == (16, 4, 8, 2)
    assert window_order(Layout.from_grids([(12, 10)]), 8)[1].lengths == (64, 16, 32, 8)  # the same in patches


def test_windows_by_hand() -> None:
    """Every patch knows its frame and its place; sorted by frame, window, row and column."""
    layout, side = Layout.from_grids(GRIDS), 4
    places = [
        (item, time, row // side, column // side, row, column)
        for item, (frames, rows, columns) in enumerate(GRIDS)
        for time in range(frames)
        for row in range(rows)
        for column in range(columns)
    ]
    order, windows = window_order(layout, side)
    assert [places[i] for i in order.tolist()] == sorted(places)
    assert [places[i][:4] for i in order[list(windows.offsets[:-1])].tolist()] == sorted(
        {place[:4] for place in places}
    )


def test_windows_need_grids() -> None:
    with pytest.raises(LayoutError, match="from_grids"):
        window_order(Layout((4,)), 2)


def test_a_window_has_whole_merge_blocks() -> None:
    assert Qwen25ViTConfig().window_side == 8
    assert Qwen25ViTConfig(window_size=139).window_side == 8
    assert Qwen25ViTConfig(window_size=140).window_side == 10
    assert Qwen25ViTConfig(window_size=56).window_side == 4


@torch.no_grad()
def test_a_window_is_an_image_of_its_own() -> None:
    """Rotary embedding knows distances only, so a window cut out of its image has the same features."""
    tower = tiny("qwen2.5-vit", full_layers=())
    frame = patches_of(tower, [(6, 9)])
    whole = tower(frame).tokens.view(6, 9, -1)
    pixels = frame.tokens.view(6, 9, -1)
    for rows in (slice(0, 4), slice(4, 6)):
        for columns in (slice(0, 4), slice(4, 8), slice(8, 9)):
            window = pixels[rows, columns]
            alone = tower(Packed(window.flatten(0, 1), Layout.from_grids([window.shape[:2]])))
            assert difference(whole[rows, columns].flatten(0, 1), alone.tokens) < 1e-12


@torch.no_grad()
def test_full_layers_see_the_frame_in_any_order() -> None:
    """With whole frames in all layers the size of windows, and so the order of patches, changes nothing."""
    features = []
    for window_size in (8, 16, 400):
        torch.manual_seed(1)
        tower = tiny("qwen2.5-vit", window_size=window_size, full_layers=(0, 1))
        features.append(tower(patches_of(tower, [(2, 6, 9), (3, 3)])).tokens)
    assert difference(features[0], features[2]) < 1e-12
    assert difference(features[1], features[2]) < 1e-12


@torch.no_grad()
def test_only_the_named_layers_see_the_frame() -> None:
    """A change in one window reaches another only through a full layer, from that layer on."""
    for full_layers, reaches in (((), False), ((0,), True), ((1,), True)):
        tower = tiny("qwen2.5-vit", full_layers=full_layers)
        frame = patches_of(tower, [(4, 8)])
        changed = frame.tokens.view(4, 8, -1).clone()
        changed[:, 4:] += 1
        before, after = tower(frame).tokens, tower(frame.with_tokens(changed.flatten(0, 1))).tokens
        assert torch.equal(before.view(4, 8, -1)[:, :4], after.view(4, 8, -1)[:, :4]) is (not reaches)
