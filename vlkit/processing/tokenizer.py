"""Tokenizer: what text processing needs of one, a built-in one over bytes, and the choice by the files of a folder.

text --encode--> ids --decode--> text        special names in a user's text stay plain text unless they are allowed
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from vlkit.errors import TokenError
from vlkit.processing.special_tokens import SpecialTokens, check_ids, check_text


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        special: Names that are one id each.
        vocab_size: All ids are below it.
        files: File name to content: what `load_tokenizer` needs to make it again.
    """

    special: dict[str, int]
    vocab_size: int
    files: Mapping[str, bytes]

    def encode(self, text: str, allow_special: bool | Collection[str] = False) -> list[int]:
        """The ids of a text.

        Args:
            allow_special: Whether names of special tokens become their id: all (True), none (False: they are
                text like any other), or these names.

        Raises:
            TokenError: The text has half a surrogate pair, or an allowed name is no special token.
        """
        ...

    def split(self, text: str, allow_special: bool | Collection[str]) -> Iterable[str | int]:
        """The text as ids of allowed special tokens and the plain text between them.

        Raises:
            TokenError: An allowed name is no special token.
        """
        ...

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            TokenError: An id outside the vocabulary.
        """
        ...


_BYTE_SPECIALS = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|im_end|>",
    "<|im_system|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_middle|>",
    "<|media_start|>",
    "<|media_content|>",
    "<|media_end|>",
    "<|media_pad|>",
    # What the chat formats of the published families write.
    "<|im_start|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<img>",
    "</img>",
    "<imgpad>",
    "<think>",
    "</think>",
)
_SHOWN = ("<think>", "</think>")  # parts of an answer: decoding keeps them


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8, the special tokens follow from 256; the rest of the 320 ids is unused."""

    vocab_size = 320
    files: Mapping[str, bytes] = {}

    def __init__(self) -> None:
        self._special = SpecialTokens({name: 256 + index for index, name in enumerate(_BYTE_SPECIALS)}, shown=_SHOWN)
        self.special = self._special.ids

    def encode(self, text: str, allow_special: bool | Collection[str] = False) -> list[int]:
        check_text(text)
        ids: list[int] = []
        for part in self._special.split(text, allow_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(part.encode())
        return ids

    def split(self, text: str, allow_special: bool | Collection[str]) -> Iterable[str | int]:
        return self._special.split(text, allow_special)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        ids = check_ids(ids, self.vocab_size)
        parts = self._special.runs(ids, skip_special)
        # Unused ids have no byte; a model that was never taught them may still pick one.
        return "".join(
            part if isinstance(part, str) else b"".join(_byte(id) for id in part).decode(errors="replace")
            for part in parts
        )


def _byte(id: int) -> bytes:
    return bytes((id,)) if id < 256 else "\ufffd".encode()


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer whose files lie in a folder: tiktoken.model or *.tiktoken, else tokenizer.json.

    Raises:
        TokenError: No such file, or a broken one.
    """
    path = Path(folder)
    if (path / "tiktoken.model").is_file() or any(path.glob("*.tiktoken")):
        from vlkit.processing.tiktoken_tokenizer import TiktokenTokenizer

        return TiktokenTokenizer.from_folder(path)
    if (path / "tokenizer.json").is_file():
        from vlkit.processing.json_tokenizer import JsonTokenizer

        return JsonTokenizer.from_folder(path)
    found = ", ".join(sorted(p.name for p in path.glob("*"))[:10]) if path.is_dir() else "no such folder"
    raise TokenError(f"{path}: no tiktoken.model, *.tiktoken or tokenizer.json (found: {found or 'nothing'})")
