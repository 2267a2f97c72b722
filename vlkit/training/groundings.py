"""Many questions about one screenshot become one conversation, which shows it once.

    samples --grounding_groups--> those about one image --shuffled, split by turns and tokens--> conversations

Source: Aguvis, arXiv:2412.04454: groundings of a screenshot are learnt together, every answer sees the earlier ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlkit.errors import SampleError, VlkitError
from vlkit.training.samples import holds_image, is_image, parts_of
from vlkit.training.sources import Source

Sample = dict[str, Any]


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
    groups = grounding_groups(samples)
    divided = _divided(groups, samples.__getitem__, _fits(max_turns, max_tokens, measure), rng)
    return [joined([samples[place] for place in group]) for group in divided]


def _fits(
    max_turns: int | None, max_tokens: int | None, measure: Callable[[Sample], int] | None
) -> Callable[[Sequence[Sample]], bool]:
    """Whether samples may be one conversation."""
    if max_tokens is not None and measure is None:
        raise ValueError("max_tokens needs measure, which says how many tokens a sample has")

    def fits(group: Sequence[Sample]) -> bool:
        if max_turns is not None and len(group) > max_turns:
            return False
        if max_tokens is None or measure is None:
            return True
        try:
            return measure(joined(group)) <= max_tokens
        except VlkitError:  # one of them cannot be used: it must not take the others with it
            return False

    return fits


def _divided(
    groups: Sequence[Sequence[int]],
    sample: Callable[[int], Sample],
    fits: Callable[[Sequence[Sample]], bool],
    rng: np.random.Generator,
) -> list[list[int]]:
    """The places of every conversation: those of a group in a new order, a new one begun where the next does not fit."""
    divided: list[list[int]] = []
    for group in groups:
        if len(group) == 1:
            divided.append([*group])
            continue
        places: list[int] = []
        found: list[Sample] = []
        for place in (group[index] for index in rng.permutation(len(group))):
            found.append(sample(place))
            if places and not fits(found):
                divided.append(places)
                places, found = [], found[-1:]
            places.append(place)
        divided.append(places)
    return divided


def grounding_groups(samples: Iterable[Sample]) -> list[list[int]]:
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
        messages += [{**question, "content": [part for part in parts_of(question) if not is_image(part)]}, answer]
    return {**{key: value for key, value in first.items() if key != "id"}, "messages": messages}


def _screen(sample: Sample) -> tuple[str, str] | None:
    """What samples share that can be joined: the image and the messages before the question; None for other samples."""
    others = {key for key, value in sample.items() if value} - {"messages", "images", "id"}
    messages, beside = sample.get("messages", []), sample.get("images") or []
    if others or len(messages) < 2 or len(beside) > 1:
        return None
    *before, question, answer = messages
    if [question.get("role"), answer.get("role")] != ["user", "assistant"] or any(
        each.get("role") != "system" for each in before
    ):
        return None
    visual = [
        part
        for each in (*before, question)
        for part in parts_of(each)
        if isinstance(part, Mapping) and part.get("type") != "text"
    ]
    if len(visual) != 1 or not is_image(visual[0]) or not holds_image(question):
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


class JoinedGroundings:
    """A source whose questions about one image are conversations; see `join_groundings`.

    Every sample is read once to begin with, to see which belong together. One that cannot be read stays alone, so that it is
    refused or left out where it is asked for.

    Args:
        source: Of the samples.
        seed: Of their order inside conversations.
        max_turns: As for `join_groundings`.
        max_tokens: The same.
        measure: The same.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        max_turns: int | None = None,
        max_tokens: int | None = None,
        measure: Callable[[Sample], int] | None = None,
    ) -> None:
        self.source = source
        self.options = {"seed": seed, "max_turns": max_turns, "max_tokens": max_tokens}
        rng = np.random.Generator(np.random.PCG64(seed))
        fits = _fits(max_turns, max_tokens, measure)
        self.groups = _divided(grounding_groups(_readable(source)), source.__getitem__, fits, rng)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Sample:
        return joined([self.source[place] for place in self.groups[index]])

    def where(self, index: int) -> str:
        first, *others = self.groups[index]
        return self.source.where(first) + (f" and {len(others)} joined with it" if others else "")

    def fingerprint(self) -> list[dict[str, Any]]:
        return [*self.source.fingerprint(), {"join_groundings": self.options}]


def _readable(source: Source) -> Iterable[Sample]:
    for index in range(len(source)):
        try:
            yield source[index]
        except SampleError:
            yield {}
