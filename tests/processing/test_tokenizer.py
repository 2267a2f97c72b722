from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlkit.errors import TokenError
from vlkit.processing import ByteTokenizer, Tokenizer, load_tokenizer
from vlkit.processing.special_tokens import SpecialTokens

TOKENIZER = ByteTokenizer()
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["<|im_end|>", "<|im_", "end|>", " ", "a", "<|", "|>"])
).map("".join)


@given(texts)
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text, allow_special=True)) == text


@given(texts)
def test_a_users_text_never_holds_a_special_token(text: str) -> None:
    assert max(TOKENIZER.encode(text), default=0) < 256


def test_allowed_names_become_one_id() -> None:
    text = "a<|im_end|>b<|eos|>"

    assert TOKENIZER.encode(text, allow_special=True) == [97, 259, 98, 258]
    assert TOKENIZER.encode(text, allow_special=("<|eos|>",)) == [97, *b"<|im_end|>", 98, 258]


def test_the_ids_of_the_specials_are_fixed() -> None:
    """Checkpoints are trained on them."""
    assert TOKENIZER.special == {
        "<|pad|>": 256,
        "<|bos|>": 257,
        "<|eos|>": 258,
        "<|im_end|>": 259,
        "<|im_system|>": 260,
        "<|im_user|>": 261,
        "<|im_assistant|>": 262,
        "<|im_middle|>": 263,
        "<|media_start|>": 264,
        "<|media_content|>": 265,
        "<|media_end|>": 266,
        "<|media_pad|>": 267,
        "<|im_start|>": 268,
        "<|endoftext|>": 269,
        "<|vision_start|>": 270,
        "<|vision_end|>": 271,
        "<|vision_pad|>": 272,
        "<|image_pad|>": 273,
        "<|video_pad|>": 274,
        "<img>": 275,
        "</img>": 276,
        "<imgpad>": 277,
        "<think>": 278,
        "</think>": 279,
    }
    assert TOKENIZER.vocab_size == 320


def test_specials_can_be_skipped() -> None:
    ids = torch.tensor([260, 104, 105, 259])

    assert TOKENIZER.decode(ids) == "<|im_system|>hi<|im_end|>"
    assert TOKENIZER.decode(ids, skip_special=True) == "hi"


def test_the_marks_of_thinking_are_part_of_the_answer() -> None:
    assert TOKENIZER.decode([278, 104, 105, 279, 259], skip_special=True) == "<think>hi</think>"


def test_broken_utf8_and_unused_ids_become_replacement_characters() -> None:
    assert TOKENIZER.decode([0xE4, 0xBD, 97, 300]) == "\ufffda\ufffd"


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([1, 320], "position 1: token id 320 is outside the vocabulary of 320"),
        ([-1], "position 0: token id -1"),
        ([1.0], "1.0"),
    ],
)
def test_ids_outside_the_vocabulary_are_named(ids: list[int], match: str) -> None:
    with pytest.raises(TokenError, match=match):
        TOKENIZER.decode(ids)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(TokenError, match=r"character 2 is '\\ud800'"):
        TOKENIZER.encode("ab\ud800")
    with pytest.raises(TokenError, match="found bytes"):
        TOKENIZER.encode(b"ab")  # type: ignore[arg-type]


def test_unknown_names_cannot_be_allowed() -> None:
    with pytest.raises(TokenError, match=r"'<\|nope\|>' is not a special token"):
        TOKENIZER.encode("a", allow_special=("<|nope|>",))


def test_of_two_specials_that_start_alike_the_longer_is_found() -> None:
    special = SpecialTokens({"<a>": 1, "<a>b": 2})

    assert list(special.split("x<a>bc<a>", True)) == ["x", 2, "c", 1]


def test_specials_that_swallow_space_do() -> None:
    special = SpecialTokens({"<m>": 1, "<n>": 2}, strip_left=["<m>"], strip_right=["<n>"])

    assert list(special.split("a \n<m> b <n>  c", True)) == ["a", 1, " b ", 2, "c"]


def test_two_names_for_one_id_are_refused() -> None:
    with pytest.raises(TokenError, match="'<a>' and '<b>' both have id 1"):
        SpecialTokens({"<a>": 1, "<b>": 1})


def test_shown_specials_survive_skipping() -> None:
    special = SpecialTokens({"<think>": 5, "<end>": 6}, shown=["<think>"])

    assert list(special.runs([5, 1, 2, 6], skip_special=True)) == ["<think>", [1, 2]]


def test_the_built_in_tokenizer_fits_the_protocol() -> None:
    assert isinstance(TOKENIZER, Tokenizer)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()

    with pytest.raises(TokenError, match=r"no tiktoken\.model.*found: config\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
