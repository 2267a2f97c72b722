"""What a sample of a data set may look like, and where its images and videos are.

    conversation  {"messages": [...]}                                     answers are learnt from
    pair          {"messages": prompt, "chosen": [...], "rejected": [...]}  one answer is better than the other
    question      {"messages": prompt, "answer": "42", "difficulty": 0.3}   an answer can be checked
    caption       {"image": ..., "text": "..."}                           an image and what is said of it

The first three may hold "images" and "videos" for parts without one, and "tools"; all may have an "id" for people. A message
may say "loss": false, and nothing of it is learnt, or an answer "loss": true, and it is, whatever else is asked for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vlkit.errors import SampleError, UnsafePathError, VlkitError
from vlkit.processing.chat import usual_parts

Kind = Literal["conversation", "pair", "question", "caption"]

_SHARED = ("images", "videos", "tools", "id")
FIELDS: dict[Kind, tuple[str, ...]] = {
    "conversation": ("messages", *_SHARED),
    "pair": ("messages", "chosen", "rejected", *_SHARED),
    "question": ("messages", "answer", "difficulty", *_SHARED),
    "caption": ("image", "text", "id"),
}
"""What a sample of each kind may hold."""


def kind_of(values: Mapping[str, Any]) -> Kind:
    """The kind of a sample, by the names of its fields."""
    if "messages" not in values and ("image" in values or "text" in values):
        return "caption"
    if "chosen" in values or "rejected" in values:
        return "pair"
    return "question" if "answer" in values or "difficulty" in values else "conversation"


def check_sample(values: Mapping[str, Any], where: str) -> Kind:
    """Refuse a sample that would be misread.

    Args:
        where: How errors call it: its file and line.

    Raises:
        SampleError: An unknown or missing field, or one of another type.
    """
    kind = kind_of(values)
    if unknown := sorted(set(values) - set(FIELDS[kind])):
        raise SampleError(f"{where}: unknown field {unknown[0]!r}; a {kind} has {', '.join(FIELDS[kind])}")
    if not isinstance(values.get("id"), str | int | None) or isinstance(values.get("id"), bool):
        raise SampleError(f"{where}: 'id' must be a text or a number, found {_shown(values['id'])}")
    if kind == "caption":
        if not isinstance(values.get("text"), str) or not values["text"].strip():
            raise SampleError(f"{where}: 'text' must be a text, found {_shown(values.get('text'))}")
        if values.get("image") is None:
            raise SampleError(f"{where}: 'image' must be an image, found {_shown(values.get('image'))}")
        return kind
    for field in ("messages", *(("chosen", "rejected") if kind == "pair" else ())):
        _check_messages(values.get(field), field, where)
    for field in ("chosen", "rejected") if kind == "pair" else ():
        if not any(message.get("role") == "assistant" for message in values[field]):
            raise SampleError(f"{where}: {field!r} has no message of the assistant")
    for field in ("images", "videos", "tools"):
        if not isinstance(values.get(field), list | None):
            raise SampleError(f"{where}: {field!r} must be a list, found {_shown(values[field])}")
    if kind == "question":
        if not isinstance(values.get("answer"), str):
            raise SampleError(f"{where}: 'answer' must be a text, found {_shown(values.get('answer'))}")
        difficulty = values.get("difficulty")
        number = isinstance(difficulty, int | float) and not isinstance(difficulty, bool) and math.isfinite(difficulty)
        if difficulty is not None and not number:
            raise SampleError(f"{where}: 'difficulty' must be a number, found {_shown(difficulty)}")
    return kind


def _check_messages(messages: Any, field: str, where: str) -> None:
    if not (isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages)):
        raise SampleError(f"{where}: {field!r} must be a list of messages, found {_shown(messages)}")
    for index, message in enumerate(messages):
        if not isinstance(message.get("loss"), bool | None):
            raise SampleError(
                f"{where}: {field!r}, message {index}: 'loss' must be true or false, found {_shown(message['loss'])}"
            )


def _shown(value: Any) -> str:
    return json.dumps(value, default=lambda each: f"<{type(each).__name__}>")[:80]


def with_sources(values: Mapping[str, Any], found: Callable[[Any], Any], where: str) -> dict[str, Any]:
    """The sample with every image and video replaced by what a function makes of it, and its parts under their usual names.

    Args:
        found: Takes what the sample holds in place of an image or video; the frames of a video, and the entries of a
            {"path": ...}, come one by one.

    Raises:
        SampleError: What the function raises, with file and line.
    """

    def each_of(value: Any) -> Any:
        if isinstance(value, Mapping):  # {"path": ...}, as data sets of Hugging Face have it
            return {key: each_of(each) for key, each in value.items()}
        return [each_of(each) for each in value] if isinstance(value, list) else found(value)

    def part(value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("type") not in ("image", "video"):
            return value
        return {key: each_of(each) if key == value["type"] else each for key, each in value.items()}

    def conversation(messages: Any) -> list[Any]:
        return [
            {**message, "content": [part(each) for each in message["content"]]}
            if isinstance(message.get("content"), list)
            else message
            for message in usual_parts(messages)
        ]

    try:
        changed = {name: conversation(values[name]) for name in ("messages", "chosen", "rejected") if name in values}
        for name in ("image", "images", "videos"):
            if values.get(name):
                changed[name] = each_of(values[name])
    except VlkitError as error:
        raise SampleError(f"{where}: {error}") from error
    return {**values, **changed}


def confined(folder: Path) -> Callable[[Any], Any]:
    """A function for `with_sources` that makes paths absolute and lets none of them leave a folder.

    Args:
        folder: Already resolved.

    Raises:
        UnsafePathError: The function raises it for a path that leaves the folder or is absolute.
    """

    def source(value: Any) -> Any:
        if not isinstance(value, str) or value[:5].lower() == "data:":
            return value
        if value[:8].lower().startswith(("http://", "https://")):
            return value  # refused, with a way out, where images are read
        if "\0" in value:
            raise UnsafePathError(f"{value!r} holds a zero byte, which no path has")
        path = Path(value.removeprefix("file://"))
        real = Path(os.path.realpath(folder / path))
        if not real.is_relative_to(folder):
            raise UnsafePathError(
                f"{value!r} lies outside of {folder}; images and videos are named relative to the file's folder"
            )
        if path.is_absolute():
            raise UnsafePathError(
                f"{value!r} is absolute; images and videos are named relative to the file's folder: write "
                f"{str(real.relative_to(folder))!r}"
            )
        return str(real)

    return source


def messages_of(sample: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """All messages of a sample of any kind, in order; a caption has none."""
    return [message for name in ("messages", "chosen", "rejected") for message in sample.get(name, ())]


def parts_of(message: Mapping[str, Any]) -> list[Any]:
    """The parts of a message; a plain text is one. What is malformed has none, and is refused where it is written."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content) if isinstance(content, list | tuple) else []


def is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def holds_image(message: Mapping[str, Any]) -> bool:
    return not isinstance(message.get("content"), str) and any(is_image(part) for part in parts_of(message))
