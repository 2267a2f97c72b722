"""TiktokenTokenizer: byte-pair vocabularies in tiktoken's format, as Kimi-VL and the first Qwen models publish them.

text --normalise, cut at special names and over-long runs--> pieces --byte pairs--> ids
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Self

from vlkit.errors import TokenError
from vlkit.hub.strict_json import read_json
from vlkit.processing.special_tokens import SpecialTokens, added_tokens, check_ids, check_text


class Vocabulary(NamedTuple):
    """What a family adds to its list of byte strings.

    Attributes:
        pattern: Alternatives by which text falls apart before byte pairs are merged.
        normalize: Unicode form that texts are brought into first, or None.
        special: Names of special tokens, by their distance from the last byte string, for folders that list none.
        num_special: Ids kept for special tokens; those without a name are called "<|reserved_token_ID|>".
    """

    pattern: str
    normalize: Literal["NFC"] | None
    special: Mapping[int, str]
    num_special: int


_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

KIMI = Vocabulary(
    pattern="|".join(
        (
            r"[\p{Han}]+",
            rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_ENDINGS}?",
            rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_ENDINGS}?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
    normalize=None,
    special={
        0: "[BOS]",
        1: "[EOS]",
        2: "<|im_end|>",
        3: "<|im_user|>",
        4: "<|im_assistant|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "[EOT]",
        10: "<|im_system|>",
        17: "<|im_middle|>",
        18: "<|media_start|>",
        19: "<|media_content|>",
        20: "<|media_end|>",
        21: "<|media_pad|>",
        254: "[UNK]",
        255: "[PAD]",
    },
    num_special=256,
)
"""Moonlight and Kimi-VL, arXiv:2504.07491."""

QWEN = Vocabulary(
    pattern="|".join(
        (
            _ENDINGS,
            r"[^\r\n\p{L}\p{N}]?\p{L}+",
            r"\p{N}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
    normalize="NFC",
    special=dict(
        enumerate(
            (
                *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
                *(f"<|extra_{index}|>" for index in range(205)),
                *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
            )
        )
    ),
    num_special=217,
)
"""Qwen and Qwen-VL, arXiv:2308.12966. Later Qwens name other specials; their folders list them."""

_LONGEST_TEXT = 400_000  # characters; the regex engine's stack overflows on longer ones
_LONGEST_RUN = 25_000  # characters of white space, or of anything else, in one piece


class TiktokenTokenizer:
    """Byte pairs over a list of byte strings.

    Texts of more than 400,000 characters, and runs of more than 25,000 characters of white space or of anything else,
    are cut there, as the published Kimi tokenizer does.

    Args:
        ranks: Byte string to id; the ids are 0, 1, 2, ...
        special: Names with an id of their own.
        files: What `write_files` of a processor writes to make it again.

    Raises:
        TokenError: Ids with gaps, a missing single byte, or a special token on the id of a byte string.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        vocabulary: Vocabulary,
        special: SpecialTokens,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        import tiktoken

        size = len(ranks)
        if set(ranks.values()) != set(range(size)):
            raise TokenError(f"the {size} byte strings do not have the ids 0 to {size - 1}, each once")
        if missing := [byte for byte in range(256) if bytes((byte,)) not in ranks]:
            raise TokenError(
                f"the vocabulary has no token for the single byte {missing[0]:#04x}; not every text can be written"
            )
        if taken := [name for name, id in special.ids.items() if id < size]:
            raise TokenError(f"the special token {taken[0]!r} has id {special.ids[taken[0]]}, which is a byte string's")
        self._special = special
        self.special = special.ids
        self.vocab_size = max(size - 1, *self.special.values()) + 1 if self.special else size
        self.files: Mapping[str, bytes] = dict(files or {})
        self._num_ranks = size
        self._normalize = vocabulary.normalize
        self._encoding = tiktoken.Encoding(
            "vlkit", pat_str=vocabulary.pattern, mergeable_ranks=dict(ranks), special_tokens={}
        )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Self:
        """Read tiktoken.model (Kimi) or a *.tiktoken file (Qwen), and the special tokens in tokenizer_config.json.

        Raises:
            TokenError: No or several such files, or a broken one.
            ConfigError: tokenizer_config.json is not JSON.
        """
        folder = Path(folder)
        found = (
            [folder / "tiktoken.model"] if (folder / "tiktoken.model").is_file() else sorted(folder.glob("*.tiktoken"))
        )
        if len(found) != 1:
            raise TokenError(f"{folder}: expected tiktoken.model or one *.tiktoken file, found {len(found)}")
        path = found[0]
        vocabulary = KIMI if path.name == "tiktoken.model" else QWEN
        content = path.read_bytes()
        files = {path.name: content}
        ranks = _read_ranks(content, path)
        special = {len(ranks) + place: name for place, name in vocabulary.special.items()}
        shown: list[str] = []
        config_path = folder / "tokenizer_config.json"
        if config_path.is_file():
            files[config_path.name] = config_path.read_bytes()
            added = added_tokens(read_json(config_path), str(config_path))
            if added is not None:
                special = {id: str(token["content"]) for id, token in added.items()}
                shown = [str(token["content"]) for token in added.values() if not token.get("special", True)]
        for id in range(len(ranks), len(ranks) + vocabulary.num_special):
            special.setdefault(id, f"<|reserved_token_{id}|>")
        tokens = SpecialTokens({name: id for id, name in sorted(special.items())}, shown=shown)
        if len(tokens.ids) != len(special):
            raise TokenError(f"{config_path}: a special token is listed under two ids")
        return cls(ranks, vocabulary, tokens, files)

    def encode(self, text: str, allow_special: bool | Collection[str] = False) -> list[int]:
        check_text(text)
        ids: list[int] = []
        for part in self._special.split(text, allow_special):
            if isinstance(part, int):
                ids.append(part)
                continue
            if self._normalize is not None:
                part = unicodedata.normalize(self._normalize, part)
            for piece in _cut(part):
                ids.extend(self._encoding.encode_ordinary(piece))
        return ids

    def split(self, text: str, allow_special: bool | Collection[str]) -> Iterable[str | int]:
        return self._special.split(text, allow_special)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        runs = self._special.runs(check_ids(ids, self.vocab_size), skip_special)
        return b"".join(run.encode() if isinstance(run, str) else self._bytes(run) for run in runs).decode(
            errors="replace"
        )

    def _bytes(self, ids: list[int]) -> bytes:
        if max(ids) < self._num_ranks:
            return self._encoding.decode_bytes(ids)
        return b"".join(self._encoding.decode_bytes([id]) if id < self._num_ranks else b"\xff" for id in ids)


def _cut(text: str) -> Iterator[str]:
    """The text in pieces that the regex engine can take."""
    for begin in range(0, len(text), _LONGEST_TEXT):
        chunk = text[begin : begin + _LONGEST_TEXT]
        start = 0
        if len(chunk) > _LONGEST_RUN:
            for run in re.finditer(r"\s+|\S+", chunk):
                for end in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
                    yield chunk[start:end]
                    start = end
        yield chunk[start:]


def _read_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    if content.startswith(b"version https://git-lfs"):
        raise TokenError(f"{path}: this is a Git LFS pointer, not the vocabulary; run `git lfs pull`")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenError(f"{path}: line {number} is not a base64 byte string and its id: {line[:60]!r}") from error
    return ranks
