"""Processor: conversations with images and videos -> Batch, and ids back to text.

messages --read, resize, patchify--> patches: Packed, grids --chat format--> ids with one placeholder per visual token
         -> Batch(ids, patches, labels, seconds)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from vlkit.errors import (
    CheckpointError,
    ConfigError,
    EmptyBatchError,
    TemplateError,
    VlkitError,
)
from vlkit.hub.repository import resolve
from vlkit.hub.strict_json import read_json
from vlkit.packing import Batch, Layout, Packed
from vlkit.processing import hub_files, visuals
from vlkit.processing.chat import (
    Message,
)
from vlkit.processing.conversation import ConversationWriter, Writing
from vlkit.processing.image import pack_canvases
from vlkit.processing.labels import LabelRule
from vlkit.processing.processor_config import ProcessorConfig
from vlkit.processing.template import ChatTemplate
from vlkit.processing.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from vlkit.processing.visuals import Prepared

PROCESSOR_FILE = "processor.json"


class Measure(NamedTuple):
    """What a conversation costs.

    Attributes:
        tokens: Its ids, those that stand for images included.
        patches: Of all its images and videos.
    """

    tokens: int
    patches: int


class _Draft(NamedTuple):
    """A conversation before it is part of a batch."""

    ids: list[int]
    labels: list[int]
    prepared: list[Prepared]


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
        self._config = config or ProcessorConfig()
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
        template = None if self.config.template is None else ChatTemplate(self.config.template)
        for name in chat.special_names(written=template is None):
            if name not in tokenizer.special:
                raise ConfigError(
                    f"the chat format writes {name!r}, which is no special token of the tokenizer; it has "
                    f"{', '.join(list(tokenizer.special)[:20])}"
                )
        self.image_token_id: int = tokenizer.special[chat.image_token]
        self.video_token_id: int | None = tokenizer.special[chat.video_token] if chat.video_token else None
        self.stop_ids: tuple[int, ...] = tuple(
            dict.fromkeys((*(tokenizer.special[name] for name in chat.stop), *self.config.stop_ids))
        )
        chat = chat.replace(answer_tokens=tuple(name for name in chat.answer_tokens if name in tokenizer.special))
        self._writer = ConversationWriter(chat, template, tokenizer, self.stop_ids, self.config.max_length)

    @property
    def config(self) -> ProcessorConfig:
        """What it was made from. For another, make another: Processor(processor.config.replace(...), processor.tokenizer)."""
        return self._config

    def __call__(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        images: Any = None,
        videos: Any = None,
        *,
        add_generation_prompt: bool = True,
        answer_prefix: str = "",
        labels: bool | LabelRule = False,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        number_visuals: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        max_pixels: int | None = None,
    ) -> Batch:
        """A batch of one conversation, or of several.

        Args:
            messages: One conversation, [{"role": ..., "content": ...}, ...], or a list of conversations.
            images: Images of the parts {"type": "image"} that hold none themselves, in order; one image needs no list. For
                several conversations a list with the images of each.
            videos: The same for parts {"type": "video"}. A video that is a list of frames is put into another list.
            add_generation_prompt: Whether the ids end where the assistant's answer begins. Never with labels.
            answer_prefix: First characters of the answer, given to the model.
            labels: Whether answers are to be learned: labels are the ids of answers and of what closes them, else -100. A
                LabelRule says what else, or which of them.
            thinking: Whether the answer begins with thoughts, for formats that can be told.
            tools: Signatures of tools, as JSON objects, for formats that know tools.
            number_visuals: Whether "Picture 1: " and the like stand before images and videos.
            template_variables: What a jinja template reads besides messages, tools, enable_thinking and add_vision_id.
            max_pixels: Most pixels of an image, and of each frame of a video, where the rules allow more. As hard a bound as
                the rule's own: letterboxes round up after it.

        Raises:
            TemplateError: A malformed conversation, or labels are asked for where no answer is found.
            PlaceholderMismatchError: Another number of images or videos than of parts without one.
            ImageError: An image cannot be read or does not fit the rule.
            VideoError: A video cannot be read or does not fit the rules.
            SequenceTooLongError: A sequence is longer than max_length.
            EmptyBatchError: No conversations.
            ConfigError: max_pixels is below one token, or all images have one size.

        Every message begins with "conversation <index>" where several were given.
        """
        several = _several(messages)
        conversations: Sequence[Any] = messages if several else [messages]
        if not conversations:
            raise EmptyBatchError("no conversations; a batch needs at least one")
        options = self._writer.options(
            add_generation_prompt, answer_prefix, labels, thinking, tools, number_visuals, template_variables
        )
        config = visuals.limited(self.config, max_pixels)
        given_images = visuals.beside(images, "images", len(conversations), several)
        given_videos = visuals.beside(videos, "videos", len(conversations), several)
        drafts = []
        for index, conversation in enumerate(conversations):
            try:
                drafts.append(self._draft(conversation, given_images[index], given_videos[index], config, options))
            except VlkitError as error:
                if not several:
                    raise
                raise type(error)(f"conversation {index}: {error}") from error
        return self._batch(drafts, options.rule is not None)

    def measure(
        self,
        messages: Sequence[Message],
        images: Any = None,
        videos: Any = None,
        *,
        add_generation_prompt: bool = True,
        answer_prefix: str = "",
        labels: bool | LabelRule = False,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        number_visuals: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        max_pixels: int | None = None,
    ) -> Measure:
        """What one conversation costs: the tokens and patches of the batch that the same arguments make of it.

        Images are looked at by their headers alone, videos by theirs and the first frame, so that what is wrong with pixels
        shows only when they are read.

        Args:
            messages: As in a call; and so on for all others.

        Raises:
            VlkitError: As a call.
        """
        if _several(messages):
            raise TemplateError("measure takes one conversation, a list of messages; found several")
        options = self._writer.options(
            add_generation_prompt, answer_prefix, labels, thinking, tools, number_visuals, template_variables
        )
        config = visuals.limited(self.config, max_pixels)
        [given_images], [given_videos] = (
            visuals.beside(given, kind, 1, False) for given, kind in ((images, "images"), (videos, "videos"))
        )
        written = self._writer.written(messages, given_images, given_videos, options)
        measured = visuals.measure(written.visuals, config)
        ids, _ = self._writer.encoded(written, [each.seen for each in measured], options.rule)
        return Measure(len(ids), sum(each.patches for each in measured))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids, without special tokens unless they are wanted."""
        return self.tokenizer.decode(ids, skip_special)

    def _draft(
        self,
        messages: Sequence[Message],
        images: list[Any],
        videos: list[Any],
        config: ProcessorConfig,
        options: Writing,
    ) -> _Draft:
        written = self._writer.written(messages, images, videos, options)
        prepared = visuals.prepare(written.visuals, config)
        ids, labels = self._writer.encoded(written, [each.seen for each in prepared], options.rule)
        return _Draft(ids, labels, prepared)

    def _batch(self, drafts: Sequence[_Draft], labels: bool) -> Batch:
        """One batch of all conversations; what they see is written into its place once."""
        prepared = [each for draft in drafts for each in draft.prepared]
        patches, seconds = None, None
        if prepared:
            patches = pack_canvases([each.canvases for each in prepared], self.config.image)
            if any(each.seen.times for each in prepared):
                apart = self.config.chat.frames_apart
                seconds = tuple(each.seconds for each in prepared for _ in range(len(each.seen.tokens) if apart else 1))
                patches = Packed(patches.tokens, patches.layout.frames()) if apart else patches
        return Batch(
            ids=Packed(
                torch.tensor([id for draft in drafts for id in draft.ids]),
                Layout(tuple(len(draft.ids) for draft in drafts)),
            ),
            patches=patches,
            labels=torch.tensor([id for draft in drafts for id in draft.labels]) if labels else None,
            seconds=seconds,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write what `from_pretrained` reads; the folder is made where it is missing.

        Raises:
            CheckpointError: The folder cannot be made or written.
        """
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be made a folder to save into: {error}") from error
        self.write_files(folder)

    def write_files(self, folder: str | os.PathLike[str]) -> None:
        """Write the files into a folder that exists: those of the checkpoint it came from, or processor.json.

        A processor.json that is there is replaced, or removed where it would hide the files of the checkpoint.
        """
        if self.config.tokenizer == "files" and not self.tokenizer.files:
            raise ConfigError(
                f"the {type(self.tokenizer).__name__} has no files, so the processor could not be read again"
            )
        files = {**self.tokenizer.files, **self._hub_files}
        for name in hub_files.SHARED_FILES:  # a model beside it writes these itself
            if (Path(folder) / name).exists():
                files.pop(name, None)
        if not self._hub_files:
            files[PROCESSOR_FILE] = (json.dumps(self.config.to_dict(), indent=2, ensure_ascii=False) + "\n").encode()
        else:
            (Path(folder) / PROCESSOR_FILE).unlink(missing_ok=True)
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
        kept = {
            name: (path / name).read_bytes()
            for name in (*hub_files.KEPT_FILES, *hub_files.SHARED_FILES)
            if (path / name).is_file()
        }
        return cls(config, load_tokenizer(path), hub_files=kept)


def _several(messages: Any) -> bool:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TemplateError(f"expected a list of messages, found {type(messages).__name__}")
    return not messages or not isinstance(messages[0], (Mapping, str))
