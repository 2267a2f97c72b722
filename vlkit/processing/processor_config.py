"""ProcessorConfig: all that a processor is, except its vocabulary."""

from __future__ import annotations

from typing import Literal

from vlkit.config import Config, Count, Size
from vlkit.errors import ConfigError
from vlkit.processing.chat_format import CHAT_FORMATS, ChatFormat
from vlkit.processing.image_reading import ReadRule
from vlkit.processing.image_rule import ImageRule
from vlkit.processing.video_rule import VideoRule


class ProcessorConfig(Config):
    """All that a processor is, except its vocabulary.

    Attributes:
        tokenizer: "bytes" is built in; "files" means tiktoken.model, *.tiktoken or tokenizer.json beside the config.
        chat: How conversations are written.
        template: A checkpoint's jinja chat template, or None. With one, `chat` only names the image token, what stops
            an answer, and the special tokens that an answer may hold.
        image: Sizes and statistics of images.
        video: Sampling and sizes of videos, or None where the model sees none.
        reading: What is accepted as an image.
        stop_ids: Ids that end an answer besides those of `chat`.
        max_length: Longest sequence in tokens, or None. Longer ones are refused, never cut.
    """

    tokenizer: Literal["bytes", "files"] = "bytes"
    chat: ChatFormat = CHAT_FORMATS["plain"]
    template: str | None = None
    image: ImageRule = ImageRule()
    video: VideoRule | None = None
    reading: ReadRule = ReadRule()
    stop_ids: tuple[Count, ...] = ()
    max_length: Size | None = None

    def check(self) -> None:
        if self.video is not None and self.chat.video_token is None:
            raise ConfigError("ProcessorConfig.video is given, but the chat format has no video_token")
