from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from vlkit.errors import ConfigError, ImageError, VideoError
from vlkit.processing import ImageRule, VideoRule

QWEN2 = VideoRule()
QWEN3 = VideoRule(multiple=1, spacing="ends", budget="video", min_pixels=4096, max_pixels=25165824)
IMAGE2 = ImageRule(patch_size=14, frames_per_patch=2, max_patches=None, max_side=None)
IMAGE3 = ImageRule(patch_size=16, frames_per_patch=2, max_patches=None, max_side=None)


@pytest.mark.parametrize(
    ("rule", "num_frames", "fps", "count", "first"),
    [
        (QWEN2, 300, 30, 20, (0, 15, 30, 45)),
        (QWEN2, 100, 24, 8, (0, 12, 25, 37, 50, 62, 75, 87)),
        (QWEN2, 3, 30, 2, (0, 1)),
        (QWEN2, 1, 30, 1, (0,)),
        (QWEN2, 100_000, 24, 768, (0, 130, 260)),
        (QWEN3, 300, 30, 20, (0, 16, 31, 47, 63, 79, 94, 110)),
        (QWEN3, 100, 24, 8, (0, 14, 28, 42, 57, 71, 85, 99)),
        (QWEN3, 5, 30, 4, (0, 1, 3, 4)),
        (QWEN3, 2, 30, 2, (0, 1)),
        (QWEN3, 110, 30, 7, (0, 18, 36, 54, 73, 91, 109)),  # a count may be odd
        (QWEN3.replace(multiple=2), 110, 30, 6, (0, 22, 44, 65, 87, 109)),  # the authors' own reader: even
    ],
)
def test_frames_are_those_of_the_published_samplers(
    rule: VideoRule, num_frames: int, fps: float, count: int, first: tuple[int, ...]
) -> None:
    indices = rule.sample(num_frames, fps).indices

    assert len(indices) == count
    assert indices[: len(first)] == first


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 3000), st.sampled_from([12.5, 24.0, 29.97, 30.0, 60.0]) | st.floats(0.5, 90))
def test_frames_are_those_of_transformers(num_frames: int, fps: float) -> None:
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(total_num_frames=num_frames, fps=fps)
    second = Qwen2VLVideoProcessor().sample_frames(metadata, fps=2).tolist()
    third = Qwen3VLVideoProcessor().sample_frames(metadata, fps=2).tolist()

    # Rounding gives theirs one index too many now and then: the number of frames, which is no frame.
    assert list(QWEN2.sample(num_frames, fps).indices) == [index for index in second if index < num_frames]
    assert list(QWEN3.sample(num_frames, fps).indices) == third


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "expected"),
    [
        (16, 720, 1280, (704, 1280)),
        (64, 1080, 1920, (448, 832)),
        (768, 1080, 1920, (128, 224)),
        (4, 1080, 1920, (1088, 1920)),
        (4, 100, 20, (160, 32)),
    ],
)
def test_sizes_are_those_of_qwen3_vl(num_frames: int, height: int, width: int, expected: tuple[int, int]) -> None:
    plan = QWEN3.target_size(num_frames, height, width, IMAGE3)

    assert plan.resized == plan.canvas == expected
    assert plan.grid == (expected[0] // 16, expected[1] // 16)


def test_small_videos_are_enlarged_to_the_least_of_all_frames() -> None:
    rule = QWEN3.replace(min_pixels=131072, max_pixels=786432)

    assert rule.target_size(4, 240, 320, IMAGE3).canvas == (256, 320)


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 900), st.integers(8, 3000), st.integers(8, 3000), st.booleans(), st.booleans())
@example(3, 448, 512, True, False)  # three frames count as four
@example(2500, 301, 402, False, True)  # so many frames that their least size wins over the total
def test_sizes_are_those_of_transformers(num_frames: int, height: int, width: int, third: bool, cap: bool) -> None:
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    if third:
        rule = QWEN3.replace(min_pixels=128 * 32 * 32, max_pixels=32 * 32 * 768)
        theirs: Any = Qwen3VLVideoProcessor()
        rule = rule.replace(frame_pixels=768 * 32 * 32) if cap else rule
    else:
        theirs = Qwen2VLVideoProcessor()
        rule = QWEN2.replace(total_pixels=int(128000 * 28 * 28 * 0.9)) if cap else QWEN2
    image = IMAGE3 if third else IMAGE2
    assume(max(height, width) / min(height, width) <= 200)

    plan = rule.target_size(num_frames, height, width, image)

    frames = torch.empty(1, num_frames, 3, height, width, device="meta")
    resized = theirs.resize(
        frames, theirs.size, resample=None, factor=image.multiple, temporal_factor=2, cap_pixels_per_frame=cap
    )
    assert plan.canvas == tuple(resized.shape[-2:])


@pytest.mark.parametrize(
    ("num_frames", "fps", "size", "times", "step"),
    [
        (300, 30.0, 2, (0.25, 1.25, 2.25), 1.0),
        (100, 24.0, 2, (0.25, 1.2916667), 1.0416667),  # 8 of 100 frames are 1.92 a second
        (5, 2.0, 2, (0.25, 1.25), 1.25),  # 4 of 5
        (300, 30.0, 1, (0.0, 0.5), 0.5),
    ],
)
def test_times_are_the_middle_of_each_step(
    num_frames: int, fps: float, size: int, times: tuple[float, ...], step: float
) -> None:
    samples = QWEN2.sample(num_frames, fps, size)

    assert samples.times[: len(times)] == pytest.approx(times)
    assert samples.step == pytest.approx(step)


def test_an_odd_last_frame_counts_twice() -> None:
    """Frames 0, 15, 30, 45, 60 at 30 per second: 0.25, 1.25 and, of 60 and 60, 2.0."""
    rule = QWEN3.replace(fps=None)

    assert rule.sample(5, 2.0, 2).times == (0.25, 1.25, 2.0)


def test_frames_without_a_rate_are_used_as_they_are() -> None:
    samples = QWEN2.sample(7, None, 2)

    assert samples.indices == tuple(range(7))
    assert samples.times == (0.25, 1.25, 2.25, 3.0)  # taken at two per second
    assert samples.step == 1.0
    with pytest.raises(VideoError, match="769 frames are given to be used as they are; at most 768"):
        QWEN2.sample(769, None, 2)


def test_videos_that_are_none_are_refused() -> None:
    with pytest.raises(VideoError, match="no frames"):
        QWEN2.sample(0, 30)
    with pytest.raises(VideoError, match="500001 frames; at most 500000 are read"):
        QWEN2.sample(500_001, 30)
    for fps in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(VideoError, match="expected a positive number"):
            QWEN2.sample(10, fps)
    with pytest.raises(ImageError, match="aspect ratio"):
        QWEN3.target_size(4, 32, 32 * 201, IMAGE3)
    with pytest.raises(ImageError, match="nothing to see"):
        QWEN3.target_size(4, 0, 5, IMAGE3)


def test_contradicting_rules_are_refused() -> None:
    for changes, match in (
        ({"max_frames": 3}, "max_frames=3 is below min_frames=4"),
        ({"max_pixels": 5}, "max_pixels=5 is below min_pixels=100352"),
        ({"frame_pixels": 5}, "leave frame_pixels out"),
        ({"budget": "video", "total_pixels": 5}, "leave total_pixels out"),
    ):
        with pytest.raises(ConfigError, match=match):
            QWEN2.replace(**changes)


def test_json_round_trip() -> None:
    assert VideoRule.from_dict(QWEN3.to_dict()) == QWEN3
