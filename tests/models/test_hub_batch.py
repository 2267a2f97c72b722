"""The padded tensors of Hub processors -> Batch: orders undone, items in text order, contradictions named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vlkit
from vlkit.errors import LayoutError, PlaceholderMismatchError
from vlkit.models import VisionLanguageModel
from vlkit.packing import Layout

IMAGE, VIDEO = 273, 274


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    """A model of a family that lists patches block by block."""
    return vlkit.create_model("qwen2-vl-tiny", device="meta")


def in_blocks(grid: tuple[int, int, int]) -> list[int]:
    """Raster indices of the patches of a grid, in the order of 2x2 blocks; spelled out as loops."""
    t, h, w = grid
    return [
        (time * h + row + down) * w + column + right
        for time in range(t)
        for row in range(0, h, 2)
        for column in range(0, w, 2)
        for down in (0, 1)
        for right in (0, 1)
    ]


def pixels(model: VisionLanguageModel, grids: list[tuple[int, int, int]], first: int = 0) -> torch.Tensor:
    """Patches in block order, each filled with its number in raster order."""
    numbers: list[int] = []
    for grid in grids:
        start = first + len(numbers)
        numbers += [start + i for i in in_blocks(grid)]
    wide = model.config.vision.patch_dim  # type: ignore[attr-defined]
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, wide)


def test_blocks_become_raster_order(model: VisionLanguageModel) -> None:
    grids = [(1, 4, 6), (1, 2, 4)]
    batch = model.pack(
        input_ids=torch.tensor([[1] + [IMAGE] * 6 + [2] + [IMAGE] * 2]),
        pixel_values=pixels(model, grids),
        image_grid_thw=torch.tensor(grids),
    )
    assert batch.patches is not None
    assert batch.patches.layout == Layout.from_grids(grids)
    assert batch.patches.tokens[:, 0].tolist() == list(range(32))


def test_images_and_videos_follow_the_text(model: VisionLanguageModel) -> None:
    """Row 0 has a video and then an image, row 1 an image: the two tensors of pixels become one, in that order."""
    video, images = (2, 2, 4), [(1, 2, 2), (1, 4, 2)]
    ids = torch.tensor([[VIDEO] * 4 + [5, IMAGE], [0, 0, 0, 7, IMAGE, IMAGE]])
    batch = model.pack(
        input_ids=ids,
        attention_mask=torch.tensor([[1] * 6, [0] * 3 + [1] * 3]),
        pixel_values=pixels(model, images),
        image_grid_thw=torch.tensor(images),
        pixel_values_videos=pixels(model, [video], first=100),
        video_grid_thw=torch.tensor([video]),
        second_per_grid_ts=[1.5],
        mm_token_type_ids=(ids == IMAGE).long() + 2 * (ids == VIDEO).long(),
    )
    assert batch.patches is not None
    assert batch.patches.layout.grids == (video, *images)
    assert batch.patches.tokens[:, 0].tolist() == [*range(100, 116), *range(12)]
    assert batch.seconds == (1.5, 0.0, 0.0)
    assert batch.ids.layout.lengths == (6, 3)


def test_a_video_of_frames_apart_is_split() -> None:
    model = vlkit.create_model("qwen3-vl-tiny", device="meta")
    batch = model.pack(
        input_ids=torch.tensor([[VIDEO, 1, VIDEO, 2, VIDEO]]),
        pixel_values_videos=pixels(model, [(3, 2, 2)]),
        video_grid_thw=torch.tensor([[3, 2, 2]]),
    )
    assert batch.patches is not None
    assert batch.patches.layout.grids == ((1, 2, 2),) * 3
    assert batch.patches.tokens[:, 0].tolist() == list(range(12))


def test_flags_say_where_an_image_stands() -> None:
    """AndesVL's loader writes the end-of-text id at an image and says by flags where it is."""
    model = vlkit.create_model("andesvl-tiny", device="meta")
    end = 269
    batch = model.pack(
        input_ids=torch.tensor([[5, end, end, end]]),
        image_flags=torch.tensor([[0, 1, 1, 0]]),
        pixel_values=torch.zeros(8, model.config.vision.patch_dim),  # type: ignore[attr-defined]
        image_grid_hw=torch.tensor([[2, 4]]),
    )
    token = model.config.image_token_id
    assert batch.ids.tokens.tolist() == [5, token, token, end]


def test_everything_between_the_marks_is_a_placeholder() -> None:
    """Qwen-VL carries the bytes of a path between the marks of an image; whole images come instead of patches."""
    model = vlkit.create_model("qwen-vl-tiny", device="meta")
    config: Any = model.config
    start, end = config.hub_inputs.image_span
    slots = config.projector.out_grid((1, 4, 4))[1] ** 2
    ids = [1, start, *range(40, 40 + slots), end, 2]
    size = config.vision.patch_size
    image = torch.rand(1, 3, 2 * size, 3 * size)
    batch = model.pack(input_ids=torch.tensor([ids]), pixel_values=image)
    assert batch.ids.tokens.tolist() == [1, start, *[config.image_token_id] * slots, end, 2]
    assert batch.patches is not None
    assert batch.patches.layout.grids == ((1, 2, 3),)
    assert torch.equal(batch.patches.tokens[1].view(3, size, size), image[0, :, :size, size : 2 * size])
    with pytest.raises(PlaceholderMismatchError, match="sequence 0: its image marks"):
        model.pack(input_ids=torch.tensor([ids[:-2]]), pixel_values=image)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input_ids": torch.zeros(2, 3)}, LayoutError, "integers"),
        ({"labels": torch.zeros(1, 2, dtype=torch.long)}, LayoutError, "labels is"),
        ({"image_grid_thw": None}, LayoutError, "come together"),
        ({"pixel_values": None}, LayoutError, "come together"),
        ({"image_grid_hws": torch.tensor([[2, 4]])}, LayoutError, "not both"),
        ({"image_grid_thw": torch.tensor([[1, 2, 6]])}, LayoutError, "make 12 patches, pixel_values has 8 rows"),
        ({"image_grid_thw": torch.tensor([[2, 4]])}, LayoutError, r"\[items, 3\]"),
        ({"image_grid_thw": torch.tensor([[8, 1, 1]])}, LayoutError, "no whole blocks"),
        ({"mm_token_type_ids": torch.tensor([[0, 1, 2]])}, PlaceholderMismatchError, "mm_token_type_ids"),
        ({"video_grid_thw": torch.tensor([[1, 2, 2]])}, LayoutError, "come together"),
    ],
)
def test_contradictions_are_named(
    model: VisionLanguageModel, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    tensors = {
        "input_ids": torch.tensor([[1, IMAGE, IMAGE]]),
        "pixel_values": pixels(model, [(1, 2, 4)]),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
    }
    with pytest.raises(error, match=words):
        model.pack(**{**tensors, **change})


def test_videos_need_a_placeholder_and_their_seconds() -> None:
    kimi = vlkit.create_model("kimi-vl-tiny", device="meta")
    clip = torch.zeros(8, kimi.config.vision.patch_dim)  # type: ignore[attr-defined]
    with pytest.raises(LayoutError, match="video_token_id"):
        kimi.pack(input_ids=torch.tensor([[1, 2]]), pixel_values_videos=clip, video_grid_thw=torch.tensor([[2, 2, 2]]))
    timed = vlkit.create_model("qwen2.5-vl-tiny", device="meta")
    batch = timed.pack(
        input_ids=torch.tensor([[VIDEO, VIDEO, 1]]),
        pixel_values_videos=pixels(timed, [(2, 2, 2)]),
        video_grid_thw=torch.tensor([[2, 2, 2]]),
        second_per_grid_ts=torch.tensor([1.0]),
    )
    assert timed.positions(batch).tolist() == [[0, 0, 0], [2, 0, 0], [3, 3, 3]]  # type: ignore[union-attr]
    with pytest.raises(LayoutError, match="seconds"):
        timed.positions(dataclasses.replace(batch, seconds=None))
