"""A folder's chat template against the family's own format: which of the two writes conversations.

chat_template.jinja, chat_template.json or tokenizer_config.json --probe conversations, in the sandbox-->
      the same text as a known format: that format; another text: the template, with a warning

The format is preferred where both say the same: it marks answers for training, which few published templates do.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from vlkit.errors import ConfigError, TemplateError
from vlkit.hub.strict_json import read_json
from vlkit.processing.chat import ImageSlot, Message, Piece, Text, VideoSlot, chat_pieces
from vlkit.processing.chat_format import CHAT_FORMATS, ChatFormat
from vlkit.processing.processor_config import ProcessorConfig
from vlkit.processing.template import ChatTemplate, without_outer_marks

JINJA_FILE, JSON_FILE, TOKENIZER_FILE = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"


def with_template(config: ProcessorConfig, folder: Path) -> ProcessorConfig:
    """The config with the format that the folder's template stands for, or with the template itself.

    Raises:
        ConfigError: A template file is malformed.
    """
    source, path = _source(folder)
    if source is None:
        return config
    try:
        template = ChatTemplate(source, name=str(path))
        _try(template, config.chat)
        written = _renderings(template, config.chat)
    except TemplateError as error:
        warnings.warn(
            f"{error}. The template is not used: conversations are written in the family's own format. To use another, "
            f"Processor(processor.config.replace(template=...), processor.tokenizer)",
            stacklevel=2,
        )
        return config
    if config.chat == CHAT_FORMATS["andesvl"] and not _difference(written, CHAT_FORMATS["qwen3"], _TEXT_PROBES):
        return config  # published with Qwen3's own template, which its code never uses
    formats = [config.chat]
    for siblings in (("kimi", "kimi-thinking"), ("qwen3-vl", "qwen3-vl-thinking")):
        named = [CHAT_FORMATS[name] for name in siblings]
        formats += named if config.chat in named else []
    for chat in formats:
        if not _difference(written, chat, _PROBES):
            return config.replace(chat=chat)
    difference = _difference(written, config.chat, _PROBES)
    if path.name == TOKENIZER_FILE and difference.startswith(_PLACES):
        return config  # for texts alone; a processor has another
    warnings.warn(
        f"{path}: the template writes {difference} otherwise than the family does, and is used in place of its format. "
        f"For the format: Processor(processor.config.replace(template=None), processor.tokenizer)",
        stacklevel=2,
    )
    return config.replace(template=_with_names(source, folder))


def _source(folder: Path) -> tuple[str | None, Path]:
    """The template that transformers would take, and its file; the tokenizer's where the processor has none."""
    if (folder / JINJA_FILE).is_file():
        return (folder / JINJA_FILE).read_text("utf-8", "replace"), folder / JINJA_FILE
    for path in (folder / JSON_FILE, folder / TOKENIZER_FILE):
        found = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(found, list):
            found = {each.get("name"): each.get("template") for each in found if isinstance(each, Mapping)}
        if isinstance(found, Mapping):
            found = found.get("default")
        if found is not None:
            if not isinstance(found, str):
                raise ConfigError(f"{path}: chat_template must be a text, found {type(found).__name__}")
            return found, path
    return None, folder


def _with_names(source: str, folder: Path) -> str:
    """The template with the names of tokens that it reads, such as eos_token, set at its beginning."""
    fields = read_json(folder / TOKENIZER_FILE) if (folder / TOKENIZER_FILE).is_file() else {}
    settings = ""
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = fields.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str) and re.search(rf"\b{name}\b", source):
            settings += f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}"
    return f"{settings}\n{source}" if settings else source  # the line break after a block is not rendered


class _Probe(NamedTuple):
    """A conversation, and how it is to be written."""

    messages: Sequence[Message]
    prompt: bool = True
    tools: Sequence[Mapping[str, Any]] | None = None
    kind: str = "text"


def _says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _parts(*parts: str) -> list[dict[str, Any]]:
    return [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in parts]


_TEXT_PROBES = {
    "a question of spaces and line breaks": _Probe([_says("user", "\n Why? \n\n")]),
    "a system message": _Probe([_says("system", " Be brief. "), _says("user", "Why?")]),
    "several turns": _Probe([_says("user", "Why?"), _says("assistant", " So. "), _says("user", "And?")]),
    "an answer": _Probe([_says("user", "Why?"), _says("assistant", "So.")], prompt=False),
}
_TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"at": {"type": "integer"}}}}]
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": 3}}}
_PROBES = {
    "a question": _Probe([_says("user", _parts("Why?"))]),
    **_TEXT_PROBES,
    "thoughts": _Probe(
        [
            *(_says("user", "Why?"), _says("assistant", "<think>\nhm\n</think>\n\nSo.")),
            *(_says("user", "And?"), _says("assistant", "◁think▷hm◁/think▷So."), _says("user", "Else?")),
        ]
    ),
    "an image": _Probe([_says("user", _parts("image", "What is it?"))], kind="image"),
    "images in several turns": _Probe(
        [
            _says("system", _parts("Be brief.")),
            _says("user", _parts("image", "and", "image", "?")),
            _says("assistant", _parts("So.")),
            _says("user", _parts("And this?", "image")),
        ],
        kind="image",
    ),
    "a video": _Probe([_says("user", _parts("video", "What happens?", "image"))], kind="video"),
    "tools": _Probe([_says("system", "Be brief."), _says("user", "Look.")], tools=_TOOLS, kind="tools"),
    "calls of tools": _Probe(
        [
            _says("user", "Look."),
            _says("assistant", "Well.", tool_calls=[_CALL, _CALL]),
            *(_says("tool", "a cat"), _says("tool", "a dog")),
        ],
        tools=_TOOLS,
        kind="tools",
    ),
}
_PLACES = "the places of "


def _renderings(template: ChatTemplate, chat: ChatFormat) -> dict[str, list[Piece]]:
    """What the template writes of every probe; nothing where it raises.

    Raises:
        TemplateError: All together take longer than two conversations may.
    """
    end = time.monotonic() + 2 * template.limits.seconds
    written: dict[str, list[Piece]] = {}
    for name, probe in _PROBES.items():
        if time.monotonic() > end:
            raise TemplateError(
                f"{template.name}: conversations of a few words take more than {template.limits.seconds} s"
            )
        if _known(probe, chat):
            with suppress(TemplateError):  # such as a template that refuses system messages
                written[name] = _render(template, chat, probe)
    return written


def _known(probe: _Probe, chat: ChatFormat) -> bool:
    return {"video": chat.video_token is not None, "tools": chat.tools}.get(probe.kind, True)


def _difference(written: Mapping[str, list[Piece]], chat: ChatFormat, probes: Mapping[str, _Probe]) -> str:
    """What was first written otherwise than the format writes it; empty where they agree on all."""
    different = ""
    for name, probe in probes.items():
        if not _known(probe, chat):
            continue
        expected = chat_pieces(probe.messages, chat, add_generation_prompt=probe.prompt, tools=probe.tools)
        pieces = written.get(name, [])
        if _slots(pieces) != _slots(expected):
            return f"{_PLACES}{name}"
        if not different and _joined(pieces) != _joined(expected):
            different = name
    return different


def _try(template: ChatTemplate, chat: ChatFormat) -> None:
    """Raise what the template raises, if it writes a question neither as parts nor as a text."""
    try:
        _render(template, chat, _PROBES["a question"])
    except TemplateError:
        _render(template, chat, _PROBES["a question of spaces and line breaks"])


def _render(template: ChatTemplate, chat: ChatFormat, probe: _Probe) -> list[Piece]:
    variables = {} if probe.tools is None else {"tools": probe.tools}
    pieces = template.pieces(
        probe.messages,
        chat.special_names(),
        chat.image_token,
        chat.video_token,
        answer_tokens=chat.special_names(),
        add_generation_prompt=probe.prompt,
        variables=variables,
    )
    return without_outer_marks(pieces, chat)


def _slots(pieces: Sequence[Piece]) -> list[type]:
    return [type(piece) for piece in pieces if not isinstance(piece, Text)]


def _joined(pieces: Sequence[Piece]) -> str:
    marks = {ImageSlot: "\0image\0", VideoSlot: "\0video\0"}
    return "".join(piece.text if isinstance(piece, Text) else marks[type(piece)] for piece in pieces)
