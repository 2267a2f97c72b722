"""ProcessorConfig: all that a processor is, except its vocabulary."""

from __future__ import annotations

from typing import Literal

from vlkit.config import Config, Size
from vlkit.processing.chat import CHAT_FORMATS, ChatFormat
from vlkit.processing.image_reading import ReadRule
from vlkit.processing.image_rule import ImageRule


class ProcessorConfig(Config):
    """All that a processor is, except its vocabulary.

    Attributes:
        tokenizer: "bytes" is built in; "files" means tiktoken.model, *.tiktoken or tokenizer.json beside the config.
        chat: How conversations are written.
        template: A checkpoint's jinja chat template, or None. With one, `chat` only names the image token, what stops
            an answer, and the special tokens that an answer may hold.
        image: Sizes and statistics of images.
        reading: What is accepted as an image.
        max_length: Longest sequence in tokens, or None. Longer ones are refused, never cut.
    """

    tokenizer: Literal["bytes", "files"] = "bytes"
    chat: ChatFormat = CHAT_FORMATS["plain"]
    template: str | None = None
    image: ImageRule = ImageRule()
    reading: ReadRule = ReadRule()
    max_length: Size | None = None
