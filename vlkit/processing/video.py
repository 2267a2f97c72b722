"""A video -> patches of several frames each, and when each time step was.

video --open_video, sample--> frames --resize--> canvases --patchify, frames_per_patch at a time-->
      [steps * rows * columns, 3 * T * P * P] fp32, raster order, flattened (channel, time, row, column)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vlkit.errors import VideoError, VlkitError
from vlkit.packing import Layout, Packed
from vlkit.processing.image import fresh_patches, on_canvas, write_patches
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
    image, video = image or ImageRule(frames_per_patch=2), video or VideoRule()
    opened = open_video(source, fps, reading, name=name)
    size = image.frames_per_patch
    try:
        samples = video.sample(opened.num_frames, opened.fps, size)
        frames = opened.read(samples.indices)
        first = next(frames)
        plan = video.target_size(len(samples.indices), first.height, first.width, image)
    except VideoError as error:
        text = str(error)
        raise VideoError(text if text.startswith(name) else f"{name}: {text}") from error
    except VlkitError as error:
        raise VideoError(f"{name}: {error}") from error
    layout = Layout.from_grids([(len(samples.times), *plan.grid)])
    patches = fresh_patches(layout.num_tokens, image)
    canvases = [on_canvas(first, plan, image)]
    for out in patches.chunk(len(samples.times)):
        while len(canvases) < size and (frame := next(frames, None)) is not None:
            canvases.append(on_canvas(frame, plan, image))
        write_patches(canvases, plan, image, out)
        canvases = []
    return PackedVideo(Packed(patches, layout), samples)
