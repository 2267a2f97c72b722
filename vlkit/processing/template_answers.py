"""Where the answers are in what a jinja template wrote, if it does not say.

    messages[:k], asked for an answer  -> "...<|im_start|>assistant\\n"               the answer begins where this ends
    all messages                       -> "...<|im_start|>assistant\\nyes<|im_end|>"  and ends with a token that stops it

That is what generation does: it is given the first text and goes on until a token that stops. Nothing is looked for by its words,
so what a person wrote in the manner of an answer is none. A template that writes the past otherwise once there is an answer is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from vlkit.errors import TemplateError
from vlkit.processing.chat import Message, Piece, Text
from vlkit.processing.template_sandbox import BREAK

Written = Callable[[int, bool], str]
"""(messages, asked for an answer) -> what the template writes of the first so many messages."""


class AnswerSearch(NamedTuple):
    """What has to be known of answers.

    Attributes:
        stop: Names of the special tokens that end one.
        headers: Whether it matters what opens the turn of an answer.
        by_message: Whether it matters which message an answer belongs to.
    """

    stop: Collection[str]
    headers: bool = False
    by_message: bool = False


class Part(NamedTuple):
    """Characters start to end of a text.

    Attributes:
        start: First of them.
        end: Behind the last.
        message: The message that they belong to.
        learn: Whether they are an answer and what ends it.
        mark: Whether they open the turn of an answer.
    """

    start: int
    end: int
    message: int | None = None
    learn: bool = False
    mark: bool = False


def find_answers(
    text: str, messages: Sequence[Message], written: Written, stop: Collection[str]
) -> list[tuple[int, int]]:
    """From where to where each answer goes, the token that ends it included.

    Raises:
        TemplateError: An answer is not found.
    """
    ends = re.compile("|".join(map(re.escape, sorted(stop, key=len, reverse=True))) or r"(?!)")
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = written(index, True)
        if not text.startswith(prompt) or (spans and spans[-1][1] > len(prompt)):
            raise _not_found(index, "what comes before it is written otherwise when it is asked for")
        end = ends.search(text, len(prompt))
        if end is None:
            raise _not_found(index, f"no token ends it; those that do are {', '.join(stop) or 'unknown'}")
        words = _words(message)
        if words and words[-1] not in text[len(prompt) : end.end()].replace(BREAK, ""):
            raise _not_found(index, f"{words[-1][:40]!r}, its end, is not where it should be")
        spans.append((len(prompt), end.end()))
    return spans


def find_headers(text: str, answers: Sequence[Part], written: Written) -> list[Part]:
    """What opens the turn of each answer: what is written before it, less what is written without it.

    Raises:
        TemplateError: One is not found.
    """
    headers = []
    for answer in answers:
        if answer.message is None:
            raise TemplateError("the template marks another number of answers than the assistant has messages")
        before = written(answer.message, False) if answer.message else ""
        if not text.startswith(before) or len(before) > answer.start:
            raise TemplateError(
                f"message {answer.message}: what opens its turn is not found: the template writes what comes before it "
                "otherwise when it is left out; use LabelRule(special='none')"
            )
        headers.append(Part(len(before), answer.start, answer.message, mark=True))
    return headers


def with_marks(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces, where all special tokens mark turns but for those beside an image or a video."""

    def visual(place: int) -> bool:
        return 0 <= place < len(pieces) and not isinstance(pieces[place], Text)

    return [
        piece._replace(mark=True)
        if isinstance(piece, Text) and piece.special and not (visual(place - 1) or visual(place + 1))
        else piece
        for place, piece in enumerate(pieces)
    ]


def _words(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    return (content or "").split()


def _not_found(index: int, reason: str) -> TemplateError:
    return TemplateError(
        "labels are asked for, but the template does not mark answers by {% generation %}, and the answer of message "
        f"{index} is not found: {reason}. Mark it in the template"
    )
