from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.errors import MissingDependencyError, VideoError
from vlkit.processing import ImageRule, ReadRule, VideoRule, pack_images, pack_video
from vlkit.processing.video_reading import open_video

IMAGE = ImageRule(patch_size=4, frames_per_patch=2, fit="resize", max_patches=None, min_pixels=64, max_pixels=4096)
VIDEO = VideoRule(min_pixels=64, max_pixels=4096, fps=2.0)


def clip(num_frames: int, height: int = 20, width: int = 31, seed: int = 0) -> list[Image.Image]:
    values = np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in values]


def test_every_patch_holds_its_place_in_both_frames() -> None:
    """Against still images: time steps in order, and inside a patch channel, time, row, column."""
    frames = clip(4)

    packed = pack_video(frames, IMAGE, VIDEO).patches

    still = pack_images(frames, IMAGE.replace(frames_per_patch=1))
    assert still.layout.grids is not None
    rows, columns = still.layout.grids[0][1:]
    assert packed.layout.grids == ((2, rows, columns),)
    got = packed.tokens.view(2, rows * columns, 3, 2, 4, 4)
    alone = torch.stack(still.unpack()).view(2, 2, rows * columns, 3, 4, 4)
    for step, time in itertools.product(range(2), range(2)):
        assert torch.equal(got[step, :, :, time], alone[step, time])


def test_an_odd_last_frame_stands_twice() -> None:
    frames = clip(3)

    odd, even = pack_video(frames, IMAGE, VIDEO), pack_video([*frames, frames[2]], IMAGE, VIDEO)

    assert torch.equal(odd.patches.tokens, even.patches.tokens)
    assert odd.patches.layout == even.patches.layout
    assert odd.samples.indices == (0, 1, 2)


def test_frames_are_sampled_where_the_rate_is_known() -> None:
    frames = clip(60)

    packed = pack_video(frames, IMAGE, VIDEO, fps=15)

    assert packed.samples.indices == (0, 7, 15, 22, 30, 37, 45, 52)
    chosen = pack_video([frames[index] for index in packed.samples.indices], IMAGE, VIDEO)
    assert torch.equal(packed.patches.tokens, chosen.patches.tokens)


def test_all_sources_of_frames_are_the_same_video(tmp_path: Path) -> None:
    frames = clip(11)
    array = np.stack([np.asarray(frame) for frame in frames])
    for index, frame in enumerate(frames):
        frame.save(tmp_path / f"frame{index}.png")  # frame10 follows frame9
    (tmp_path / "notes.txt").write_text("not a frame")
    expected = pack_video(frames, IMAGE, VIDEO).patches

    sources: list[Any] = [tuple(frames), array, torch.from_numpy(array).permute(0, 3, 1, 2), tmp_path, str(tmp_path)]
    for source in sources:
        assert torch.equal(pack_video(source, IMAGE, VIDEO).patches.tokens, expected.tokens)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_a_video(format: str, tmp_path: Path) -> None:
    frames = clip(6)
    file = tmp_path / "animation"
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(file, format, save_all=True, append_images=frames[1:], duration=250, **options)

    opened = open_video(file)

    assert opened.num_frames == 6
    assert opened.fps == pytest.approx(4.0)
    seen = list(opened.read([1, 5]))
    if format != "GIF":  # a palette of 256 colours loses some
        np.testing.assert_array_equal(np.asarray(seen[0]), np.asarray(frames[1]))
        np.testing.assert_array_equal(np.asarray(seen[1]), np.asarray(frames[5]))
    content = file.read_bytes()
    assert open_video(content).num_frames == open_video(Image.open(io.BytesIO(content))).num_frames == 6


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ([], "video: it has no frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), "it has no frames"),
        ([*clip(2), *clip(1, 21, 31)], r"frame 2 is 31x21 pixels, the first 31x20"),
        ([*clip(1), np.full((20, 31, 3), np.nan)], "video: frame 1: .*NaN"),
        (np.zeros((20, 31, 3), np.uint8), r"found an array of shape \(20, 31, 3\)"),
        (7, "found int"),
        (b"", "the file is empty"),
        (b"junk that is no video", "no MP4, MOV, WebM, MKV or AVI file"),
        (b"#EXTM3U\n#EXT-X-VERSION:3\nfile:///etc/passwd\n", "no MP4"),  # a playlist would open other files
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"GIF89a\x00", "video"),
        ("https://example.org/a.mp4", "is an address"),
        ("no/such/file.mp4", "cannot be read"),
        ([*clip(1, 1, 201)], "video: an image of 201x1 pixels"),
    ],
)
def test_what_is_no_video_is_refused(source: Any, match: str) -> None:
    with pytest.raises(VideoError, match=match):
        pack_video(source, IMAGE, VIDEO)


def test_errors_name_the_video() -> None:
    with pytest.raises(VideoError, match=r"^video 3: it has no frames$"):
        pack_video([], IMAGE, VIDEO, name="video 3")
    with pytest.raises(VideoError, match=r"^video 3: 5 frames are given .* at most 4 are"):
        pack_video(clip(5), IMAGE, VIDEO.replace(max_frames=4), name="video 3")


def test_an_empty_folder_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no frames"):
        pack_video(tmp_path, IMAGE, VIDEO)


def test_a_file_without_the_decoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)

    with pytest.raises(MissingDependencyError, match=r"pip install 'vlkit\[video\]'"):
        open_video(b"\x00\x00\x00\x20ftypisom" + bytes(50))


def encoded(container: str, codec: str, num_frames: int = 30, rate: int = 10) -> bytes:
    """A video whose frame k has the grey level 8k."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(num_frames):
            grey = np.full((48, 64, 3), 8 * index, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "mpeg4"), ("mov", "mpeg4"), ("webm", "vp8"), ("matroska", "mpeg4"), ("avi", "mpeg4")],
)
def test_video_files_are_decoded(container: str, codec: str, tmp_path: Path) -> None:
    content = encoded(container, codec)
    (tmp_path / "clip").write_bytes(content)

    for source in (content, tmp_path / "clip"):
        opened = open_video(source)
        assert (opened.num_frames, opened.fps) == (30, pytest.approx(10.0))
        packed = pack_video(source, IMAGE, VIDEO)
        assert packed.samples.indices == (0, 5, 10, 15, 20, 25)
    frames = list(opened.read([0, 7, 29]))
    assert [frame.size for frame in frames] == [(64, 48)] * 3
    levels = [int(np.asarray(frame).mean()) for frame in frames]
    np.testing.assert_allclose(levels, [0, 56, 232], atol=8)


def test_damaged_video_files_are_refused() -> None:
    content = encoded("mp4", "mpeg4")

    for broken in (content[: len(content) // 3], content[:40] + bytes(len(content) - 40)):
        with pytest.raises(VideoError, match="truncated or damaged"):
            pack_video(broken, IMAGE, VIDEO)
    with pytest.raises(VideoError, match="64x48 pixels; at most 100 are decoded"):
        pack_video(content, IMAGE, VIDEO, ReadRule(max_source_pixels=100))
    with pytest.raises(VideoError, match="30 frames; at most 29 are read"):
        pack_video(content, IMAGE, VIDEO.replace(max_source_frames=29))


def test_what_was_cut_from_a_stream_is_not_missed() -> None:
    """Matroska and WebM are made to be cut: nothing in them says how long they were."""
    content = encoded("matroska", "mpeg4")

    assert 0 < open_video(content[: len(content) // 2]).num_frames < 30
