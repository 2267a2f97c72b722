"""SpecialTokens: the names that are one id each, found in a text only where the caller says so."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from vlkit.errors import ConfigError, TokenError


class SpecialTokens:
    """Names that are one id each.

    Args:
        ids: Name to id.
        shown: Names that decoding keeps even when specials are skipped, such as "<think>".
        strip_left: Names that swallow white space before them.
        strip_right: Names that swallow white space after them.

    Raises:
        TokenError: Two names have one id.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        *,
        shown: Collection[str] = (),
        strip_left: Collection[str] = (),
        strip_right: Collection[str] = (),
    ) -> None:
        self.ids = dict(ids)
        self.names = {id: name for name, id in self.ids.items()}
        if len(self.names) != len(self.ids):
            name = next(name for name, id in self.ids.items() if self.names[id] != name)
            raise TokenError(
                f"the special tokens {name!r} and {self.names[self.ids[name]]!r} both have id {self.ids[name]}"
            )
        self.skipped = frozenset(id for name, id in self.ids.items() if name not in shown)
        self._strip_left, self._strip_right = frozenset(strip_left), frozenset(strip_right)
        self._patterns: dict[frozenset[str], re.Pattern[str]] = {}

    def split(self, text: str, allowed: bool | Collection[str]) -> Iterator[str | int]:
        """The text as ids of the allowed names and the plain text between them.

        Args:
            allowed: True for every name, False for none, or the names.

        Raises:
            TokenError: An allowed name is not a special token.
        """
        names = frozenset(self.ids if allowed is True else allowed or ())
        if not names:
            if text:
                yield text
            return
        if names not in self._patterns:
            for name in names:
                if name not in self.ids:
                    raise TokenError(
                        f"{name!r} is not a special token of this tokenizer; it has {', '.join(list(self.ids)[:20])}"
                    )
            # Longest first: of two names that start alike the longer one is meant.
            self._patterns[names] = re.compile("|".join(map(self._pattern, sorted(names, key=len, reverse=True))))
        end = 0
        for match in self._patterns[names].finditer(text):
            if match.start() > end:
                yield text[end : match.start()]
            yield self.ids[match[0].strip() if match[0] not in self.ids else match[0]]
            end = match.end()
        if end < len(text):
            yield text[end:]

    def _pattern(self, name: str) -> str:
        left, right = r"\s*" * (name in self._strip_left), r"\s*" * (name in self._strip_right)
        return left + re.escape(name) + right

    def runs(self, ids: Iterable[int], skip_special: bool) -> Iterator[str | list[int]]:
        """The ids as names of specials (left out if skipped) and runs of ordinary ids between them."""
        for special, run in groupby(ids, key=self.names.__contains__):
            if not special:
                yield list(run)
            elif skip_special:
                yield from (self.names[id] for id in run if id not in self.skipped)
            else:
                yield from (self.names[id] for id in run)


def added_tokens(config: Any, name: str) -> dict[int, dict[str, Any]] | None:
    """The tokens that a tokenizer_config.json lists under "added_tokens_decoder", by id; None where it lists none.

    Raises:
        ConfigError: The list is malformed.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{name}: expected a JSON object, found {type(config).__name__}")
    listed = config.get("added_tokens_decoder")
    if not listed:
        return None
    if not isinstance(listed, Mapping):
        raise ConfigError(f"{name}: added_tokens_decoder must be an object, found {type(listed).__name__}")
    added = {}
    for id, token in listed.items():
        if not str(id).isdecimal() or not isinstance(token, Mapping) or not isinstance(token.get("content"), str):
            raise ConfigError(
                f"{name}: added_tokens_decoder: {id!r}: {token!r} is not an id and a token with 'content'"
            )
        added[int(id)] = dict(token)
    return added


def check_text(text: str) -> None:
    """Refuse what is not text.

    Raises:
        TokenError: Not a str, or half of a surrogate pair, which has no bytes.
    """
    if not isinstance(text, str):
        raise TokenError(f"expected a text, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenError(
            f"character {error.start} is {text[error.start]!a}, half of a surrogate pair; "
            f"decode the text with errors='replace'"
        ) from error


def check_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as a list of int.

    Raises:
        TokenError: An id is not a whole number or lies outside the vocabulary.
    """
    checked = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    for place, id in enumerate(checked):
        if type(id) is not int:
            raise TokenError(f"position {place}: {id!r} is not a token id")
        if not 0 <= id < vocab_size:
            raise TokenError(f"position {place}: token id {id} is outside the vocabulary of {vocab_size}")
    return checked
