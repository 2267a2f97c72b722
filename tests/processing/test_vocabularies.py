"""The published vocabularies, through vlkit's tokenizers. Ids are the official tokenizers' or splintr's, an independent one."""

from __future__ import annotations

import json
import shutil
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.assets import asset
from vlkit.errors import ConfigError, TokenError
from vlkit.processing import CHAT_FORMATS, ImageRule, Processor, ProcessorConfig, Tokenizer, load_tokenizer
from vlkit.processing.tiktoken_tokenizer import TiktokenTokenizer

FILES = {
    "kimi": {"tiktoken.model": "kimi-tiktoken.model"},
    "qwen": {"qwen.tiktoken": "qwen.tiktoken"},
    "qwen3": {"tokenizer.json": "qwen3-tokenizer.json", "tokenizer_config.json": "qwen3-tokenizer_config.json"},
}
KIMI_IMAGE_FILE = {
    "auto_map": {"AutoImageProcessor": "image_processing_kimi_vl.KimiVLImageProcessor"},
    "in_token_limit": 4096,
    "patch_size": 14,
    "num_pooled_tokens": 1024,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "pad_input": True,
    "merge_kernel_size": [2, 2],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name -> a folder with a vocabulary's files under their published names."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp(name)
        for file, source in FILES[name].items():
            shutil.copy(asset(source), path / file)
        return path

    return folder


@pytest.fixture(scope="module")
def tokenizers(folders: Any) -> Any:
    return cache(lambda name: load_tokenizer(folders(name)))


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("kimi", "Hello world", [19180, 2695]),
        ("kimi", "Hello, world!", [19180, 11, 2695, 0]),
        (
            "kimi",
            "你好，世界！月之暗面的视觉语言模型。",
            [33845, 378, 2243, 856, 892, 685, 5519, 4792, 12884, 6826, 15662, 292],
        ),
        ("kimi", "click(x=0.523, y=0.187)", [10683, 3940, 28, 15, 13, 41988, 11, 364, 28, 15, 13, 13436, 8]),
        ("kimi", "The quick brown fox 1234567890", [1008, 5072, 16331, 69275, 220, 6694, 12972, 16242, 15]),
        ("kimi", " Paris", [17374]),
        ("kimi", "HelloWorld", [19180, 14350]),
        ("kimi", "Don't DON'T it's", [34838, 92629, 64833, 4643]),
        ("kimi", "abc你好def", [8497, 33845, 1166]),
        ("kimi", "  two  spaces\n\n\tTab \r\n", [220, 2069, 220, 14803, 382, 197, 11855, 7591]),
        ("kimi", "한국어 日本語テキスト", [17079, 54078, 28763, 220, 4546, 63011, 25875, 32045, 33360]),
        ("kimi", "a\u0300B\u0301c", [64, 71043, 33, 37484, 66]),
        ("kimi", "\u3000\xa0 ", [14224, 5406, 220]),
        ("kimi", "🙂👍🏽", [5885, 46813, 64390, 235, 92949, 121]),
        ("qwen", "Hello, world!", [9707, 11, 1879, 0]),
        (
            "qwen",
            "你好，世界！通义千问视觉语言模型。",
            [108386, 3837, 99489, 6313, 31935, 64559, 99320, 56007, 104916, 102064, 104949, 1773],
        ),
        ("qwen", "click(x=0.523, y=0.187)", [3678, 2075, 28, 15, 13, 20, 17, 18, 11, 379, 28, 15, 13, 16, 23, 22, 8]),
        ("qwen", "def f(x):\n    return x**2\n\n\n", [750, 282, 2075, 982, 262, 470, 856, 334, 17, 1406]),
    ],
)
def test_golden_ids(name: str, text: str, ids: list[int], tokenizers: Any) -> None:
    for each in [name] if name == "kimi" else ["qwen", "qwen3"]:
        tokenizer = tokenizers(each)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("name", "special", "vocab_size"),
    [
        (
            "kimi",
            {"[BOS]": 163584, "[EOS]": 163585, "<|im_end|>": 163586, "<|im_system|>": 163594, "<|media_pad|>": 163605},
            163840,
        ),
        ("qwen", {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|extra_204|>": 151850, "<img>": 151857}, 151860),
        ("qwen3", {"<|endoftext|>": 151643, "<|vision_start|>": 151652, "<think>": 151667, "</think>": 151668}, 151669),
    ],
)
def test_special_tokens(name: str, special: dict[str, int], vocab_size: int, tokenizers: Any) -> None:
    tokenizer = tokenizers(name)

    assert tokenizer.special.items() >= special.items()
    assert tokenizer.vocab_size == vocab_size
    for text, id in special.items():
        assert tokenizer.encode(f"a{text}b", allow_special=True)[1] == id
        assert tokenizer.decode([id]) == text
    assert isinstance(tokenizer, Tokenizer)


texts = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["<|im_end|>", "<|im_", "end|>", " ", "\n", "a", "é", "\u0301", "好", "1", "'s"])
).map("".join)


@pytest.mark.parametrize("name", FILES)
@settings(deadline=None)
@given(text=texts)
def test_any_text_comes_back(name: str, text: str, tokenizers: Any) -> None:
    """Qwen's two are brought into Unicode form C first, as published."""
    tokenizer = tokenizers(name)
    expected = text if name == "kimi" else unicodedata.normalize("NFC", text)

    ids = tokenizer.encode(text)

    assert tokenizer.decode(ids) == expected
    assert not set(ids) & set(tokenizer.special.values())


@settings(deadline=None)
@given(text=texts)
def test_both_formats_of_qwen_give_the_same_ids(text: str, tokenizers: Any) -> None:
    assert tokenizers("qwen").encode(text) == tokenizers("qwen3").encode(text)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("run", ["a", " ", "好", "-", "\n"])
def test_endless_runs_are_tokenised(name: str, run: str, tokenizers: Any) -> None:
    """Uncut, a million spaces overflow the stack of tiktoken's regex engine."""
    text = run * 500_000 if run == " " else run * 60_000

    assert tokenizers(name).decode(tokenizers(name).encode(text)) == text


def test_long_texts_are_cut_where_the_published_tokenizer_cuts_them(tokenizers: Any) -> None:
    kimi = tokenizers("kimi")

    assert kimi.encode("a" * 25_000 + "a") == kimi.encode("a" * 25_000) + kimi.encode("a")
    assert kimi.encode("b" + " " * 25_001) == kimi.encode("b" + " " * 25_000) + kimi.encode(" ")
    words = "word " * 80_000
    assert kimi.encode(words + "next") == kimi.encode(words) + kimi.encode("next")


def test_thinking_marks_survive_skipping(tokenizers: Any) -> None:
    ids = tokenizers("qwen3").encode("<think>a</think><|im_end|>", allow_special=True)

    assert tokenizers("qwen3").decode(ids, skip_special=True) == "<think>a</think>"


@pytest.mark.parametrize("name", FILES)
def test_no_name_of_a_special_token_is_one_in_a_persons_text(name: str, tokenizers: Any) -> None:
    tokenizer = tokenizers(name)
    first = min(tokenizer.special.values())

    for special, id in tokenizer.special.items():
        for text in (special, f"a{special}{special} b"):
            ids = tokenizer.encode(text)
            assert max(ids) < first
            assert tokenizer.decode(ids) == text
        assert tokenizer.encode(special, allow_special=True) == [id]


def test_tools_and_thoughts_have_the_ids_of_the_hub(folders: Any) -> None:
    """The marks around calls and results are tokens where the format writes them, as where a template does."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders("qwen3"))
    processor = Processor(
        ProcessorConfig(tokenizer="files", chat=CHAT_FORMATS["qwen3"]), load_tokenizer(folders("qwen3"))
    )
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"at": {"type": "integer"}}}}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "\n\nWhat is there?"},
        {
            "role": "assistant",
            "content": "<think>\nhm\n</think>\n\nLet me see.",
            "tool_calls": [{"name": "look", "arguments": {"at": 3}}],
        },
        {"role": "tool", "content": "a cat"},
        {"role": "tool", "content": "a dog"},
        {"role": "assistant", "content": "Two animals.", "reasoning_content": "cat and dog"},
    ]

    for thinking in (None, False):
        switch = {} if thinking is None else {"enable_thinking": thinking}
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True, **switch)
        ids = processor(messages, tools=tools, thinking=thinking).ids.tokens.tolist()
        assert ids == theirs(text)["input_ids"]


@pytest.mark.parametrize("name", FILES)
def test_ids_beyond_the_vocabulary_are_refused(name: str, tokenizers: Any) -> None:
    with pytest.raises(TokenError, match=f"position 1: token id {tokenizers(name).vocab_size}"):
        tokenizers(name).decode([0, tokenizers(name).vocab_size])


def kimi_folder(path: Path, fields: dict[str, Any]) -> Path:
    shutil.copy(asset("kimi-tiktoken.model"), path / "tiktoken.model")
    (path / "preprocessor_config.json").write_text(json.dumps(fields))
    return path


def test_the_processor_of_kimi_vl_loads_from_its_published_files(tmp_path: Path) -> None:
    processor = Processor.from_pretrained(kimi_folder(tmp_path, KIMI_IMAGE_FILE))
    image = Image.fromarray(np.zeros((200, 300, 3), np.uint8))

    batch = processor(
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hello world"}]}]
    )

    assert processor.config.image == ImageRule(max_aspect=None)
    assert processor.stop_ids == (163586, 163585)
    ids = batch.ids.tokens.tolist()
    assert ids.count(163605) == 88
    text = processor.decode(ids, skip_special=False)
    assert text == (
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
        "<|im_user|>user<|im_middle|><|media_start|>image<|media_content|>"
        + "<|media_pad|>" * 88
        + "<|media_end|>Hello world<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )
    assert ids == processor.tokenizer.encode(text, allow_special=True)


def test_the_published_files_are_written_back_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source = kimi_folder(tmp_path / "a", KIMI_IMAGE_FILE)

    Processor.from_pretrained(source).save_pretrained(tmp_path / "b")

    written = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert written == {path.name: path.read_bytes() for path in source.iterdir()}


def test_names_in_tokenizer_config_win(tmp_path: Path) -> None:
    added = {
        "163586": {"content": "<|im_end|>", "special": True},
        "163602": {"content": "<|media_begin|>", "special": True},
        "163606": {"content": "<think>", "special": False},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    shutil.copy(asset("kimi-tiktoken.model"), tmp_path / "tiktoken.model")

    tokenizer = load_tokenizer(tmp_path)

    assert tokenizer.special["<|media_begin|>"] == 163602
    assert tokenizer.special["<|reserved_token_163605|>"] == 163605
    assert len(tokenizer.special) == 256
    assert tokenizer.decode([163606, 163586], skip_special=True) == "<think>"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pad_input": False}, "pad_input is False"),
        ({"merge_kernel_size": [2, 3]}, r"two equal numbers, found \[2, 3\]"),
        ({"in_token_limit": -1}, "max_patches: -1 is below 1"),
        ({"image_std": [0.5, 0.5]}, "expected 3 values, found 2"),
        ({"image_mean": None}, "mean: expected a list"),
    ],
)
def test_odd_values_in_a_published_file_are_refused(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json.*{match}"):
        Processor.from_pretrained(kimi_folder(tmp_path, {**KIMI_IMAGE_FILE, **changes}))


def test_missing_fields_in_a_published_file_are_not_guessed(tmp_path: Path) -> None:
    fields = {name: value for name, value in KIMI_IMAGE_FILE.items() if name != "image_mean"}

    with pytest.raises(ConfigError, match="no 'image_mean'"):
        Processor.from_pretrained(kimi_folder(tmp_path, fields))


QWEN2_IMAGE_FILE = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@pytest.mark.parametrize("third", [False, True], ids=["qwen2-vl", "qwen3-vl"])
def test_the_processor_of_qwen_vl_loads_from_its_published_files(third: bool, tmp_path: Path) -> None:
    fields: dict[str, Any] = dict(QWEN2_IMAGE_FILE)
    if third:
        del fields["min_pixels"], fields["max_pixels"]
        fields.update(patch_size=16, size={"shortest_edge": 65536, "longest_edge": 16777216})
        (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    for file, source in FILES["qwen3"].items():
        shutil.copy(asset(source), tmp_path / file)
    image = Image.fromarray(np.zeros((1080, 1920, 3), np.uint8))

    processor = Processor.from_pretrained(tmp_path)
    batch = processor(
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]}]
    )

    assert batch.patches is not None
    assert batch.patches.layout.grids == ((1, 68, 120) if third else (1, 78, 138),)
    tokens = 34 * 60 if third else 39 * 69
    system = "" if third else "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    text = (
        f"{system}<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>Hi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert batch.ids.tokens.tolist() == processor.tokenizer.encode(text, allow_special=True)
    assert processor.stop_ids == (151645, 151643)


def test_unknown_published_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_processor_type 'New' is not known"):
        Processor.from_pretrained(kimi_folder(tmp_path, {"image_processor_type": "New"}))


def test_labels_with_a_published_vocabulary(tmp_path: Path) -> None:
    processor = Processor.from_pretrained(kimi_folder(tmp_path, KIMI_IMAGE_FILE))

    batch = processor([{"role": "user", "content": "a"}, {"role": "assistant", "content": "Hello world"}], labels=True)

    assert batch.labels is not None
    assert batch.labels[batch.labels != -100].tolist() == [19180, 2695, 163586]
    assert torch.equal(batch.labels[-3:], batch.ids.tokens[-3:])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "the 0 byte strings|single byte"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"IQ== 0\nIg==\n", "line 2 is not"),
        (b"IQ== 0\n!!!! 1\n", "line 2 is not"),
        (b"IQ== 0\nIg== 2\n", "do not have the ids 0 to 1"),
        (b"IQ== 0\nIg== 1\n", "no token for the single byte 0x00"),
    ],
)
def test_broken_tiktoken_files_are_refused(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_bytes(content)

    with pytest.raises(TokenError, match=match):
        TiktokenTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "not a tokenizer"),
        (b"{}", "not a tokenizer"),
        (b"\xff", "not a tokenizer"),
        (b'{"added_tokens": [], "model": 3}', "not a tokenizer"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_broken_json_tokenizers_are_refused(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)

    with pytest.raises(TokenError, match=rf"tokenizer\.json.*{match}"):
        load_tokenizer(tmp_path)
