"""Processor: conversations with images -> Batch, and ids back to text.

messages --read, resize, patchify--> patches: Packed, grids --chat format--> ids with one placeholder per visual token
         -> Batch(ids, patches, labels)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from vlkit.errors import (
    ConfigError,
    EmptyBatchError,
    PlaceholderMismatchError,
    SequenceTooLongError,
    TemplateError,
    VlkitError,
)
from vlkit.hub.repository import resolve
from vlkit.hub.strict_json import read_json
from vlkit.packing import Batch, Layout, Packed
from vlkit.processing import hub_files
from vlkit.processing.chat import Message, Piece, Text, chat_pieces, check_messages, encode_pieces
from vlkit.processing.image import pack_images
from vlkit.processing.processor_config import ProcessorConfig
from vlkit.processing.template import ChatTemplate
from vlkit.processing.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

PROCESSOR_FILE = "processor.json"


class Processor:
    """Makes batches for one model.

    Args:
        config: Defaults to vlkit's plain format over bytes.
        tokenizer: Its vocabulary; needed where config.tokenizer is "files".
        hub_files: Files of a published checkpoint that say the same as config; they are written back unchanged.

    Raises:
        ConfigError: No tokenizer, or one without a special token that the chat format writes.
    """

    def __init__(
        self,
        config: ProcessorConfig | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        hub_files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.config = config or ProcessorConfig()
        self._hub_files = dict(hub_files or {})
        if tokenizer is None:
            if self.config.tokenizer != "bytes":
                raise ConfigError(
                    "ProcessorConfig.tokenizer is 'files': give the tokenizer too, or use Processor.from_pretrained"
                )
            tokenizer = ByteTokenizer()
        if isinstance(tokenizer, ByteTokenizer) != (self.config.tokenizer == "bytes"):
            raise ConfigError(
                f"ProcessorConfig.tokenizer is {self.config.tokenizer!r}, but a {type(tokenizer).__name__} was given"
            )
        self.tokenizer = tokenizer
        chat = self.config.chat
        self._template = None if self.config.template is None else ChatTemplate(self.config.template)
        for name in chat.special_names(written=self._template is None):
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
        template_variables: Mapping[str, Any] | None = None,
    ) -> Batch:
        """A batch of one conversation, or of several.

        Args:
            messages: One conversation, [{"role": ..., "content": ...}, ...], or a list of conversations.
            images: Images of the parts {"type": "image"} that hold none themselves, in order; for several conversations
                a list of lists.
            add_generation_prompt: Whether the ids end where the assistant's answer begins. Never with labels.
            answer_prefix: First characters of the answer, given to the model, such as "<think>".
            labels: Whether answers are to be learned: labels are the ids of answers and of what closes them, else -100.
            template_variables: What a jinja template reads besides the messages, such as tools or enable_thinking.

        Raises:
            TemplateError: A malformed conversation, or labels are asked for where no answer is found.
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
        if template_variables and self._template is None:
            raise TemplateError("template_variables are for a jinja template; this processor's chat format is not one")
        variables = dict(template_variables or {})
        prompt = add_generation_prompt and not labels
        batches = []
        for index, (conversation, own) in enumerate(zip(conversations, given, strict=True)):
            try:
                batches.append(self._one(conversation, own, prompt, answer_prefix, labels, variables))
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
        variables: Mapping[str, Any],
    ) -> Batch:
        chat, rule = self.config.chat, self.config.image
        sources = _filled(check_messages(messages, chat.roles if self._template is None else None), images)
        pieces = self._pieces(messages, add_generation_prompt, variables)
        if answer_prefix:
            pieces.append(Text(answer_prefix, special=chat.answer_tokens))
        if labels and not any(isinstance(piece, Text) and piece.learn for piece in pieces):
            if self._template is not None and not self._template.marks_answers:
                raise TemplateError("labels are asked for, but the template does not mark answers by {% generation %}")
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

    def _pieces(self, messages: Sequence[Message], prompt: bool, variables: Mapping[str, Any]) -> list[Piece]:
        chat = self.config.chat
        if self._template is None:
            return chat_pieces(messages, chat, add_generation_prompt=prompt)
        return self._template.pieces(
            messages,
            self.tokenizer.special,
            chat.image_token,
            answer_tokens=chat.answer_tokens,
            add_generation_prompt=prompt,
            variables=variables,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write what `from_pretrained` reads; the folder is made where it is missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.write_files(folder)

    def write_files(self, folder: str | os.PathLike[str]) -> None:
        """Write the files into a folder that exists: those of the checkpoint it came from, or processor.json."""
        if self.config.tokenizer == "files" and not self.tokenizer.files:
            raise ConfigError(
                f"the {type(self.tokenizer).__name__} has no files, so the processor could not be read again"
            )
        files = {**self.tokenizer.files, **self._hub_files}
        if not self._hub_files:
            files[PROCESSOR_FILE] = (json.dumps(self.config.to_dict(), indent=2, ensure_ascii=False) + "\n").encode()
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """The processor of a folder or repository: vlkit's own processor.json, or the files of a published checkpoint.

        Args:
            repo_or_folder: A folder, or a repository of the Hub, "owner/name".
            revision: Branch, tag or commit on the Hub; all files are of the one commit that it means now.
            cache_dir: Where the Hub client keeps its files.
            token: For private and gated repositories; by default what the Hub client knows.
            local_files_only: Use the cache alone.

        Raises:
            ConfigError: There are no such files, or one is malformed.
            TokenError: The vocabulary is missing or broken.
            OSError: What the Hub client raises.
        """
        path = resolve(
            repo_or_folder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            weights=False,
        )
        if (path / PROCESSOR_FILE).is_file():
            values = read_json(path / PROCESSOR_FILE)
            try:
                config = ProcessorConfig.from_dict(values)
            except ConfigError as error:
                raise ConfigError(f"{path / PROCESSOR_FILE}: {error}") from error
            return cls(config, ByteTokenizer() if config.tokenizer == "bytes" else load_tokenizer(path))
        config = hub_files.processor_config(path)
        kept = {name: (path / name).read_bytes() for name in hub_files.KEPT_FILES if (path / name).is_file()}
        return cls(config, load_tokenizer(path), hub_files=kept)


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
            f"{empty} image parts hold no image, {len(given)} images were given beside the messages; put each image "
            f"into its part, {{'type': 'image', 'image': ...}}, or give exactly the missing ones"
        )
    rest = iter(given)
    return [next(rest) if source is None else source for source in sources]
