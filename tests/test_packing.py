"""A layout that contradicts itself cannot be made; what is derived from one is right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlkit.errors import EmptyBatchError, LayoutError
from vlkit.packing import Batch, Layout, Packed

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple)
grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5)


@given(lengths)
def test_offsets_items_and_positions_agree(lengths: tuple[int, ...]) -> None:
    layout = Layout(lengths)
    items, positions = layout.item_ids().tolist(), layout.positions().tolist()
    assert [(i, p) for i, n in enumerate(lengths) for p in range(n)] == list(zip(items, positions, strict=True))
    assert layout.cu_seqlens().tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert Layout.from_offsets(layout.cu_seqlens(), layout.num_tokens) == layout


@given(lengths, lengths)
def test_unpack_inverts_concat(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    parts = [Packed(torch.randn(sum(n), 2), Layout(n)) for n in (first, second)]
    joined = Packed.concat(parts)
    pieces = joined.unpack()
    assert [len(p) for p in pieces] == [*first, *second]
    assert torch.equal(torch.cat(pieces), torch.cat([p.tokens for p in parts]))


@given(grids, st.integers(1, 3))
def test_merged_grids(grids: list[tuple[int, int, int]], size: int) -> None:
    layout = Layout.from_grids([(t, h * size, w * size) for t, h, w in grids])
    assert layout.merged(size) == Layout.from_grids(grids)


def test_merging_an_odd_grid_names_the_item() -> None:
    with pytest.raises(LayoutError, match="item 1: a grid of 4x3 patches"):
        Layout.from_grids([(2, 2), (4, 3)]).merged(2)


@pytest.mark.parametrize(
    ("offsets", "num_tokens", "words"),
    [
        ([0, 3, 2], 2, "item 1 has -1 tokens"),
        ([0, 3, 3], 3, "item 1 has 0 tokens"),
        ([1, 3], 3, "must run from 0 to 3"),
        ([0, 2], 3, "must run from 0 to 3"),
        (torch.tensor([0.0, 3.0]), 3, "integer tensor"),
        (torch.tensor([[0, 3]]), 3, "1-D"),
    ],
)
def test_wrong_boundaries_are_refused(offsets: object, num_tokens: int, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        Layout.from_offsets(offsets, num_tokens)  # type: ignore[arg-type]


def test_grid_and_length_must_agree() -> None:
    with pytest.raises(LayoutError, match=r"item 1: grid 1x2x2 .* 5 tokens"):
        Layout((4, 5), ((1, 2, 2), (1, 2, 2)))
    with pytest.raises(LayoutError, match="layout counts 4 tokens"):
        Packed(torch.zeros(5, 2), Layout((4,)))


def test_tensors_are_made_once_per_device() -> None:
    layout = Layout((2, 3))
    assert layout.cu_seqlens("cpu") is layout.cu_seqlens("cpu")


def _batch(labels: bool) -> Batch:
    ids = Packed(torch.tensor([1, 2, 3]), Layout((3,)))
    return Batch(ids, labels=ids.tokens if labels else None)


def test_batches_join_in_order_and_refuse_half_given_labels() -> None:
    joined = Batch.concat([_batch(True), _batch(True)])
    assert joined.ids.layout.lengths == (3, 3)
    assert joined.labels is not None
    assert joined.labels.tolist() == [1, 2, 3, 1, 2, 3]
    with pytest.raises(LayoutError, match="batch 1 has no labels"):
        Batch.concat([_batch(True), _batch(False)])
    with pytest.raises(EmptyBatchError):
        Batch.concat([])


def test_batch_checks_its_tensors() -> None:
    ids = Packed(torch.tensor([1, 2, 3]), Layout((3,)))
    with pytest.raises(LayoutError, match="labels has 2 rows for 3 tokens"):
        Batch(ids, labels=torch.tensor([1, 2]))
    with pytest.raises(LayoutError, match="grids"):
        Batch(ids, patches=Packed(torch.zeros(4, 2), Layout((4,))))
    with pytest.raises(LayoutError, match="integers"):
        Batch(Packed(torch.zeros(3), Layout((3,))))
    with pytest.raises(EmptyBatchError):
        Batch(Packed(torch.zeros(0, dtype=torch.long), Layout(())))


def test_frames_make_every_time_step_an_item() -> None:
    layout = Layout.from_grids([(2, 3, 4), (1, 5, 2)])
    assert layout.frames() == Layout.from_grids([(1, 3, 4), (1, 3, 4), (1, 5, 2)])
    assert layout.frames().num_tokens == layout.num_tokens
    still = Layout.from_grids([(3, 4)])
    assert still.frames() is still
    with pytest.raises(LayoutError, match="grids"):
        Layout((3,)).frames()


def test_seconds_count_images_and_videos() -> None:
    ids = Packed(torch.arange(3), Layout((3,)))
    clip = Packed(torch.zeros(8, 2), Layout.from_grids([(2, 2, 2)]))
    still = Packed(torch.zeros(4, 2), Layout.from_grids([(2, 2)]))
    joined = Batch.concat([Batch(ids, clip, seconds=(0.5,)), Batch(ids), Batch(ids, still)])
    assert joined.seconds == (0.5, 0.0)
    assert joined.to("cpu").seconds == (0.5, 0.0)
    assert Batch.concat([Batch(ids, still), Batch(ids)]).seconds is None
    with pytest.raises(LayoutError, match="2 entries for 1"):
        Batch(ids, clip, seconds=(0.5, 0.5))
    with pytest.raises(LayoutError, match="item 0"):
        Batch(ids, clip, seconds=(-1.0,))
    with pytest.raises(LayoutError, match="video but no seconds"):
        Batch.concat([Batch(ids, clip, seconds=(0.5,)), Batch(ids, clip)])
