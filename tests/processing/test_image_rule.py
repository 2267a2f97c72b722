from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vlkit.errors import ConfigError, ImageError
from vlkit.processing import ImageRule
from vlkit.processing.image_fits import FITS

KIMI = ImageRule(max_aspect=None)
QWEN2 = ImageRule(fit="resize", max_patches=None, max_side=None, max_aspect=None, min_pixels=3136, max_pixels=12845056)
sides = st.integers(1, 6000)


@pytest.mark.parametrize(
    ("width", "height", "resized", "grid", "tokens", "tokens_16384"),
    [
        (1, 1, (1, 1), (2, 2), 1, 1),
        (27, 29, (29, 27), (4, 2), 2, 2),
        (300, 200, (200, 300), (16, 22), 88, 88),
        (640, 480, (480, 640), (36, 46), 414, 414),
        (896, 896, (896, 896), (64, 64), 1024, 1024),
        (897, 897, (897, 897), (66, 66), 1089, 1089),
        (1024, 1024, (897, 897), (66, 66), 1089, 1369),
        (1920, 1080, (672, 1196), (48, 86), 1032, 2691),
        (3840, 2160, (672, 1196), (48, 86), 1032, 4214),
    ],
)
def test_pad_matches_the_sizes_of_kimi_vl(
    width: int, height: int, resized: tuple[int, int], grid: tuple[int, int], tokens: int, tokens_16384: int
) -> None:
    """Computed by the published formula: whole patches are counted before padding, sides rounded up after."""
    plan = KIMI.target_size(height, width)
    large = KIMI.replace(max_patches=16384)

    assert (plan.resized, plan.grid, KIMI.num_tokens(plan.grid)) == (resized, grid, tokens)
    assert large.num_tokens(large.target_size(height, width).grid) == tokens_16384


@pytest.mark.parametrize(
    ("height", "width", "patch_size", "min_pixels", "max_pixels", "expected"),
    [
        (1080, 1920, 14, 3136, 12845056, (1092, 1932)),
        (1080, 1920, 14, 3136, 1003520, (728, 1316)),
        (720, 1280, 14, 200704, 937664, (728, 1288)),
        (1440, 2560, 14, 78400, 12845056, (1428, 2548)),
        (2400, 1080, 14, 3136, 12845056, (2408, 1092)),
        (98, 98, 14, 3136, 12845056, (112, 112)),  # 3.5 rounds to 4
        (42, 70, 14, 3136, 12845056, (56, 56)),  # 1.5 to 2, 2.5 to 2
        (20, 30, 14, 3136, 12845056, (56, 84)),
        (10, 10, 14, 3136, 12845056, (56, 56)),
        (1, 1, 14, 3136, 12845056, (56, 56)),
        (190, 1, 14, 3136, 12845056, (784, 28)),
        (27, 27, 14, 3136, 12845056, (56, 56)),
        (1, 150, 14, 3136, 1003520, (28, 700)),
        (14, 1000, 14, 3136, 12845056, (28, 476)),  # the short side rounds to nothing, so the whole is scaled
        (1080, 1920, 16, 65536, 16777216, (1088, 1920)),
    ],
)
def test_resize_matches_the_sizes_of_qwen2_vl(
    height: int, width: int, patch_size: int, min_pixels: int, max_pixels: int, expected: tuple[int, int]
) -> None:
    rule = QWEN2.replace(patch_size=patch_size, min_pixels=min_pixels, max_pixels=max_pixels)

    plan = rule.target_size(height, width)

    assert plan.resized == plan.canvas == expected


@settings(deadline=None)
@given(sides, sides, st.sampled_from([28, 32]), st.integers(1, 64), st.integers(0, 20_000))
def test_resize_matches_the_function_in_transformers(
    height: int, width: int, multiple: int, least: int, more: int
) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    least, most = least * multiple**2, (least + more) * multiple**2
    rule = QWEN2.replace(patch_size=multiple // 2, min_pixels=least, max_pixels=most)
    assume(max(height, width) / min(height, width) <= 200)
    expected = smart_resize(height, width, multiple, least, most)
    assume(expected[0] * expected[1] <= most)  # for thin images theirs can be larger than it was told

    assert rule.target_size(height, width).resized == expected


ANDES = ImageRule(
    fit="letterbox",
    max_patches=None,
    max_side=None,
    max_aspect=None,
    min_pixels=4 * 28**2,
    max_pixels=1792**2,
    longest=4172,
    mean=(0.48145466, 0.4578275, 0.40821073),
)
ANDES_CHAT = ANDES.replace(fit="letterbox-chat")


@pytest.mark.parametrize(
    ("width", "height", "chat_733", "chat_1792", "evaluated"),
    [
        (560, 560, (588, 588, 441), (588, 588, 441), (560, 560, 400)),
        (640, 480, (644, 504, 414), (644, 504, 414), (644, 504, 414)),
        (1920, 1080, (980, 560, 700), (1932, 1092, 2691), (1932, 1092, 2691)),
        (28, 28, (84, 84, 9), (84, 84, 9), (56, 56, 4)),
        (733, 733, (756, 756, 729), (756, 756, 729), (756, 756, 729)),
        (1792, 1792, (756, 756, 729), (1820, 1820, 4225), (1792, 1792, 4096)),
        (4172, 4172, (756, 756, 729), (1820, 1820, 4225), (1792, 1792, 4096)),
        (10, 3000, (28, 3024, 108), (28, 3024, 108), (28, 3024, 108)),
        (5000, 20, (4200, 28, 150), (4200, 28, 150), (4172, 28, 149)),
    ],
)
def test_letterboxes_match_the_sizes_of_andesvl(
    width: int,
    height: int,
    chat_733: tuple[int, int, int],
    chat_1792: tuple[int, int, int],
    evaluated: tuple[int, int, int],
) -> None:
    """Canvas width, height and tokens, by the evaluation code and by the `chat` of the repositories."""
    rules = (ANDES_CHAT.replace(max_pixels=733**2), ANDES_CHAT, ANDES)
    for rule, expected in zip(rules, (chat_733, chat_1792, evaluated), strict=True):
        plan = rule.target_size(height, width)
        assert (plan.canvas[1], plan.canvas[0], rule.num_tokens(plan.grid)) == expected


@pytest.mark.parametrize(
    ("width", "height", "resized", "offset"),
    [
        (560, 560, (560, 560), (0, 0)),  # aligned: nothing is resampled
        (640, 480, (483, 644), (10, 0)),  # 644/640 both ways; 504 - 483 = 21, half of it truncated
        (10, 3000, (3024, 10), (0, 8)),
        (503, 480, (480, 503), (11, 0)),  # half of 23.05, of the unrounded height, truncated
        (28, 28, (56, 56), (0, 0)),
    ],
)
def test_a_letterbox_is_centred(width: int, height: int, resized: tuple[int, int], offset: tuple[int, int]) -> None:
    assert ANDES.target_size(height, width)[0:3:2] == (resized, offset)


def test_the_chat_letterbox_never_exceeds_what_patches_of_16_pixels_cover() -> None:
    """4172 is a multiple of 28 but not of 32: there the sides end at 4160."""
    rule = ANDES_CHAT.replace(patch_size=16, min_pixels=4 * 32**2)

    assert rule.target_size(771, 4172).canvas == (800, 4160)
    assert rule.background == (122, 116, 104)
    assert rule.replace(mean=(0.5, 0.5, 0.5)).background == (127, 127, 127)
    assert KIMI.replace(mean=(0.48145466, 0.4578275, 0.40821073)).background == (0, 0, 0)


def test_stretch_is_one_square_for_all() -> None:
    rule = ImageRule(fit="stretch", merge_size=1, max_side=32, tokens_per_image=256)

    for height, width in ((448, 448), (1, 100), (900, 50)):
        assert rule.target_size(height, width) == ((448, 448), (448, 448), (0, 0), (32, 32))
    assert rule.num_tokens((32, 32)) == 256
    with pytest.raises(ConfigError, match=r"squares of max_side patches.*found max_side=None"):
        rule.replace(max_side=None)


def test_every_fit_has_a_name() -> None:
    assert set(get_args(get_type_hints(ImageRule)["fit"])) == set(FITS)


def test_frames_count_in_the_patch() -> None:
    assert ImageRule(patch_size=14, frames_per_patch=2).patch_dim == 1176


@settings(deadline=None)
@given(sides, sides, st.sampled_from([8, 14, 16]), st.integers(1, 4), st.sampled_from(sorted(FITS)))
def test_both_sides_of_a_grid_can_be_merged(
    height: int, width: int, patch_size: int, merge_size: int, fit: str
) -> None:
    side = merge_size * 7 if fit == "stretch" else None
    longest = 4172 if fit.startswith("letterbox") else None
    rule = ImageRule(
        patch_size=patch_size,
        merge_size=merge_size,
        fit=fit,  # type: ignore[arg-type]
        max_aspect=None,
        max_side=side,
        longest=longest,
        min_pixels=4 * (patch_size * merge_size) ** 2,
        max_pixels=1792**2,
    )

    plan = rule.target_size(height, width)

    assert all(side % merge_size == 0 and side >= merge_size for side in plan.grid)
    assert plan.canvas == (plan.grid[0] * patch_size, plan.grid[1] * patch_size)
    assert all(r + o <= c for r, o, c in zip(plan.resized, plan.offset, plan.canvas, strict=True))


@settings(deadline=None)
@given(sides, sides, st.integers(784, 300_000), st.integers(0, 400_000), st.sampled_from(["pad", "resize"]))
def test_no_canvas_is_larger_than_max_pixels(height: int, width: int, least: int, more: int, fit: str) -> None:
    rule = ImageRule(fit=fit, min_pixels=least, max_pixels=least + more, max_aspect=None, max_side=None)

    plan = rule.target_size(height, width)

    assert plan.canvas[0] * plan.canvas[1] <= least + more


@settings(deadline=None)
@given(sides, sides, st.integers(1, 100_000), st.sampled_from(["pad", "resize"]))
def test_small_images_are_enlarged_to_min_pixels(height: int, width: int, least: int, fit: str) -> None:
    rule = ImageRule(fit=fit, min_pixels=least, max_aspect=None, max_side=None)

    plan = rule.target_size(height, width)

    assert plan.canvas[0] * plan.canvas[1] >= least


@settings(deadline=None)
@given(sides, sides)
def test_padding_keeps_the_aspect_ratio_to_one_pixel(height: int, width: int) -> None:
    rows, columns = ImageRule(max_aspect=None, max_side=None).target_size(height, width).resized

    assert abs(rows * width - columns * height) <= width + height  # truncation moves each side by less than one pixel


@settings(deadline=None)
@given(st.integers(28, 6000), st.integers(28, 6000))
def test_resizing_changes_the_aspect_ratio_by_the_rounding_of_its_sides_only(height: int, width: int) -> None:
    rows, columns = QWEN2.target_size(height, width).resized

    # Each side is off by less than one multiple of 28 from a common scale.
    low = max((rows - 28) / height, (columns - 28) / width)
    high = min((rows + 28) / height, (columns + 28) / width)
    assert low <= high


def test_images_are_not_enlarged_by_the_soft_limit() -> None:
    assert KIMI.target_size(30, 50).resized == (30, 50)


def test_the_soft_limit_can_be_exceeded_by_rounding_up_only() -> None:
    """Buffers must be sized from the grid, not from max_patches: 4356 patches at a limit of 4096."""
    rows, columns = KIMI.target_size(1024, 1024).grid

    assert rows * columns == 4356


def test_a_side_beyond_the_position_table_is_refused() -> None:
    assert KIMI.target_size(10, 511 * 14 - 14).grid == (2, 510)
    with pytest.raises(ImageError, match="grid of 2x512 patches; a side may have 511"):
        KIMI.target_size(10, 511 * 14)


def test_the_aspect_limit_includes_its_bound() -> None:
    ImageRule().target_size(1, 200)
    with pytest.raises(ImageError, match=r"402x2 pixels .* aspect ratio 201; the limit is 200"):
        ImageRule().target_size(2, 402)


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="0x5 pixels"):
        ImageRule().target_size(5, 0)


def test_contradicting_budgets_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_pixels=783 is below one token of 28x28"):
        ImageRule(max_pixels=783)
    with pytest.raises(ConfigError, match="max_pixels=1000 is below min_pixels=2000"):
        ImageRule(max_pixels=1000, min_pixels=2000)
    with pytest.raises(ConfigError, match="'torch' has no filter 'lanczos'"):
        ImageRule(resample="lanczos", resampler="torch")
    with pytest.raises(ConfigError, match="longest=27 is below one token of 28 pixels"):
        ImageRule(longest=27)
    with pytest.raises(ConfigError, match="std"):
        ImageRule(std=(0.5, 0.0, 0.5))


def test_json_round_trip() -> None:
    rule = QWEN2.replace(mean=(0.1, 0.2, 0.3))

    assert ImageRule.from_dict(rule.to_dict()) == rule
    assert math.isclose(rule.to_dict()["mean"][2], 0.3)
