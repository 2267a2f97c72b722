"""Conversations -> pieces -> ids and labels.

    messages --pieces--> Text (the format's own, or a person's), ImageSlot, ... --encode_pieces--> ids, labels

What a person wrote is never read for special tokens: "<|im_end|>" in a user's text stays nine harmless characters.
Only the format itself writes control tokens. Answers may hold the few that the format names, such as "<think>".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlkit.config import Config
from vlkit.errors import ConfigError, PlaceholderMismatchError, TemplateError
from vlkit.processing.tokenizer import Tokenizer

IGNORED = -100
"""The label of a token whose prediction is not learned."""

Message = Mapping[str, Any]
"""{"role": "user", "content": "text" or [{"type": "text", "text": ...}, {"type": "image", "image": ...}]}"""


class Turn(Config):
    """What surrounds the content of one role.

    Attributes:
        role: The role as messages name it.
        prefix: Written before the content.
        suffix: Written after it. In an answer it is learned with the text.
    """

    role: str
    prefix: str
    suffix: str


class ChatFormat(Config):
    """How a conversation becomes one text. Strings may hold special tokens by name.

    Attributes:
        turns: The roles; "assistant" must be one of them, its prefix is the generation prompt.
        image_token: Stands for one visual token; repeated as often as the projector gives tokens.
        image_prefix: Written before an image; "{number}" becomes 1, 2, ... over the conversation.
        image_suffix: Written after it.
        default_system: Content of the system turn that a conversation without one gets, or None.
        stop: Tokens that end an answer.
        answer_tokens: Special tokens that are read as such inside an answer.
        thinking_end: Where the thinking of an answer ends, or None. Earlier answers then lose everything up to it.
    """

    turns: tuple[Turn, ...]
    image_token: str
    image_prefix: str = ""
    image_suffix: str = ""
    default_system: str | None = None
    stop: tuple[str, ...] = ()
    answer_tokens: tuple[str, ...] = ()
    thinking_end: str | None = None

    def check(self) -> None:
        roles = self.roles
        if len(set(roles)) != len(roles) or "assistant" not in roles:
            raise ConfigError(
                f"ChatFormat.turns: roles must differ and include 'assistant', found {', '.join(roles) or 'none'}"
            )
        if self.default_system is not None and "system" not in roles:
            raise ConfigError("ChatFormat.default_system needs a turn for the role 'system'")
        if not self.image_token:
            raise ConfigError("ChatFormat.image_token is empty")

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(turn.role for turn in self.turns)

    @property
    def generation_prompt(self) -> str:
        """What the model continues: the beginning of an assistant turn."""
        return self.turn("assistant").prefix

    def turn(self, role: str) -> Turn:
        return self.turns[self.roles.index(role)]

    def special_names(self, *, written: bool = True) -> list[str]:
        """Special tokens that the format awaits and, if asked, writes; inside strings they are known by "<|...|>"."""
        if not written:
            return list(dict.fromkeys((self.image_token, *self.stop, *self.answer_tokens)))
        texts = (
            self.image_prefix,
            self.image_suffix,
            *(text for turn in self.turns for text in (turn.prefix, turn.suffix)),
        )
        found = [name for text in texts for name in re.findall(r"<\|[^|<>]+\|>", text)]
        return list(dict.fromkeys((self.image_token, *self.stop, *self.answer_tokens, *found)))


def _turns(template: str, suffix: str) -> tuple[Turn, ...]:
    roles = ("system", "user", "assistant")
    return tuple(Turn(role=role, prefix=template.format(role=role), suffix=suffix) for role in roles)


_KIMI = ChatFormat(
    turns=_turns("<|im_{role}|>{role}<|im_middle|>", "<|im_end|>"),
    image_prefix="<|media_start|>image<|media_content|>",
    image_token="<|media_pad|>",
    image_suffix="<|media_end|>",
    default_system="You are a helpful assistant",
    stop=("<|im_end|>", "[EOS]"),
)
_CHATML = ChatFormat(
    turns=_turns("<|im_start|>{role}\n", "<|im_end|>\n"),
    image_prefix="<|vision_start|>",
    image_token="<|image_pad|>",
    image_suffix="<|vision_end|>",
    default_system="You are a helpful assistant.",
    stop=("<|im_end|>", "<|endoftext|>"),
)
CHAT_FORMATS: dict[str, ChatFormat] = {
    # Kimi-VL, arXiv:2504.07491, as its Hub repository writes conversations: no line breaks, no BOS.
    "kimi": _KIMI,
    # The same where thoughts end with a mark: earlier answers are shown without them.
    "kimi-thinking": _KIMI.replace(thinking_end="◁/think▷"),
    # Qwen2-VL and Qwen2.5-VL, arXiv:2409.12191. What closes an answer includes its line break, as in Qwen's own training.
    "chatml": _CHATML,
    "qwen3-vl": _CHATML.replace(default_system=None, answer_tokens=("<think>", "</think>")),
    # AndesVL, arXiv:2510.11496. Its vocabulary is Qwen3's with the two marks around an image renamed.
    "andesvl": _CHATML.replace(
        image_prefix="<img>",
        image_token="<|vision_pad|>",
        image_suffix="</img>",
        default_system=None,
        answer_tokens=("<think>", "</think>"),
    ),
    # Qwen-VL-Chat, arXiv:2308.12966.
    "qwen-vl": _CHATML.replace(
        image_prefix="Picture {number}: <img>",
        image_token="<imgpad>",
        image_suffix="</img>\n",
        stop=("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    ),
    # vlkit's own, for the byte tokenizer: as few ids as possible.
    "plain": ChatFormat(
        turns=_turns("<|im_{role}|>", "<|im_end|>"),
        image_prefix="<|media_start|>",
        image_token="<|media_pad|>",
        image_suffix="<|media_end|>",
        stop=("<|im_end|>", "<|eos|>"),
    ),
}
"""Known formats by name."""


class Text(NamedTuple):
    """A piece of text.

    Attributes:
        text: The characters.
        special: Special tokens that are read as such: all (True), none (False) or these.
        learn: Whether it is part of an answer.
    """

    text: str
    special: bool | tuple[str, ...] = False
    learn: bool = False


class ImageSlot(NamedTuple):
    """Where the tokens of an image stand; `image` counts the images of the conversation from 0."""

    image: int


Piece = Text | ImageSlot


def check_messages(messages: Sequence[Message], roles: Sequence[str] | None = None) -> list[Any]:
    """Refuse a conversation that would be misread.

    Returns:
        What the "image" of each image part holds, in order; None where a part has no such key.

    Raises:
        TemplateError: No messages, an unknown role or type, a missing or unknown key; with the message and part.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TemplateError(f"expected a list of messages, found {type(messages).__name__}")
    if not messages:
        raise TemplateError("the conversation has no messages")
    images = []
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, Mapping):
            raise TemplateError(f"{where}: expected {{'role': ..., 'content': ...}}, found {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise TemplateError(f"{where}: has no {key!r}; found {', '.join(map(repr, message)) or 'nothing'}")
        role, content = message["role"], message["content"]
        if roles is not None and role not in roles:
            raise TemplateError(f"{where}: role {role!r} is not one of {', '.join(roles)}")
        if isinstance(content, str):
            continue
        if not isinstance(content, Sequence) or isinstance(content, bytes):
            raise TemplateError(f"{where}: content must be a text or a list of parts, found {type(content).__name__}")
        for place, part in enumerate(content):
            at = f"{where}, part {place}"
            if not isinstance(part, Mapping) or part.get("type") not in ("text", "image"):
                kind = repr(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
                raise TemplateError(f"{at}: type {kind} is not one of 'text', 'image'")
            if part["type"] == "image":
                if role == "assistant":
                    raise TemplateError(f"{at}: an assistant cannot answer with an image")
                images.append(part.get("image"))
            elif not isinstance(part.get("text"), str):
                raise TemplateError(f"{at}: a text part needs 'text', a str; found {type(part.get('text')).__name__}")
            if unknown := set(part) - {"type", part["type"]}:
                raise TemplateError(
                    f"{at}: unknown key {sorted(map(str, unknown))[0]!r}; a part has 'type' and {part['type']!r}"
                )
    return images


def chat_pieces(messages: Sequence[Message], format: ChatFormat, *, add_generation_prompt: bool = False) -> list[Piece]:
    """The conversation as the format writes it.

    Raises:
        TemplateError: As `check_messages`.
    """
    check_messages(messages, format.roles)
    if format.default_system is not None and not any(m["role"] == "system" for m in messages):
        messages = [{"role": "system", "content": format.default_system}, *messages]
    last_user = max((i for i, m in enumerate(messages) if m["role"] != "assistant"), default=-1)
    pieces: list[Piece] = []
    num_images = 0
    for index, message in enumerate(messages):
        turn, content = format.turn(message["role"]), message["content"]
        answer = turn.role == "assistant"
        pieces.append(Text(turn.prefix, special=True))
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                prefix = format.image_prefix.replace("{number}", str(num_images + 1))
                pieces += [Text(prefix, special=True), ImageSlot(num_images), Text(format.image_suffix, special=True)]
                num_images += 1
            elif answer:
                text = part["text"]
                if format.thinking_end is not None and index < last_user:
                    text = text.rsplit(format.thinking_end, 1)[-1]
                pieces.append(Text(text, special=format.answer_tokens, learn=True))
            else:
                pieces.append(Text(part["text"]))
        pieces.append(Text(turn.suffix, special=True, learn=answer))
    if add_generation_prompt:
        pieces.append(Text(format.generation_prompt, special=True))
    return [piece for piece in pieces if not isinstance(piece, Text) or piece.text]


def encode_pieces(
    pieces: Sequence[Piece], tokenizer: Tokenizer, image_token: int, image_tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Ids, and labels aligned with them.

    Texts are joined before they are tokenised, as if all had been one text: a line break that ends a prefix and one
    that starts a question share a token, as on the Hub. Only where an answer begins they do not, as in generation.

    Args:
        image_token: Id that stands for one visual token.
        image_tokens: Tokens of each image.

    Returns:
        Ids, and labels: the id where it is learned, -100 elsewhere.

    Raises:
        PlaceholderMismatchError: Another number of image slots than of images.
    """
    slots = sum(isinstance(piece, ImageSlot) for piece in pieces)
    if slots != len(image_tokens):
        raise PlaceholderMismatchError(
            f"the text has {slots} image placeholders, {len(image_tokens)} images were given"
        )
    ids: list[int] = []
    labels: list[int] = []
    plain, plain_learn = "", False

    def add(new: list[int], learn: bool) -> None:
        ids.extend(new)
        labels.extend(new if learn else [IGNORED] * len(new))

    for piece in pieces:
        learn = isinstance(piece, Text) and piece.learn
        if learn != plain_learn:
            add(tokenizer.encode(plain), plain_learn)
            plain, plain_learn = "", learn
        if isinstance(piece, ImageSlot):
            add(tokenizer.encode(plain), learn)
            add([image_token] * image_tokens[piece.image], learn)
            plain = ""
            continue
        for part in tokenizer.split(piece.text, piece.special):
            if isinstance(part, int):
                add(tokenizer.encode(plain), learn)
                add([part], learn)
                plain = ""
            else:
                plain += part
    add(tokenizer.encode(plain), plain_learn)
    return ids, labels
