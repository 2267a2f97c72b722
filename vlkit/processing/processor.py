"""Processor: conversations with images -> Batch, and ids back to text.

messages --read, resize, patchify--> patches: Packed, grids --chat format--> ids with one placeholder per visual token
         -> Batch(ids, patches, labels)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch

from vlkit.config import Config, Size
from vlkit.errors import (
    ConfigError,
    EmptyBatchError,
    PlaceholderMismatchError,
    SequenceTooLongError,
    TemplateError,
    VlkitError,
)
from vlkit.packing import Batch, Layout, Packed
from vlkit.processing.chat import CHAT_FORMATS, ChatFormat, Message, Text, chat_pieces, check_messages, encode_pieces
from vlkit.processing.image import pack_images
from vlkit.processing.image_reading import ReadRule
from vlkit.processing.image_rule import ImageRule
from vlkit.processing.special_tokens import check_ids
from vlkit.processing.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

PROCESSOR_FILE = "processor.json"


class ProcessorConfig(Config):
    """All that a processor is, except its vocabulary.

    Attributes:
        tokenizer: "bytes" is built in; "files" means tiktoken.model, *.tiktoken or tokenizer.json beside the config.
        chat: How conversations are written.
        image: Sizes and statistics of images.
        reading: What is accepted as an image.
        max_length: Longest sequence in tokens, or None. Longer ones are refused, never cut.
    """

    tokenizer: Literal["bytes", "files"] = "bytes"
    chat: ChatFormat = CHAT_FORMATS["plain"]
    image: ImageRule = ImageRule()
    reading: ReadRule = ReadRule()
    max_length: Size | None = None


class Processor:
    """Makes batches for one model.

    Args:
        config: Defaults to vlkit's plain format over bytes.
        tokenizer: Its vocabulary; needed where config.tokenizer is "files".

    Raises:
        ConfigError: No tokenizer, or one without a special token that the chat format writes.
    """

    def __init__(self, config: ProcessorConfig | None = None, tokenizer: Tokenizer | None = None) -> None:
        self.config = config or ProcessorConfig()
        if tokenizer is None:
            if self.config.tokenizer != "bytes":
                raise ConfigError(
                    "ProcessorConfig.tokenizer is 'files': give the tokenizer too, or use Processor.from_pretrained"
                )
            tokenizer = ByteTokenizer()
        self.tokenizer = tokenizer
        chat = self.config.chat
        for name in (chat.image_token, *chat.stop, *chat.answer_tokens):
            if name not in tokenizer.special:
                raise ConfigError(
                    f"the chat format writes {name!r}, which is no special token of the tokenizer; it has "
                    f"{', '.join(list(tokenizer.special)[:20])}"
                )
        self.image_token_id: int = tokenizer.special[chat.image_token]
        self.stop_ids: tuple[int, ...] = tuple(tokenizer.special[name] for name in chat.stop)

    def __call__(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        images: Sequence[Any] | Sequence[Sequence[Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        answer_prefix: str = "",
        labels: bool = False,
    ) -> Batch:
        """A batch of one conversation, or of several.

        Args:
            messages: One conversation, [{"role": ..., "content": ...}, ...], or a list of conversations.
            images: Images of the parts {"type": "image"} that hold none themselves, in order; a list of lists if messages is.
            add_generation_prompt: Whether the ids end where the assistant's answer begins. Never with labels.
            answer_prefix: First characters of the answer, given to the model, such as "<think>".
            labels: Whether answers are to be learned: the ids of every answer and what closes it are labels, all else is -100.

        Raises:
            TemplateError: A malformed conversation, or labels are asked for and there is no answer.
            PlaceholderMismatchError: Another number of images than of image parts without one.
            ImageError: An image cannot be read or does not fit the rule.
            SequenceTooLongError: A sequence is longer than max_length.
            EmptyBatchError: No conversations.

        Every message begins with "conversation <index>" where several were given.
        """
        if labels and answer_prefix:
            raise TemplateError(
                "answer_prefix begins an answer that is still to come; with labels=True it is there already"
            )
        several = _several(messages)
        conversations: Sequence[Any] = messages if several else [messages]
        if not conversations:
            raise EmptyBatchError("no conversations; a batch needs at least one")
        given: Sequence[Any] = [images] * len(conversations) if images is None or not several else images
        if len(given) != len(conversations):
            raise PlaceholderMismatchError(f"{len(conversations)} conversations, but {len(given)} lists of images")
        batches = []
        for index, (conversation, own) in enumerate(zip(conversations, given, strict=True)):
            try:
                batches.append(
                    self._one(conversation, own, add_generation_prompt and not labels, answer_prefix, labels)
                )
            except VlkitError as error:
                if not several:
                    raise
                raise type(error)(f"conversation {index}: {error}") from error
        return batches[0] if len(batches) == 1 else Batch.concat(batches)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids, without special tokens unless they are wanted."""
        return self.tokenizer.decode(ids, skip_special)

    def _one(
        self,
        messages: Sequence[Message],
        images: Sequence[Any] | None,
        add_generation_prompt: bool,
        answer_prefix: str,
        labels: bool,
    ) -> Batch:
        chat, rule = self.config.chat, self.config.image
        sources = _filled(check_messages(messages, chat.roles), images)
        pieces = chat_pieces(messages, chat, add_generation_prompt=add_generation_prompt)
        if answer_prefix:
            pieces.append(Text(answer_prefix, special=chat.answer_tokens))
        if labels and not any(isinstance(piece, Text) and piece.learn for piece in pieces):
            raise TemplateError("labels are asked for, but no message is the assistant's: there is nothing to learn")
        patches = pack_images(sources, rule, self.config.reading) if sources else None
        counts = [rule.num_tokens(grid[1:]) for grid in patches.layout.grids or ()] if patches is not None else []
        ids, targets = encode_pieces(pieces, self.tokenizer, self.image_token_id, counts)
        limit = self.config.max_length
        if limit is not None and len(ids) > limit:
            raise SequenceTooLongError(
                f"{len(ids)} tokens ({sum(counts)} of them for {len(counts)} images); at most {limit} fit. Shorten the "
                f"conversation, lower ImageRule.max_patches, or leave the sample out"
            )
        return Batch(
            ids=Packed(torch.tensor(ids), Layout((len(ids),))),
            patches=patches,
            labels=torch.tensor(targets) if labels else None,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write what `from_pretrained` reads; the folder is made where it is missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.write_files(folder)

    def write_files(self, folder: str | os.PathLike[str]) -> None:
        """Write the processor's files into a folder that exists."""
        content = json.dumps(self.config.to_dict(), indent=2, ensure_ascii=False) + "\n"
        files = {**self.tokenizer.files, PROCESSOR_FILE: content.encode()}
        for name, content_bytes in files.items():
            (Path(folder) / name).write_bytes(content_bytes)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """The processor of a folder: vlkit's own processor.json, or a checkpoint's Hub files.

        Raises:
            ConfigError: Neither is there, or a file is malformed.
            TokenError: The vocabulary is missing or broken.
        """
        path = Path(folder)
        if (path / PROCESSOR_FILE).is_file():
            config = ProcessorConfig.from_dict(read_json(path / PROCESSOR_FILE))
            return cls(config, ByteTokenizer() if config.tokenizer == "bytes" else load_tokenizer(path))
        raise ConfigError(f"{path}: no {PROCESSOR_FILE}")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ConfigError: It cannot be read, is not UTF-8 or not JSON; the message names the file and the line.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return values


def _several(messages: Any) -> bool:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TemplateError(f"expected a list of messages, found {type(messages).__name__}")
    return not messages or not isinstance(messages[0], (Mapping, str))


def _filled(sources: list[Any], images: Sequence[Any] | None) -> list[Any]:
    """The images of all parts, those without one filled from `images` in order."""
    empty = sum(source is None for source in sources)
    given = list(images or ())
    if empty != len(given):
        raise PlaceholderMismatchError(
            f"{empty} image parts hold no image, {len(given)} images were given beside the messages; put each image into its "
            f"part, {{'type': 'image', 'image': ...}}, or give exactly the missing ones"
        )
    rest = iter(given)
    return [next(rest) if source is None else source for source in sources]
