"""ChatTemplate: a checkpoint's own jinja template, rendered so that it can neither run code, nor run on, nor be fooled.

    messages --guard: break special names that a person typed--> jinja, bounded --> text
             --cut at special names, image tokens, answer marks--> pieces

A template is a program that came with a download, and what it is fed was typed by strangers. So:
- it runs in a sandbox that also bounds time and size (see template_sandbox);
- special tokens inside a message are broken by a noncharacter before rendering and mended, as plain text, after it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vlkit.errors import TemplateError, VlkitError
from vlkit.processing.chat import ImageSlot, Message, Piece, Text, VideoSlot, check_messages
from vlkit.processing.chat_format import ChatFormat
from vlkit.processing.template_answers import AnswerSearch, Part, find_answers, find_headers, with_marks
from vlkit.processing.template_sandbox import ANSWER, ANSWER_END, BREAK, TemplateLimits, compile_template, generate


class ChatTemplate:
    """A jinja chat template, as `tokenizer_config.json` and `chat_template.jinja` carry them.

    Args:
        source: The template.
        limits: How much it may do.
        name: What errors call it.

    Raises:
        TemplateError: The template is malformed, too large, or uses what is not allowed.
    """

    def __init__(self, source: str, limits: TemplateLimits | None = None, *, name: str = "chat template") -> None:
        self.source, self.limits, self.name = source, limits or TemplateLimits(), name
        if not isinstance(source, str):
            raise TemplateError(f"{name}: expected a text, found {type(source).__name__}")
        if len(source) > self.limits.source:
            raise TemplateError(f"{name}: {len(source)} characters; at most {self.limits.source} are read")
        try:
            self._template = compile_template(source, self.limits)
        except TemplateError as error:
            raise TemplateError(f"{name}: {error}") from error
        except Exception as error:  # jinja2's errors, and Python's own on code that is nested too deeply
            line = getattr(error, "lineno", None)
            where = f"line {line}: " if line else ""
            raise TemplateError(f"{name}: {where}{type(error).__name__}: {error}") from error

    @property
    def marks_answers(self) -> bool:
        """Whether the template says by {% generation %} what the assistant's part is."""
        return ANSWER in self.source or re.search(r"{%[-+]?\s*generation\s*[-+]?%}", self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that the template makes of a conversation, with everything in it taken at its word.

        Raises:
            TemplateError: The template raises, does what is not allowed, or exceeds a limit.
        """
        return _unmarked(self._render(messages, add_generation_prompt, variables or {}))[0]

    def pieces(
        self,
        messages: Sequence[Message],
        special: Collection[str],
        image_token: str,
        video_token: str | None = None,
        *,
        answer_tokens: Collection[str] = (),
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
        answers: AnswerSearch | None = None,
    ) -> list[Piece]:
        """The conversation as pieces: special tokens are those that the template wrote.

        Args:
            special: Names of the tokenizer's special tokens.
            image_token: The one that the template writes for an image.
            video_token: The one that it writes for a video.
            answer_tokens: Special tokens that are read as such inside an assistant's message.
            variables: What the template reads besides, such as tools or enable_thinking.
            answers: How answers are found where the template does not mark them; None leaves them unknown there.

        Raises:
            TemplateError: As `render`; a malformed conversation; or answers that cannot be found.
        """
        check_messages(messages)
        in_answers = set(special) - set(answer_tokens)
        guarded = [_guarded(each, in_answers if each["role"] == "assistant" else special) for each in messages]
        given = {key: _guarded(value, special) for key, value in (variables or {}).items()}

        def written(count: int, prompt: bool) -> str:
            return _unmarked(self._render(guarded[:count], prompt, given))[0]

        text, spans = _unmarked(self._render(guarded, add_generation_prompt, given))
        assistants = [index for index, each in enumerate(messages) if each["role"] == "assistant"]
        if answers is not None and not self.marks_answers:
            spans = find_answers(text, messages, written, answers.stop)
        owners: list[int | None] = [*assistants] if len(spans) == len(assistants) else [None] * len(spans)
        if answers is not None and answers.by_message and None in owners:
            raise TemplateError(
                f"the template marks {len(spans)} answers for {len(assistants)} of the assistant's messages"
            )
        parts = [Part(*span, message=message, learn=True) for span, message in zip(spans, owners, strict=True)]
        if answers is not None and answers.headers:
            parts += find_headers(text, parts, written)
        names = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        pieces: list[Piece] = []
        num_visuals = 0
        for part in _divided(text, parts):
            end = part.start
            for match in (*names.finditer(text, part.start, part.end), None):
                plain = text[end : match.start() if match else part.end].replace(BREAK, "")
                if plain:
                    pieces.append(Text(plain, learn=part.learn, message=part.message, mark=part.mark))
                if match is None:
                    break
                if match[0] in (image_token, video_token):
                    pieces.append((ImageSlot if match[0] == image_token else VideoSlot)(num_visuals))
                    num_visuals += 1
                else:
                    pieces.append(Text(match[0], (match[0],), part.learn, part.message, part.mark))
                end = match.end()
        return pieces if answers is None else with_marks(pieces)

    def _render(self, messages: Sequence[Any], add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        values = {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            plain = {name: _plain(value, name) for name, value in values.items()}
            return generate(self._template, plain, self.limits)
        except VlkitError as error:
            raise TemplateError(f"{self.name}: {error}") from error
        except Exception as error:  # whatever a template can make Python raise
            raise TemplateError(f"{self.name}: {type(error).__name__}: {error}") from error


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of answers, and from where to where each answer goes."""
    if ANSWER not in text and ANSWER_END not in text:
        return text, []
    plain, length, start = [], 0, None
    spans: list[tuple[int, int]] = []
    for span in re.split(f"([{ANSWER}{ANSWER_END}])", text):
        if span == ANSWER:
            start = length
        elif span == ANSWER_END:
            spans.append((length if start is None else start, length))
            start = None
        else:
            plain.append(span)
            length += len(span)
    return "".join(plain), spans


def _divided(text: str, parts: Sequence[Part]) -> list[Part]:
    """The parts in order, and what lies between them."""
    divided, end = [], 0
    for part in sorted(parts, key=lambda each: (each.start, each.end)):
        divided += [Part(end, part.start), part]
        end = part.end
    return [*divided, Part(end, len(text))]


def without_outer_marks(pieces: list[Piece], chat: ChatFormat) -> list[Piece]:
    """Templates put marks around a whole video; they go where the format has them around each time step instead."""
    if not chat.frames_apart or chat.video_prefix:
        return pieces
    dropped = set()
    for index, piece in enumerate(pieces):
        if isinstance(piece, VideoSlot):
            for place, marks in ((index - 1, chat.frame_prefix), (index + 1, chat.frame_suffix)):
                near = pieces[place] if 0 <= place < len(pieces) else None
                if isinstance(near, Text) and near.special and near.text in marks:
                    dropped.add(place)
    return [piece for index, piece in enumerate(pieces) if index not in dropped]


def _guarded(value: Any, special: Collection[str]) -> Any:
    """The value with special names in its texts broken, so that nothing that a person typed is one after rendering.

    Raises:
        TemplateError: A text holds one of the characters that do the breaking.
    """
    if isinstance(value, str):
        if any(mark in value for mark in (BREAK, ANSWER, ANSWER_END)):
            raise TemplateError("a message holds a noncharacter (U+FDD0 to U+FDD2), which no text should; remove it")
        for name in special:
            if len(name) > 1:
                value = value.replace(name, name[0] + BREAK + name[1:])
        # Two texts that a template joins could make a name between them: what ends like the start of one is closed.
        if any(value.endswith(name[:cut]) for name in special for cut in range(1, len(name))):
            value += BREAK
        return value
    if isinstance(value, Mapping):
        if value.get("type") in ("image", "video"):
            return {"type": value["type"]}
        return {key: _guarded(each, special) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_guarded(each, special) for each in value]
    return value


def _plain(value: Any, name: str) -> Any:
    """The value rebuilt from plain lists and dictionaries: a template gets no objects to poke at.

    Raises:
        TemplateError: Something else is in it.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each, f"{name}.{key}") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, f"{name}[{index}]") for index, each in enumerate(value)]
    raise TemplateError(f"{name}: {type(value).__name__} cannot be given to a template")
