"""Conversations -> pieces, of which `encoding` makes ids and labels.

    messages --chat_pieces--> Text (the format's own, or a person's), ImageSlot, VideoSlot, ...

What a person wrote is never read for special tokens: "<|im_end|>" in a user's text stays nine harmless characters.
Only the format itself writes control tokens. Answers may hold the few that the format names, such as "<think>".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from vlkit.errors import TemplateError
from vlkit.processing import tools as tool_texts
from vlkit.processing.chat_format import ChatFormat

IGNORED = -100
"""The label of a token whose prediction is not learned."""

Message = Mapping[str, Any]
"""{"role": "user", "content": "text" or a list of parts}; a part is {"type": "text", "text": ...},
{"type": "image", "image": ...} or {"type": "video", "video": ..., "fps": ...}. "loss" says whether it is learnt from; see
`vlkit.processing.LabelRule`."""

Label = bool | Literal["control"]
"""Whether a text is learned; of "control" only special tokens and line breaks are."""


class Text(NamedTuple):
    """A piece of text.

    Attributes:
        text: The characters.
        special: Special tokens that are read as such: all (True), none (False) or these.
        learn: Whether it is part of an answer.
        message: The message that it belongs to; None where none asked for it.
        mark: Whether it opens or closes a turn.
        label: Whether it is learned, where a rule has said so; otherwise answers are.
    """

    text: str
    special: bool | tuple[str, ...] = False
    learn: bool = False
    message: int | None = None
    mark: bool = False
    label: Label | None = None


class ImageSlot(NamedTuple):
    """Where the tokens of an image stand; `visual` counts images and videos of the conversation from 0."""

    visual: int


class VideoSlot(NamedTuple):
    """Where the tokens of a video stand; `visual` counts images and videos of the conversation from 0."""

    visual: int


class Placeholders(NamedTuple):
    """`number` times the id of a visual token."""

    id: int
    number: int


Piece = Text | ImageSlot | VideoSlot
FilledPiece = Text | Placeholders


class Visual(NamedTuple):
    """An image or video part of a conversation.

    Attributes:
        kind: Which of them.
        source: What the part holds; None where it holds nothing.
        fps: Frames per second of a video, where the part says so.
    """

    kind: Literal["image", "video"]
    source: Any
    fps: float | None = None


class Seen(NamedTuple):
    """What became of an image or video.

    Attributes:
        tokens: Visual tokens of each time step; an image has one.
        times: Seconds from the start of a video to each time step.
    """

    tokens: tuple[int, ...]
    times: tuple[float, ...] = ()


def usual_parts(messages: Any) -> Any:
    """The conversation with images and videos under one name each, whatever the data set calls them.

    {"type": "image_url", "image_url": "..." or {"url": "..."}} and {"type": "image", "path" or "url": "..."} become
    {"type": "image", "image": "..."}; videos likewise. What is malformed stays for `check_messages`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        return messages
    return [
        {**message, "content": [_usual_part(part) for part in message["content"]]}
        if isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple))
        else message
        for message in messages
    ]


def _usual_part(part: Any) -> Any:
    kind = str(part.get("type")).removesuffix("_url") if isinstance(part, Mapping) else None
    if kind not in ("image", "video"):
        return part
    names = (f"{kind}_url", "path", "url")
    usual = {key: value for key, value in part.items() if key not in names}
    sources = [part[key] for key in names if part.get(key) is not None]
    if len(sources) != 1 or usual.get(kind) is not None:
        return part
    source = sources[0]
    if isinstance(source, Mapping) and set(source) <= {"url", "detail"} and source.get("detail") in (None, "auto"):
        source = source.get("url")
    return {**usual, "type": kind, kind: source}


def check_messages(messages: Sequence[Message], format: ChatFormat | None = None) -> list[Visual]:
    """Refuse a conversation that would be misread.

    Args:
        format: The format that is to write it; None where a template decides what it takes.

    Returns:
        The images and videos of all parts, in order.

    Raises:
        TemplateError: No messages, an unknown role or type, a missing or unknown key; with the message and part.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TemplateError(f"expected a list of messages, found {type(messages).__name__}")
    if not messages:
        raise TemplateError("the conversation has no messages")
    visuals: list[Visual] = []
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, Mapping):
            raise TemplateError(f"{where}: expected {{'role': ..., 'content': ...}}, found {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message and not (key == "content" and message.get("tool_calls")):
                raise TemplateError(f"{where}: has no {key!r}; found {', '.join(map(repr, message)) or 'nothing'}")
        role, content = message["role"], message.get("content")
        _check_loss(message, where)
        if format is not None:
            _check_role(message, format, where)
        if isinstance(content, str) or (content is None and message.get("tool_calls")):
            continue
        if not isinstance(content, Sequence) or isinstance(content, bytes):
            raise TemplateError(f"{where}: content must be a text or a list of parts, found {type(content).__name__}")
        for place, part in enumerate(content):
            visual = _check_part(part, role, f"{where}, part {place}")
            if visual is not None:
                if visual.kind == "video" and format is not None and format.video_token is None:
                    raise TemplateError(
                        f"{where}, part {place}: this chat format has no videos; give frames as images instead"
                    )
                visuals.append(visual)
    return visuals


def _check_loss(message: Message, where: str) -> None:
    loss = message.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise TemplateError(f"{where}: loss must be true or false, found {loss!r}")
    if loss and message["role"] != "assistant":
        raise TemplateError(
            f"{where}: 'loss': true is for answers; to learn all text, LabelRule(on='all'). Found role {message['role']!r}"
        )


def _check_role(message: Message, format: ChatFormat, where: str) -> None:
    role = message["role"]
    roles = (*format.roles, "tool") if format.tools else format.roles
    if role not in roles:
        raise TemplateError(f"{where}: role {role!r} is not one of {', '.join(roles)}")
    known = {"role", "content", "loss"}
    if role == "assistant":
        known |= {"tool_calls"} if format.tools else set()
        known |= {"reasoning_content"} if format.thinking == "qwen3" else set()
        reasoning = message.get("reasoning_content")
        if "reasoning_content" in known and reasoning is not None and not isinstance(reasoning, str):
            raise TemplateError(f"{where}: reasoning_content must be a str, found {type(reasoning).__name__}")
    elif role == "tool":
        known |= {"name", "tool_call_id"}
    if unknown := {str(key) for key in message if message[key] is not None} - known:
        raise TemplateError(
            f"{where}: this chat format does not write {sorted(unknown)[0]!r}; it takes {', '.join(sorted(known))}"
        )


_PART_KEYS = {"text": ("text",), "image": ("image",), "video": ("video", "fps")}


def _check_part(part: Any, role: str, at: str) -> Visual | None:
    if not isinstance(part, Mapping) or part.get("type") not in _PART_KEYS:
        kind = repr(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
        raise TemplateError(f"{at}: type {kind} is not one of {', '.join(map(repr, _PART_KEYS))}")
    kind = part["type"]
    if kind == "text" and not isinstance(part.get("text"), str):
        raise TemplateError(f"{at}: a text part needs 'text', a str; found {type(part.get('text')).__name__}")
    if unknown := set(part) - {"type", *_PART_KEYS[kind]}:
        raise TemplateError(
            f"{at}: unknown key {sorted(map(str, unknown))[0]!r}; a part has 'type' and "
            f"{', '.join(map(repr, _PART_KEYS[kind]))}"
        )
    if kind == "text":
        return None
    if role == "assistant":
        raise TemplateError(f"{at}: an assistant cannot answer with {'an image' if kind == 'image' else 'a video'}")
    fps = part.get("fps")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float))):
        raise TemplateError(f"{at}: fps must be a number, found {fps!r}")
    return Visual(kind, part.get(kind), fps)


def chat_pieces(
    messages: Sequence[Message],
    format: ChatFormat,
    *,
    add_generation_prompt: bool = False,
    thinking: bool | None = None,
    tools: Sequence[Any] | None = None,
    number_visuals: bool = False,
) -> list[Piece]:
    """The conversation as the format writes it.

    Args:
        add_generation_prompt: Whether it ends where the assistant's answer begins.
        thinking: Whether that answer is to begin with thoughts; None leaves it to the model.
        tools: Signatures of tools, as JSON objects.
        number_visuals: Whether images and videos are numbered over the conversation.

    Raises:
        TemplateError: As `check_messages`; or what is asked for is not known to the format.
    """
    check_messages(messages, format)
    writer = _Writer(format, number_visuals)
    if tools and not format.tools:
        raise TemplateError("tools are given, but this chat format has none")
    prompt = _answer_prompt(format, thinking)
    system, rest = _content(None), messages
    first = messages[0]["role"] == "system"
    if first:
        system, rest = _content(messages[0].get("content")), messages[1:]
    elif format.default_system is not None:
        first, system = True, _content(format.default_system)
    if first or tools:
        writer.message = 0 if rest is not messages else None
        writer.open("system")
        writer.parts(system)
        if tools:
            writer.own(("\n\n" if first else "") + tool_texts.SECTION_BEGIN)
            writer.pieces.append(Text(tool_texts.signatures(tools), message=writer.message))
            writer.own(tool_texts.SECTION_END)
        writer.close("system")
    question = _last_question(rest, format)
    for index, message in enumerate(rest):
        role, content = message["role"], _content(message.get("content"))
        writer.message = index + len(messages) - len(rest)
        if role == "tool":
            follows = index > 0 and rest[index - 1]["role"] == "tool"
            if follows:
                writer.own("\n")
            else:
                writer.open("user")
            writer.own(tool_texts.RESULT_BEGIN)
            writer.parts(content)
            writer.own(tool_texts.RESULT_END)
            if index + 1 == len(rest) or rest[index + 1]["role"] != "tool":
                writer.close("user")
            continue
        writer.open(role)
        if role == "assistant":
            where = f"message {writer.message}"
            shown, text = _answer(message, format, index, question, index + 1 == len(rest))
            writer.answer(shown)
            for number, call in enumerate(tool_texts.calls(message, where)):
                line = "\n" if number or text else ""
                writer.own(line + tool_texts.CALL_BEGIN, learn=True)
                writer.answer(call)
                writer.own(tool_texts.CALL_END, learn=True)
        else:
            writer.parts(content)
        writer.close(role)
    writer.message = None
    if add_generation_prompt:
        writer.open("assistant")
        writer.own(prompt)
    return [piece for piece in writer.pieces if not isinstance(piece, Text) or piece.text]


class _Writer:
    """Collects the pieces of one conversation."""

    def __init__(self, format: ChatFormat, number_visuals: bool) -> None:
        self.format, self.number_visuals = format, number_visuals
        self.pieces: list[Piece] = []
        self.message: int | None = None
        self.counts = {"image": 0, "video": 0}

    def own(self, text: str, *, learn: bool = False, mark: bool = False) -> None:
        self.pieces.append(Text(text, special=True, learn=learn, message=self.message, mark=mark))

    def answer(self, text: str) -> None:
        self.pieces.append(Text(text, special=self.format.answer_tokens, learn=True, message=self.message))

    def open(self, role: str) -> None:
        if self.pieces:
            self.pieces.append(Text(self.format.separator, special=True, mark=True))
        self.own(self.format.turn(role).prefix, mark=True)

    def close(self, role: str) -> None:
        self.own(self.format.turn(role).suffix, learn=role == "assistant", mark=True)

    def parts(self, content: Sequence[Mapping[str, Any]]) -> None:
        format = self.format
        for part in content:
            kind = part["type"]
            if kind == "text":
                self.pieces.append(Text(part["text"], message=self.message))
                continue
            visual = sum(self.counts.values())
            self.counts[kind] += 1
            if kind == "image":
                number, prefix, suffix = format.image_number, format.image_prefix, format.image_suffix
            else:
                number, prefix, suffix = format.video_number, format.video_prefix, format.video_suffix
            begin = (number if self.number_visuals else "") + prefix
            self.own(begin.replace("{number}", str(self.counts[kind])))
            self.pieces.append(ImageSlot(visual) if kind == "image" else VideoSlot(visual))
            self.own(suffix)


def _content(content: Any) -> Sequence[Mapping[str, Any]]:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text(message: Message) -> str:
    return "".join(part["text"] for part in _content(message.get("content")) if part["type"] == "text")


def _answer_prompt(format: ChatFormat, thinking: bool | None) -> str:
    if thinking is None:
        return format.answer_prompt
    prompt = format.thinking_on if thinking else format.thinking_off
    if prompt is None:
        raise TemplateError(f"this chat format cannot be told thinking={thinking}; leave it out")
    return prompt


def _last_question(messages: Sequence[Message], format: ChatFormat) -> int:
    """The place of the last question; thoughts in answers before it are not shown again."""
    if format.thinking != "qwen3":
        return max((i for i, m in enumerate(messages) if m["role"] != "assistant"), default=-1)
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "user":
            text = _text(messages[index])
            if not (text.startswith("<tool_response>") and text.endswith("</tool_response>")):
                return index
    return len(messages) - 1


def _answer(message: Message, format: ChatFormat, index: int, question: int, last: bool) -> tuple[str, str]:
    """An answer as it is shown, and its text without thoughts."""
    text = _text(message)
    if format.thinking == "text":
        return text, text
    if format.thinking == "cut":
        if index < question:
            text = text.rsplit(str(format.thinking_end), 1)[-1]
        return text, text
    thoughts = message.get("reasoning_content")
    if thoughts is None:
        thoughts = ""
        if "</think>" in text:
            before, _, _ = text.partition("</think>")
            thoughts = before.rstrip("\n").rsplit("<think>", 1)[-1].lstrip("\n")
            text = text.rsplit("</think>", 1)[-1].lstrip("\n")
    if index > question and (last or thoughts):
        body = text.lstrip("\n")
        return "<think>\n" + thoughts.strip("\n") + "\n</think>\n\n" + body, text
    return text, text
