"""What happens to samples before they are batches, and to batches that are too long.

    sample --images_first--> the same with its images before its text
    batch --cut--> its first tokens, never part of an image

All of it is a function of its arguments: what is drawn comes from the generator that is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vlkit.errors import PlaceholderMismatchError, SequenceTooLongError
from vlkit.packing import Batch, Layout, Packed
from vlkit.processing import Processor
from vlkit.training.samples import holds_image, is_image, parts_of

Sample = dict[str, Any]


def images_first(
    sample: Sample, rng: np.random.Generator, probability: float = 0.5, *, tag: str = "<image {number}>"
) -> Sample:
    """With some probability, all images before the text, in their order, with an index left where each was.

    They go to the beginning of the first question. A decoder that looks back only then has seen every image when it reads about
    it. One number is drawn per sample, whatever is in it; images that lie there already stay, without an index.

    Args:
        tag: Ordinary text, with "{number}" counting from 1.

    Source: AndesVL, arXiv:2510.11496, joint pre-training: 50 % of the interleaved samples.
    """
    moved = bool(rng.random() < probability)
    messages = sample.get("messages", [])
    front = next((index for index, message in enumerate(messages) if message.get("role") == "user"), None)
    if not moved or front is None or _lie_in_front(messages, front):
        return sample
    images: list[Any] = []

    def indexed(part: Any) -> Any:
        if not is_image(part):
            return part
        images.append(part)
        return {"type": "text", "text": tag.replace("{number}", str(len(images)))}

    changed = [
        {**message, "content": [indexed(part) for part in parts_of(message)]} if holds_image(message) else message
        for message in messages
    ]
    changed[front] = {**changed[front], "content": [*images, *parts_of(changed[front])]}
    return {**sample, "messages": changed}


def _lie_in_front(messages: Sequence[Mapping[str, Any]], front: int) -> bool:
    """Whether there are no images but for those that the first question begins with."""
    kinds = [is_image(part) for part in parts_of(messages[front])]
    behind = kinds[kinds.index(False) :] if False in kinds else []
    elsewhere = any(holds_image(message) for index, message in enumerate(messages) if index != front)
    return not any(behind) and not elsewhere


def cut(batch: Batch, max_tokens: int, processor: Processor) -> Batch:
    """The batch with at most so many tokens of every sequence, and no part of an image.

    A cut that would go through an image, or through what opens and closes it, goes before it; its patches and the seconds of a
    video go with it. Where every frame of a video is an item of its own, so is it here. Labels and positions follow the
    tokens, so that a sequence may be left without a label.

    Args:
        processor: What made the batch.

    Raises:
        SequenceTooLongError: A sequence begins with an image that does not fit.
        PlaceholderMismatchError: The patches are not those of the placeholders.
        ValueError: max_tokens is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: at least one token stays")
    if batch.ids.layout.max_length <= max_tokens:
        return batch
    spans = _visual_spans(batch, processor)
    ends, kept_items = [], []
    for sequence, (start, length) in enumerate(zip(batch.ids.layout.offsets, batch.ids.layout.lengths, strict=False)):
        end = start + min(length, max_tokens)
        for first, last in reversed(spans):  # the cut may fall into what closes one image and then into the one before
            end = first if first < end < last and end < start + length else end
        if end <= start:
            raise SequenceTooLongError(
                f"sequence {sequence} begins with an image that does not fit into {max_tokens} tokens; lower the limits of "
                "the image rule, or leave the sample out"
            )
        ends.append(end)
        kept_items += [item for item, (first, last) in enumerate(spans) if start <= first and last <= end]
    starts = batch.ids.layout.offsets
    kept = torch.cat([torch.arange(start, end) for start, end in zip(starts, ends, strict=False)])
    patches, seconds = None, None
    if batch.patches is not None and kept_items:
        places, layout = batch.patches.layout.offsets, batch.patches.layout
        assert layout.grids is not None
        patches = Packed(
            torch.cat([batch.patches.tokens[places[item] : places[item + 1]] for item in kept_items]),
            Layout.from_grids(layout.grids[item] for item in kept_items),
        )
        seconds = None if batch.seconds is None else tuple(batch.seconds[item] for item in kept_items)
    return Batch(
        ids=Packed(
            batch.ids.tokens[kept], Layout(tuple(end - start for start, end in zip(starts, ends, strict=False)))
        ),
        patches=patches,
        labels=None if batch.labels is None else batch.labels[kept],
        positions=None if batch.positions is None else batch.positions[kept],
        seconds=seconds,
    )


def _visual_spans(batch: Batch, processor: Processor) -> list[tuple[int, int]]:
    """From where to where the tokens of each item of patches stand, with what opens and closes them."""
    rule, chat = processor.config.image, processor.config.chat
    kinds = {processor.image_token_id, processor.video_token_id}
    places = [place for place, id in enumerate(batch.ids.tokens.tolist()) if id in kinds]
    grids = () if batch.patches is None else batch.patches.layout.grids or ()
    counts = [time * rule.num_tokens((rows, columns)) for time, rows, columns in grids]
    if sum(counts) != len(places):
        raise PlaceholderMismatchError(
            f"{len(places)} placeholders, but the patches become {sum(counts)} tokens; was the batch made by this processor?"
        )
    opening = [
        _marks(processor, text, front=True) for text in (chat.image_prefix, chat.video_prefix, chat.frame_prefix)
    ]
    closing = [
        _marks(processor, text, front=False) for text in (chat.image_suffix, chat.video_suffix, chat.frame_suffix)
    ]
    ids = batch.ids.tokens.tolist()
    spans, done = [], 0
    for count in counts:
        first, last = places[done], places[done + count - 1] + 1
        done += count
        before = max((len(each) for each in opening if ids[max(first - len(each), 0) : first] == each), default=0)
        after = max((len(each) for each in closing if ids[last : last + len(each)] == each), default=0)
        spans.append((first - before, last + after))
    return spans


def _marks(processor: Processor, text: str, *, front: bool) -> list[int]:
    """Ids of what the format writes beside an image; the special ones next to it where a number is in it."""
    ids = processor.tokenizer.encode(text, True)
    if "{" not in text:
        return ids
    special = set(processor.tokenizer.special.values())
    near = ids[::-1] if front else ids
    kept = near[: next((i for i, id in enumerate(near) if id not in special), len(near))]
    return kept[::-1] if front else kept
