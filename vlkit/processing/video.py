"""A video -> patches of several frames each, and when each time step was.

video --open_video, sample--> frames --resize--> canvases --patchify, frames_per_patch at a time-->
      [steps * rows * columns, 3 * T * P * P] fp32, raster order, flattened (channel, time, row, column)
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

from vlkit.errors import VideoError, VlkitError
from vlkit.packing import Packed
from vlkit.processing.image import Canvases, on_canvas, pack_canvases
from vlkit.processing.image_reading import ReadRule
from vlkit.processing.image_rule import ImageRule
from vlkit.processing.video_reading import open_video
from vlkit.processing.video_rule import Samples, VideoRule


class PackedVideo(NamedTuple):
    """A video as a tower takes it.

    Attributes:
        patches: One item, its grid is (time, rows, columns).
        samples: Which frames were taken, and when they were.
    """

    patches: Packed
    samples: Samples


def pack_video(
    source: Any,
    image: ImageRule | None = None,
    video: VideoRule | None = None,
    reading: ReadRule | None = None,
    *,
    fps: float | None = None,
    name: str = "video",
) -> PackedVideo:
    """Normalised patches of one video; an odd last frame stands twice.

    Args:
        source: Whatever `open_video` takes.
        fps: Frames per second of the source, if it does not say itself. Frames without a rate are used as they are.
        name: What the errors call it.

    Raises:
        VideoError: The video cannot be read or does not fit the rules.
        MissingDependencyError: A video file without PyAV.
    """
    image = image or ImageRule(frames_per_patch=2)
    canvases, samples = prepare_video(source, image, video or VideoRule(), reading, fps=fps, name=name)
    return PackedVideo(pack_canvases([canvases], image), samples)


def prepare_video(
    source: Any,
    image: ImageRule,
    video: VideoRule,
    reading: ReadRule | None = None,
    *,
    fps: float | None = None,
    name: str = "video",
) -> tuple[Canvases, Samples]:
    """The frames taken from a video at their size, before they become floats; see `pack_video`."""
    opened = open_video(source, fps, reading, name=name)
    try:
        samples = video.sample(opened.num_frames, opened.fps, image.frames_per_patch)
        frames = opened.read(samples.indices)
        first = next(frames)
        plan = video.target_size(len(samples.indices), first.height, first.width, image)
        own = {name: getattr(video, name) or getattr(image, name) for name in ("mean", "std", "resample")}
        rule = image.replace(**own)
        return Canvases([on_canvas(frame, plan, rule) for frame in chain([first], frames)], plan, rule), samples
    except VlkitError as error:
        text = str(error)
        raise VideoError(text if text.startswith(name) else f"{name}: {text}") from error
