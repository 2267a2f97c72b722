"""The images and videos of a conversation: found, limited, prepared, or only measured.

parts, what came beside the messages --filled--> Visual, ... --prepare--> canvases and their tokens
                                                            --measure--> patches and tokens, from headers
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from vlkit.errors import ConfigError, ImageError, PlaceholderMismatchError, VideoError, VlkitError
from vlkit.processing.chat import Seen, Visual
from vlkit.processing.image import Canvases, prepare_image
from vlkit.processing.image_rule import ImageRule
from vlkit.processing.image_size import image_size
from vlkit.processing.processor_config import ProcessorConfig
from vlkit.processing.video import prepare_video
from vlkit.processing.video_reading import open_video
from vlkit.processing.video_rule import VideoRule


class Prepared(NamedTuple):
    """An image or video at its size, the tokens it will have, and the seconds between its time steps."""

    canvases: Canvases
    seen: Seen
    seconds: float


class Measured(NamedTuple):
    """What an image or video will be: its patches, and its tokens per time step."""

    patches: int
    seen: Seen


def beside(given: Any, kind: str, count: int, several: bool) -> list[list[Any]]:
    """The images or videos that came beside the messages, for each conversation.

    Raises:
        PlaceholderMismatchError: Not one list per conversation.
    """
    if given is None:
        return [[] for _ in range(count)]
    if not several:
        given = [given]
    elif not isinstance(given, (list, tuple)) or len(given) != count:
        found = f"{len(given)} lists of {kind}" if isinstance(given, (list, tuple)) else type(given).__name__
        raise PlaceholderMismatchError(f"{count} conversations, but {found}")
    return [list(own) if isinstance(own, (list, tuple)) else [own] for own in given]


def filled(visuals: Sequence[Visual], images: Sequence[Any], videos: Sequence[Any]) -> list[Visual]:
    """The images and videos of all parts, those without one filled from `images` and `videos` in order.

    Raises:
        PlaceholderMismatchError: Another number of images or videos than of parts without one.
    """
    given = {"image": list(images), "video": list(videos)}
    for kind, sources in given.items():
        empty = sum(visual.kind == kind and visual.source is None for visual in visuals)
        if empty != len(sources):
            raise PlaceholderMismatchError(
                f"{empty} {kind} parts hold no {kind}, {len(sources)} {kind}s were given beside the messages; put each "
                f"{kind} into its part, {{'type': '{kind}', '{kind}': ...}}, or give exactly the missing ones"
            )
    rest = {kind: iter(sources) for kind, sources in given.items()}
    return [visual._replace(source=next(rest[visual.kind])) if visual.source is None else visual for visual in visuals]


def counted(visuals: Sequence[Visual]) -> str:
    """How many there are, in words."""
    counts = [(sum(visual.kind == kind for visual in visuals), kind) for kind in ("image", "video")]
    return " and ".join(f"{count} {kind}s" for count, kind in counts if count or kind == "image")


def limited(config: ProcessorConfig, max_pixels: int | None) -> ProcessorConfig:
    """The config whose images, and each frame of whose videos, have at most so many pixels.

    A bound that the rules have already stays where it is lower; lower bounds give way.

    Raises:
        ConfigError: Less than one token, or all images have one size.
    """
    if max_pixels is None:
        return config
    if config.image.fit == "stretch":
        raise ConfigError(f"max_pixels={max_pixels}: this processor stretches all images to one size; leave it out")
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < config.image.multiple**2:
        raise ConfigError(
            f"max_pixels={max_pixels!r}: expected a whole number of at least one token, {config.image.multiple**2} pixels"
        )
    image, video = config.image, config.video
    least = None if image.min_pixels is None else min(image.min_pixels, max_pixels)
    return config.replace(
        image=image.replace(max_pixels=_least(image.max_pixels, max_pixels), min_pixels=least),
        video=None if video is None else _limited_video(video, max_pixels),
    )


def _limited_video(rule: VideoRule, max_pixels: int) -> VideoRule:
    if rule.budget == "frame":
        return rule.replace(max_pixels=min(rule.max_pixels, max_pixels), min_pixels=min(rule.min_pixels, max_pixels))
    return rule.replace(frame_pixels=_least(rule.frame_pixels, max_pixels))


def _least(bound: int | None, other: int) -> int:
    return other if bound is None else min(bound, other)


def prepare(visuals: Sequence[Visual], config: ProcessorConfig) -> list[Prepared]:
    """Read and resize all images and videos of a conversation.

    Raises:
        ImageError: An image cannot be read or does not fit the rule.
        VideoError: A video cannot be read or does not fit the rules.
    """
    rule, reading = config.image, config.reading
    prepared = []
    for visual, name in zip(visuals, _names(visuals), strict=True):
        if visual.kind == "image":
            canvases = prepare_image(visual.source, rule, reading, name=name)
            prepared.append(Prepared(canvases, Seen((rule.num_tokens(canvases.plan.grid),)), 0.0))
            continue
        video = _video_rule(config, name)
        canvases, samples = prepare_video(visual.source, rule, video, reading, fps=visual.fps, name=name)
        tokens = (rule.num_tokens(canvases.plan.grid),) * len(samples.times)
        step = 0.0 if config.chat.frames_apart else samples.step
        prepared.append(Prepared(canvases, Seen(tokens, samples.times), step))
    return prepared


def measure(visuals: Sequence[Visual], config: ProcessorConfig) -> list[Measured]:
    """What `prepare` would make of all images and videos: images by their headers, videos by theirs and one frame.

    Raises:
        ImageError: As `prepare`, but for damaged pixels.
        VideoError: The same.
    """
    rule, reading = config.image, config.reading
    measured = []
    for visual, name in zip(visuals, _names(visuals), strict=True):
        if visual.kind == "image":
            rows, columns = _fitted(image_size(visual.source, reading, name=name), rule, name)
            measured.append(Measured(rows * columns, Seen((rule.num_tokens((rows, columns)),))))
            continue
        video = _video_rule(config, name)
        opened = open_video(visual.source, visual.fps, reading, name=name)
        try:
            samples = video.sample(opened.num_frames, opened.fps, rule.frames_per_patch)
            first = next(opened.read(samples.indices[:1]))
            grid = video.target_size(len(samples.indices), first.height, first.width, rule).grid
        except VlkitError as error:
            text = str(error)
            raise VideoError(text if text.startswith(name) else f"{name}: {text}") from error
        steps = len(samples.times)
        measured.append(Measured(steps * math.prod(grid), Seen((rule.num_tokens(grid),) * steps, samples.times)))
    return measured


def _names(visuals: Sequence[Visual]) -> list[str]:
    """ "image 0", "video 0", "image 1": what errors call them."""
    numbers = {"image": 0, "video": 0}
    names = []
    for visual in visuals:
        names.append(f"{visual.kind} {numbers[visual.kind]}")
        numbers[visual.kind] += 1
    return names


def _fitted(size: tuple[int, int], rule: ImageRule, name: str) -> tuple[int, int]:
    try:
        return rule.target_size(*size).grid
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None


def _video_rule(config: ProcessorConfig, name: str) -> VideoRule:
    if config.video is None:
        raise VideoError(f"{name}: this processor has no ProcessorConfig.video, its model sees images only")
    return config.video
