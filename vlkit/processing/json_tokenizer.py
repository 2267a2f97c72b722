"""JsonTokenizer: a tokenizer.json, read by the `tokenizers` package.

text --cut at special names--> pieces --the file's own normaliser, splitter and merges--> ids
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Self

from vlkit.errors import TokenError
from vlkit.processing.special_tokens import SpecialTokens, check_ids, check_text


class JsonTokenizer:
    """A tokenizer.json.

    The file's added tokens are taken out and matched here, so that a person's text can hold their names as plain text;
    the package would always read them as tokens. No BOS or EOS is added: that is the chat format's business.

    Args:
        content: The bytes of tokenizer.json.
        files: What `write_files` of a processor writes to make it again.

    Raises:
        TokenError: The file is not a tokenizer.
    """

    def __init__(
        self, content: bytes, files: Mapping[str, bytes] | None = None, *, name: str = "tokenizer.json"
    ) -> None:
        import tokenizers

        if content.startswith(b"version https://git-lfs"):
            raise TokenError(f"{name}: this is a Git LFS pointer, not the vocabulary; run `git lfs pull`")
        try:
            whole = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenError(f"{name}: not a tokenizer: {error}") from error
        added = whole.get_added_tokens_decoder()
        try:
            self._special = SpecialTokens(
                {token.content: id for id, token in added.items()},
                shown=[token.content for token in added.values() if not token.special],
                strip_left=[token.content for token in added.values() if token.lstrip],
                strip_right=[token.content for token in added.values() if token.rstrip],
            )
        except TokenError as error:
            raise TokenError(f"{name}: {error}") from error
        self._tokenizer = tokenizers.Tokenizer(whole.model)
        self._tokenizer.normalizer = whole.normalizer
        self._tokenizer.pre_tokenizer = whole.pre_tokenizer
        self._tokenizer.decoder = whole.decoder
        self.special = self._special.ids
        vocabulary = self._tokenizer.get_vocab().values()
        self.vocab_size = max((*vocabulary, *self.special.values()), default=-1) + 1
        self.files: Mapping[str, bytes] = dict(files or {"tokenizer.json": content})

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Self:
        """Read tokenizer.json; tokenizer_config.json is kept beside it.

        Raises:
            TokenError: No such file, or a broken one.
        """
        folder = Path(folder)
        names = [name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).is_file()]
        if "tokenizer.json" not in names:
            raise TokenError(f"{folder}: no tokenizer.json")
        files = {name: (folder / name).read_bytes() for name in names}
        return cls(files["tokenizer.json"], files, name=str(folder / "tokenizer.json"))

    def encode(self, text: str, allow_special: bool | Collection[str] = False) -> list[int]:
        check_text(text)
        ids: list[int] = []
        for part in self._special.split(text, allow_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._tokenizer.encode(part, add_special_tokens=False).ids)
        return ids

    def split(self, text: str, allow_special: bool | Collection[str]) -> Iterable[str | int]:
        return self._special.split(text, allow_special)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        runs = self._special.runs(check_ids(ids, self.vocab_size), skip_special)
        return "".join(
            run if isinstance(run, str) else self._tokenizer.decode(run, skip_special_tokens=False) for run in runs
        )
