"""VideoRule: which frames of a video are seen, and at what size.

(frames in all, frames per second) --sample--> indices of frames
(frames taken, height, width) --target_size--> ResizePlan of every frame
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import numpy as np

from vlkit.config import AtLeast, Config, Positive, Size
from vlkit.errors import ConfigError, ImageError, VideoError
from vlkit.processing.image_fits import ResizePlan
from vlkit.processing.image_rule import ImageRule


class Samples(NamedTuple):
    """Frames taken from a video.

    Attributes:
        indices: Their places in the video, from 0; rising, and as many as are taken.
        times: Seconds from the start of the video, per time step of the patches: the middle of its frames.
        step: Seconds from one time step to the next.
    """

    indices: tuple[int, ...]
    times: tuple[float, ...]
    step: float


class VideoRule(Config):
    """How a video becomes frames. Patch and merge size are those of the image rule.

    Attributes:
        fps: Frames taken per second of video; None takes all.
        min_frames: Fewest frames taken, if the video has them.
        max_frames: Most frames taken. A video that has more is sampled more thinly.
        multiple: The count of frames is rounded down to a multiple of this, if the video has that many.
        spacing: "steps" takes every n-th frame from the first on (Qwen2-VL), "ends" spreads them evenly from the first
            to the last (Qwen3-VL).
        min_pixels: Smaller frames are enlarged to at least this, in pixels.
        max_pixels: Larger frames are shrunk to at most this, in pixels.
        budget: Whether min_pixels and max_pixels are of one "frame" or of all frames of the "video" together.
        total_pixels: With a budget per frame: bound of all frames together in pixels, or None. It counts a patch of
            several frames once, and gives way to 1.05 * min_pixels.
        frame_pixels: With a budget of the video: bound of each frame in pixels, or None; gives way likewise.
        mean: Statistics of frames where they differ from those of images, else None.
        std: The same.
        resample: Filter of the resize where it differs from that of images, else None.
        max_source_frames: Videos of more frames are refused before they are decoded.
    """

    fps: Positive | None = 2.0
    min_frames: Size = 4
    max_frames: Size = 768
    multiple: Size = 2
    spacing: Literal["steps", "ends"] = "steps"
    min_pixels: Size = 128 * 28 * 28
    max_pixels: Size = 768 * 28 * 28
    budget: Literal["frame", "video"] = "frame"
    total_pixels: Size | None = None
    frame_pixels: Size | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    resample: Literal["bicubic", "bilinear", "lanczos"] | None = None
    max_source_frames: Annotated[int, AtLeast(1)] = 500_000

    def check(self) -> None:
        if self.max_frames < max(self.min_frames, self.multiple):
            raise ConfigError(
                f"VideoRule: max_frames={self.max_frames} is below min_frames={self.min_frames} or "
                f"multiple={self.multiple}"
            )
        if self.max_pixels < self.min_pixels:
            raise ConfigError(f"VideoRule: max_pixels={self.max_pixels} is below min_pixels={self.min_pixels}")
        if self.total_pixels is not None and self.budget == "video":
            raise ConfigError("VideoRule: with budget 'video' max_pixels is the total; leave total_pixels out")
        if self.frame_pixels is not None and self.budget == "frame":
            raise ConfigError("VideoRule: with budget 'frame' max_pixels is a frame's; leave frame_pixels out")

    def sample(self, num_frames: int, fps: float | None, frames_per_patch: int = 1) -> Samples:
        """The frames to take.

        Args:
            num_frames: Frames of the video.
            fps: Its frames per second. None where frames were taken already: then all are used, and count as taken at
                `VideoRule.fps`.
            frames_per_patch: Frames of one time step; the last frame is repeated to fill the last one.

        Raises:
            VideoError: No frames, more than max_source_frames, or a rate that is no positive number.

        Matches: the video processors of Qwen2-VL and Qwen3-VL in transformers, on the tables in tests.
        """
        if num_frames < 1:
            raise VideoError("it has no frames")
        if num_frames > self.max_source_frames:
            raise VideoError(
                f"it has {num_frames} frames; at most {self.max_source_frames} are read. Cut it, or raise "
                f"VideoRule.max_source_frames"
            )
        if fps is not None and not 0 < fps < math.inf:
            raise VideoError(f"{fps} frames per second; expected a positive number")
        rate = fps or self.fps or 1.0
        if fps is None or self.fps is None:
            if num_frames > self.max_frames:
                raise VideoError(
                    f"{num_frames} frames are given to be used as they are; at most {self.max_frames} are. Give their "
                    f"frames per second to have them sampled, or raise VideoRule.max_frames"
                )
            indices = list(range(num_frames))
        else:
            indices = self._spread(num_frames, num_frames / fps * self.fps)
        filled = indices + [indices[-1]] * (-len(indices) % frames_per_patch)
        steps = [filled[start : start + frames_per_patch] for start in range(0, len(filled), frames_per_patch)]
        times = tuple((step[0] / rate + step[-1] / rate) / 2 for step in steps)
        taken_per_second = len(indices) / num_frames * rate
        return Samples(tuple(indices), times, frames_per_patch / taken_per_second)

    def _spread(self, num_frames: int, wanted: float) -> list[int]:
        count = int(min(max(wanted, self.min_frames), self.max_frames, num_frames))
        if count > self.multiple:
            count -= count % self.multiple
        if self.spacing == "ends":
            return [int(index) for index in np.linspace(0, num_frames - 1, count).round()]
        return [index * num_frames // count for index in range(count)]

    def target_size(self, num_frames: int, height: int, width: int, image: ImageRule) -> ResizePlan:
        """What happens to every frame of a video.

        Args:
            num_frames: Frames taken.
            height: Of a frame, in pixels.
            width: Of a frame, in pixels.
            image: Patch size, merge size and limits of the aspect ratio.

        Raises:
            ImageError: The image rule refuses such a frame.

        Matches: as `sample`.
        """
        if self.budget == "frame":
            most = self.max_pixels
            if self.total_pixels is not None:
                share = self.total_pixels * image.frames_per_patch // num_frames
                most = max(min(most, share), int(self.min_pixels * 1.05))
            rule = image.replace(fit="resize", max_patches=None, min_pixels=self.min_pixels, max_pixels=most)
            return rule.target_size(height, width)
        if height < 1 or width < 1:
            raise ImageError(f"frames of {width}x{height} pixels (width x height) have nothing to see")
        b = image.multiple
        most = self.max_pixels
        if self.frame_pixels is not None:
            most = max(min(self.frame_pixels, most // num_frames), int(self.min_pixels * 1.05)) * num_frames
        if height < b or width < b:
            scale = max(b / height, b / width)
            height, width = int(height * scale), int(width * scale)
        aspect = max(height, width) / min(height, width)
        if image.max_aspect is not None and aspect > image.max_aspect:
            raise ImageError(
                f"frames of {width}x{height} pixels (width x height) have aspect ratio {aspect:.6g}; the limit is "
                f"{image.max_aspect:.6g}"
            )
        rows, columns = round(height / b) * b, round(width / b) * b
        # Python's round, as published: 3 frames count as 4, 5 as 4.
        frames = round(num_frames / image.frames_per_patch) * image.frames_per_patch
        if frames * rows * columns > most:
            scale = math.sqrt(num_frames * height * width / most)
            rows, columns = (max(b, math.floor(side / scale / b) * b) for side in (height, width))
        elif frames * rows * columns < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (num_frames * height * width))
            rows, columns = (math.ceil(side * scale / b) * b for side in (height, width))
        canvas = rows, columns
        return ResizePlan(canvas, canvas, (0, 0), (rows // image.patch_size, columns // image.patch_size))
