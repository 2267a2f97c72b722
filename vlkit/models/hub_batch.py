"""A Batch from the padded tensors that a Hub processor emits: padding off, patches in raster order, items in text order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from vlkit.errors import LayoutError, PlaceholderMismatchError
from vlkit.layers.patch import patchify
from vlkit.packing import Batch, Layout, Packed

if TYPE_CHECKING:
    from vlkit.models.vlm import VLMConfig


class _Visual(NamedTuple):
    """One image, video or frame of a video: what stands in one run of placeholders."""

    patches: Tensor
    grid: tuple[int, int, int]
    seconds: float


def batch_from_hub(
    config: VLMConfig,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    image_grid_hws: Tensor | None = None,
    image_grid_hw: Tensor | None = None,
    pixel_values_videos: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | Sequence[float] | None = None,
    mm_token_type_ids: Tensor | None = None,
    image_flags: Tensor | None = None,
    labels: Tensor | None = None,
) -> Batch:
    """See `VisionLanguageModel.pack`, which says what each tensor is."""
    hub = config.hub_inputs
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        found = (
            f"{input_ids.dtype} {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        )
        raise LayoutError(f"input_ids must be integers [sequences, length], found {found}")
    if attention_mask is not None and bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise LayoutError(
            f"attention_mask must be 1 at tokens and 0 at padding, found {attention_mask.unique().tolist()[:4]}"
        )
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    same_shape = {
        "attention_mask": keep, "labels": labels, "image_flags": image_flags, "mm_token_type_ids": mm_token_type_ids,
    }  # fmt: skip
    for name, tensor in same_shape.items():
        if tensor is not None and tensor.shape != input_ids.shape:
            raise LayoutError(f"{name} is {list(tensor.shape)}, input_ids is {list(input_ids.shape)}")
    if image_flags is not None:
        input_ids = input_ids.masked_fill(image_flags.to(input_ids.device).bool(), config.image_token_id)
    if hub.image_span is not None:
        input_ids = _filled_spans(input_ids, hub.image_span, config.image_token_id)
    ids = Packed(input_ids[keep].long(), Layout(tuple(keep.sum(1).tolist())))
    if mm_token_type_ids is not None:
        _check_types(config, ids.tokens, mm_token_type_ids[keep])

    if second_per_grid_ts is None and video_grid_thw is not None and config.ticks_per_second is not None:
        second_per_grid_ts = [1.0] * len(video_grid_thw)  # what the published code takes where a processor is silent
    grids = {"image_grid_thw": image_grid_thw, "image_grid_hws": image_grid_hws, "image_grid_hw": image_grid_hw}
    images = list(_visuals(config, "pixel_values", pixel_values, grids, hub.patch_blocks, None))
    video_grids = {"video_grid_thw": video_grid_thw}
    videos = list(
        _visuals(config, "pixel_values_videos", pixel_values_videos, video_grids, hub.patch_blocks, second_per_grid_ts)
    )
    if hub.video_frames_apart:
        videos = [frame for video in videos for frame in _frames(video)]
    if videos and config.video_token_id is None:
        raise LayoutError("videos were given, but the model has no placeholder for them (VLMConfig.video_token_id)")
    ordered = _in_text_order(config, ids.tokens, images, videos)
    timed = second_per_grid_ts is not None and bool(videos)
    return Batch(
        ids=ids,
        patches=Packed(torch.cat([v.patches for v in ordered]), Layout.from_grids(v.grid for v in ordered))
        if ordered
        else None,
        labels=None if labels is None else labels[keep].long(),
        seconds=tuple(v.seconds for v in ordered) if timed else None,
    )


def _visuals(
    config: VLMConfig,
    name: str,
    pixels: Tensor | None,
    grids: dict[str, Tensor | None],
    blocks: int,
    seconds: Tensor | Sequence[float] | None,
) -> Iterator[_Visual]:
    """The items of one tensor of pixels, each in raster order."""
    given = {key: value for key, value in grids.items() if value is not None}
    if len(given) > 1:
        raise LayoutError(f"give {' or '.join(given)}, not both")
    if pixels is not None and not isinstance(pixels, Tensor):
        raise LayoutError(f"{name} must be a tensor, found {type(pixels).__name__}")
    if seconds is not None and not isinstance(seconds, (Sequence, Tensor)):
        raise LayoutError(f"second_per_grid_ts has one entry per video, found {seconds!r}")
    if pixels is None or not given:
        if pixels is not None and _are_images(config, pixels):
            size = config.vision.patch_size  # type: ignore[attr-defined]
            for image in pixels:
                yield _Visual(patchify(image, size), (1, image.shape[1] // size, image.shape[2] // size), 0.0)
            return
        if given or pixels is not None:
            raise LayoutError(f"{name} and {' or '.join(grids)} come together")
        return
    ((key, sides),) = given.items()
    count = 3 if key.endswith("thw") else 2
    if not isinstance(sides, Tensor) or sides.ndim != 2 or sides.shape[1] != count:
        found = list(sides.shape) if isinstance(sides, Tensor) else type(sides).__name__
        raise LayoutError(f"{key} must be a tensor [items, {count}], found {found}")
    layout = Layout.from_grids(sides.tolist())
    if layout.num_tokens != pixels.shape[0]:
        raise LayoutError(
            f"{layout.num_items} items with grids {layout.grids} make {layout.num_tokens} patches, "
            f"{name} has {pixels.shape[0]} rows"
        )
    steps = [0.0] * layout.num_items if seconds is None else [float(value) for value in seconds]
    if len(steps) != layout.num_items:
        raise LayoutError(f"second_per_grid_ts has {len(steps)} entries for {layout.num_items} videos")
    for item, (patches, grid, step) in enumerate(
        zip(Packed(pixels.flatten(1), layout).unpack(), layout.grids or (), steps, strict=True)
    ):
        yield _Visual(_raster(patches, grid, blocks, f"{name}, item {item}"), grid, step)


def _are_images(config: VLMConfig, pixels: Tensor) -> bool:
    """Whether these are whole images [images, channels, height, width]; patches say so by their grids."""
    return pixels.ndim == 4 and pixels.shape[1] == config.vision.in_channels  # type: ignore[attr-defined]


def _raster(patches: Tensor, grid: tuple[int, int, int], m: int, what: str) -> Tensor:
    """Patches listed block by block of m x m, as raster rows."""
    if m == 1:
        return patches
    t, h, w = grid
    if h % m or w % m:
        raise LayoutError(f"{what}: a grid of {h}x{w} patches has no whole blocks of {m}x{m}")
    return rearrange(patches, "(t h w a b) d -> (t h a w b) d", t=t, h=h // m, w=w // m, a=m, b=m)


def _frames(video: _Visual) -> Iterator[_Visual]:
    _, h, w = video.grid
    for patches in video.patches.split(h * w):
        yield _Visual(patches, (1, h, w), 0.0)


def _in_text_order(config: VLMConfig, ids: Tensor, images: list[_Visual], videos: list[_Visual]) -> list[_Visual]:
    """Images and videos as their placeholders follow each other; what has none comes last, and is refused by the model."""
    if not videos or not images:
        return images or videos
    rest: dict[Any, list[_Visual]] = {config.image_token_id: images[::-1], config.video_token_id: videos[::-1]}
    rows = torch.isin(ids, torch.tensor(list(rest), device=ids.device)).nonzero().squeeze(1)
    tokens = ids[rows].tolist()
    ordered: list[_Visual] = []
    place = 0
    while place < len(tokens) and rest[tokens[place]]:
        ordered.append(rest[tokens[place]].pop())
        t, h, w = config.projector.out_grid(ordered[-1].grid)  # type: ignore[attr-defined]
        place += t * h * w
    return ordered + [visual for left in rest.values() for visual in reversed(left)]


def _filled_spans(ids: Tensor, marks: tuple[int, int], placeholder: int) -> Tensor:
    """Ids with the placeholder at every place between the two marks of an image."""
    start, end = marks
    depth = (ids == start).long().cumsum(1) - (ids == end).long().cumsum(1)
    if bool(((depth < 0) | (depth > 1)).any()) or bool(depth[:, -1:].any()):
        row = int(((depth < 0) | (depth > 1)).any(1).logical_or(depth[:, -1] != 0).nonzero()[0])
        raise PlaceholderMismatchError(f"sequence {row}: its image marks {start} and {end} do not come in pairs")
    return ids.masked_fill((depth == 1) & (ids != start), placeholder)


def _check_types(config: VLMConfig, ids: Tensor, types: Tensor) -> None:
    """Token types (0 text, 1 image, 2 video) must say what the ids say."""
    want = (ids == config.image_token_id).long()
    if config.video_token_id is not None:
        want += 2 * (ids == config.video_token_id).long()
    if not torch.equal(want, types.to(want)):
        raise PlaceholderMismatchError(
            f"mm_token_type_ids marks {int((types > 0).sum())} visual tokens, the ids have {int((want > 0).sum())} placeholders "
            "or others; were they made by another processor?"
        )
