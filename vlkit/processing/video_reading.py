"""open_video: frames, a folder of images, an animation or a video file -> how many frames, how fast, and a way to read some.

    file --container by its first bytes, PyAV--> frames that were asked for --> RGB

FFmpeg is never left to guess a format: playlists and the like, which make it open other files, are no videos here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vlkit.errors import ImageError, MissingDependencyError, VideoError, VlkitError
from vlkit.processing.image_reading import ReadRule, check_plain, open_image, path_or_bytes, read_image


class VideoSource(NamedTuple):
    """A video that was opened, not yet decoded.

    Attributes:
        num_frames: Frames in all.
        fps: Frames per second, or None where nothing says so.
        read: The frames at rising indices, in that order, as RGB images of one size.
    """

    num_frames: int
    fps: float | None
    read: Callable[[Sequence[int]], Iterator[Image.Image]]


def open_video(
    source: Any, fps: float | None = None, rule: ReadRule | None = None, *, name: str = "video"
) -> VideoSource:
    """The video behind a source.

    Args:
        source: A list of what `read_image` takes, an array or tensor [frames, h, w, c] or [frames, c, h, w], a folder of images
            (in the order of their names, numbers counted as numbers), an animated image, or an MP4, MOV, WebM, MKV or
            AVI file (these need PyAV) as `read_image` takes files.
        fps: Frames per second, if the source does not say or is not to be believed.
        rule: What is accepted, per frame.
        name: What the errors call it.

    Raises:
        VideoError: It cannot be read, or has no frames. Reading frames raises it for what is damaged, and for frames of
            different sizes.
        MissingDependencyError: A video file without PyAV.
    """
    rule = rule or ReadRule()
    try:
        source = path_or_bytes(source, rule, name)
    except ImageError as error:
        raise VideoError(str(error)) from error
    if isinstance(source, Path):
        name = f"{name} ({str(source)!r})"
        if source.is_dir():
            source = _files(source, rule)
    if isinstance(source, (Path, bytes)):
        return _from_file(source, fps, rule, name)
    if isinstance(source, Image.Image):
        return _from_animation(source, fps, rule, name)
    if isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim == 4:
        source = list(source)
    if not isinstance(source, (list, tuple)):
        what = f"an array of shape {tuple(source.shape)}" if hasattr(source, "shape") else type(source).__name__
        raise VideoError(
            f"{name}: expected a list of frames, an array [frames, h, w, c], a folder, the path or bytes of a file, or "
            f"an animation; found {what}"
        )
    frames = source
    if not frames:
        raise VideoError(f"{name}: it has no frames")

    def read(indices: Sequence[int]) -> Iterator[Image.Image]:
        for index in indices:
            try:
                yield read_image(frames[index], rule, name=f"frame {index}")
            except ImageError as error:
                raise VideoError(f"{name}: {error}") from error

    return VideoSource(len(frames), fps, _of_one_size(read, name))


def _files(folder: Path, rule: ReadRule) -> list[Path]:
    """The images of a folder, by name; 10 comes after 9."""
    known = {end for end, format in Image.registered_extensions().items() if format in rule.formats}

    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name) if part]

    return sorted((path for path in folder.iterdir() if path.suffix.lower() in known), key=order)


def _of_one_size(
    read: Callable[[Sequence[int]], Iterator[Image.Image]], name: str
) -> Callable[[Sequence[int]], Iterator[Image.Image]]:
    def checked(indices: Sequence[int]) -> Iterator[Image.Image]:
        if any(after <= before for before, after in pairwise(indices)):
            raise VideoError(f"{name}: frames are read in rising order, found {list(indices)[:10]}")
        first = None
        for index, frame in zip(indices, read(indices), strict=True):
            first = first or frame.size
            if frame.size != first:
                raise VideoError(
                    f"{name}: frame {index} is {frame.width}x{frame.height} pixels, the first {first[0]}x{first[1]}; "
                    f"resize or crop them to one size"
                )
            yield frame

    return checked


_CONTAINERS: tuple[tuple[int, tuple[bytes, ...], str], ...] = (
    # (bytes from which, what stands there, FFmpeg's name)
    (4, (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"), "mov"),
    (0, (b"\x1a\x45\xdf\xa3",), "matroska"),
    (8, (b"AVI ",), "avi"),
)
_ANIMATIONS: tuple[tuple[int, tuple[bytes, ...]], ...] = ((0, (b"GIF87a", b"GIF89a", b"\x89PNG")), (8, (b"WEBP",)))


def _from_file(source: Path | bytes, fps: float | None, rule: ReadRule, name: str) -> VideoSource:
    if isinstance(source, Path):
        try:
            check_plain(source, name)
            with source.open("rb") as file:
                head = file.read(64)
        except ImageError as error:
            raise VideoError(str(error)) from error
        except OSError as error:
            raise VideoError(f"{name}: cannot be read: {error}") from error
    else:
        head = source[:64]
    if not head:
        raise VideoError(f"{name}: the file is empty")
    if head.startswith(b"version https://git-lfs"):
        raise VideoError(f"{name}: this is a Git LFS pointer, not the video; run `git lfs pull`")
    for start, marks in _ANIMATIONS:
        if head[start:].startswith(marks):
            try:
                image = open_image(source.read_bytes() if isinstance(source, Path) else source, rule, name)
            except ImageError as error:
                raise VideoError(str(error)) from error
            return _from_animation(image, fps, rule, name)
    for start, marks, container in _CONTAINERS:
        if head[start:].startswith(marks):
            return _from_container(source, container, fps, rule, name)
    raise VideoError(f"{name}: no MP4, MOV, WebM, MKV or AVI file, and no GIF, WebP or PNG animation")


def _from_animation(image: Image.Image, fps: float | None, rule: ReadRule, name: str) -> VideoSource:
    try:
        count = getattr(image, "n_frames", 1)
        if fps is None:
            milliseconds = 0.0
            for index in range(count):
                image.seek(index)
                image.load()  # WebP says how long a frame is shown only then
                milliseconds += image.info.get("duration", 0)
            fps = count * 1000 / milliseconds if milliseconds > 0 else None
    except Exception as error:  # Pillow's plug-ins raise whatever their parser meets
        raise VideoError(f"{name}: truncated or damaged: {type(error).__name__}: {error}") from error

    def read(indices: Sequence[int]) -> Iterator[Image.Image]:
        for index in indices:
            try:
                image.seek(index)
                yield read_image(image.copy(), rule, name=f"frame {index}")
            except Exception as error:
                raise VideoError(f"{name}: frame {index}: {type(error).__name__}: {error}") from error

    return VideoSource(count, fps, _of_one_size(read, name))


def _from_container(source: Path | bytes, container: str, fps: float | None, rule: ReadRule, name: str) -> VideoSource:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            f"{name}: video files are decoded by PyAV: pip install 'vlkit[video]'; or give the frames"
        ) from error

    def opened() -> Any:
        return av.open(str(source) if isinstance(source, Path) else io.BytesIO(source), format=container)

    def broken(error: Exception) -> VlkitError:
        return VideoError(f"{name}: truncated or damaged: {type(error).__name__}: {error}")

    try:
        with opened() as file:
            if not file.streams.video:
                raise VideoError(f"{name}: the file holds no video")
            stream = file.streams.video[0]
            width, height, rate = stream.width, stream.height, fps or stream.average_rate or stream.guessed_rate
            # Matroska writes no count; packets are counted without decoding them.
            count = stream.frames or sum(packet.size > 0 for packet in file.demux(stream))
    except VideoError:
        raise
    except Exception as error:  # FFmpeg's errors have many classes
        raise broken(error) from error
    if width * height > rule.max_source_pixels:
        raise VideoError(
            f"{name}: frames of {width}x{height} pixels; at most {rule.max_source_pixels} are decoded. If you trust it, "
            f"raise ReadRule.max_source_pixels"
        )
    if not rate:
        raise VideoError(f"{name}: the file does not say how many frames it shows per second; give fps")

    def read(indices: Sequence[int]) -> Iterator[Image.Image]:
        wanted = iter(indices)
        index = next(wanted, None)
        place = -1
        try:
            with opened() as file:
                for place, frame in enumerate(file.decode(video=0)):
                    if place == index:
                        yield frame.to_image()
                        index = next(wanted, None)
                    if index is None:
                        return
        except Exception as error:
            raise broken(error) from error
        if index is not None:
            raise VideoError(
                f"{name}: frame {index} of {count} cannot be decoded, the file ends after {place + 1}: truncated or damaged"
            )

    return VideoSource(count, float(rate), _of_one_size(read, name))
