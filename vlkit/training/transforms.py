"""What happens to samples before they are batches, and to batches that are too long.

    sample --images_first--> the same with its images before its text
    samples of one screenshot --join_groundings--> conversations of many turns that show it once
    batch --cut--> its first tokens, never part of an image

All of it is a function of its arguments: what is drawn comes from the generator that is given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vlkit.errors import PlaceholderMismatchError, SequenceTooLongError
from vlkit.packing import Batch, Layout, Packed
from vlkit.processing import Processor

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
    front = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if not moved or front is None or _lie_in_front(messages, front):
        return sample
    images: list[Any] = []

    def indexed(part: Any) -> Any:
        if not _is_image(part):
            return part
        images.append(part)
        return {"type": "text", "text": tag.replace("{number}", str(len(images)))}

    changed = [
        {**message, "content": [indexed(part) for part in _parts(message)]} if _holds_image(message) else message
        for message in messages
    ]
    changed[front] = {**changed[front], "content": [*images, *_parts(changed[front])]}
    return {**sample, "messages": changed}


def _lie_in_front(messages: Sequence[Mapping[str, Any]], front: int) -> bool:
    """Whether there are no images but for those that the first question begins with."""
    kinds = [_is_image(part) for part in _parts(messages[front])]
    behind = kinds[kinds.index(False) :] if False in kinds else []
    elsewhere = any(_holds_image(message) for index, message in enumerate(messages) if index != front)
    return not any(behind) and not elsewhere


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _holds_image(message: Mapping[str, Any]) -> bool:
    return not isinstance(message.get("content"), str) and any(_is_image(part) for part in _parts(message))


def join_groundings(
    samples: Sequence[Sample],
    rng: np.random.Generator,
    *,
    max_turns: int | None = None,
    max_tokens: int | None = None,
    measure: Callable[[Sample], int] | None = None,
) -> list[Sample]:
    """All questions about one image in one conversation, as long as it fits; the image is shown once.

    Samples of one question with one image and one answer are joined with those that have the same image and the same messages
    before it, in a new order, at the place of the first of them. All others stay where and as they are.

    Args:
        max_turns: Most answers of a conversation.
        max_tokens: Most tokens of a conversation; a sample that has more stays alone.
        measure: Tokens of a sample, for max_tokens; such as `Processor.measure` gives.

    Raises:
        ValueError: max_tokens without measure.

    Source: Aguvis, arXiv:2412.04454, grounding stage; every answer sees the earlier ones.
    """
    if max_tokens is not None and measure is None:
        raise ValueError("max_tokens needs measure, which says how many tokens a sample has")

    def fits(group: Sequence[Sample]) -> bool:
        if max_turns is not None and len(group) > max_turns:
            return False
        return max_tokens is None or measure is None or measure(joined(group)) <= max_tokens

    result: list[Sample] = []
    for members in grounding_groups(samples):
        order = rng.permutation(len(members)) if len(members) > 1 else [0]
        group: list[Sample] = []
        for place in order:
            sample = samples[members[place]]
            if group and not fits([*group, sample]):
                result.append(joined(group))
                group = []
            group.append(sample)
        result.append(joined(group))
    return result


def grounding_groups(samples: Sequence[Sample]) -> list[list[int]]:
    """The places of samples that can be one conversation, in the order of the first of each."""
    groups: dict[Any, list[int]] = {}
    for place, sample in enumerate(samples):
        key = _screen(sample)
        groups.setdefault(("alone", place) if key is None else key, []).append(place)
    return list(groups.values())


def joined(group: Sequence[Sample]) -> Sample:
    """One conversation of samples about one image. A single sample stays as it is."""
    if len(group) == 1:
        return group[0]
    first = group[0]
    messages = [*first["messages"]]
    for sample in group[1:]:
        question, answer = sample["messages"][-2:]
        messages += [{**question, "content": [part for part in _parts(question) if not _is_image(part)]}, answer]
    return {**{key: value for key, value in first.items() if key != "id"}, "messages": messages}


def _screen(sample: Sample) -> tuple[str, str] | None:
    """What samples share that can be joined: the image and the messages before the question; None for other samples."""
    others = {key for key, value in sample.items() if value} - {"messages", "images", "id"}
    messages, beside = sample.get("messages", []), sample.get("images") or []
    if others or len(messages) < 2 or len(beside) > 1:
        return None
    *before, question, answer = messages
    if [question["role"], answer["role"]] != ["user", "assistant"] or any(each["role"] != "system" for each in before):
        return None
    visual = [
        part
        for each in (*before, question)
        for part in _parts(each)
        if isinstance(part, Mapping) and part.get("type") != "text"
    ]
    if len(visual) != 1 or not _is_image(visual[0]) or not _holds_image(question):
        return None
    source = beside[0] if beside else visual[0].get("image")
    return None if source is None else (_name(source), json.dumps(before, sort_keys=True))


def _name(source: Any) -> str:
    """One text per image."""
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, str):
        return f"path {source}"
    if isinstance(source, bytes):
        return f"sha256 {hashlib.sha256(source).hexdigest()}"
    return f"object {id(source)}"


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
