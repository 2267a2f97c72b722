"""Processors from the files of published repositories, as these were published, and those files again."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from PIL import Image

from tests.assets import asset
from vlkit.errors import ConfigError, UnknownFieldWarning
from vlkit.models.family import ModelSpec
from vlkit.processing import ByteTokenizer, ImageRule, Processor, VideoRule
from vlkit.processing.hub_files import processor_config
from vlkit.registry import model_spec

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
QWEN2_IMAGES: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
QWEN3_IMAGES: dict[str, Any] = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
QWEN3_VIDEOS: dict[str, Any] = {
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "video_processor_type": "Qwen3VLVideoProcessor",
}
ANDESVL_IMAGES: dict[str, Any] = {
    "crop_size": 448,
    "do_center_crop": False,
    "do_resize": False,
    "hidden_stride": 2,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "image_processor_type": "CLIPImageProcessor",
    "min_pixels": 200704,
    "max_pixels": 2408448,
    "patch_size": 14,
}
ANDESVL_MODEL = {"model_type": "andesvl-aimv2-qwen3", "vision_config": {"patch_size": 14, "model_type": "aimv2"}}
QWEN_VL_MODEL = {
    "model_type": "qwen",
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}
GENERATION = {"do_sample": True, "eos_token_id": [151645, 151643], "temperature": 0.6}
FOLDERS: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": {
        "preprocessor_config.json": QWEN2_IMAGES,
        "config.json": {"model_type": "qwen2_vl"},
        "generation_config.json": GENERATION,
    },
    "qwen2.5-vl-3b": {"preprocessor_config.json": QWEN2_IMAGES, "config.json": {"model_type": "qwen2_5_vl"}},
    "qwen3-vl-2b": {
        "preprocessor_config.json": QWEN3_IMAGES,
        "video_preprocessor_config.json": QWEN3_VIDEOS,
        "config.json": {"model_type": "qwen3_vl"},
        "generation_config.json": GENERATION,
    },
    "andesvl-1b": {
        "preprocessor_config.json": ANDESVL_IMAGES,
        "config.json": ANDESVL_MODEL,
        "generation_config.json": GENERATION,
    },
    "qwen-vl-chat": {"config.json": QWEN_VL_MODEL},
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def with_vocabulary(folder: Path, name: str) -> Path:
    if name.startswith("qwen-vl"):
        shutil.copy(asset("qwen.tiktoken"), folder / "qwen.tiktoken")
        return folder
    text = asset("qwen3-tokenizer.json").read_text()
    config = asset("qwen3-tokenizer_config.json").read_text()
    if name.startswith("andesvl"):  # Qwen3's vocabulary with two names changed
        text, config = (
            each.replace("<|vision_start|>", "<img>").replace("<|vision_end|>", "</img>") for each in (text, config)
        )
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(config)
    return folder


def small_vocabulary(folder: Path, name: str) -> Path:
    """Bytes and the special tokens that the formats write, in the published kinds of files."""
    if name.startswith("qwen-vl"):
        lines = (f"{base64.b64encode(bytes((byte,))).decode()} {byte}\n" for byte in range(256))
        (folder / "qwen.tiktoken").write_text("".join(lines))
        return folder
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.add_special_tokens(list(ByteTokenizer().special))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def spec_of(name: str) -> ModelSpec:
    names = {"andesvl-1b": "andesvl-1b-instruct"}
    return model_spec(names.get(name, name))


@pytest.mark.parametrize("name", FOLDERS)
def test_the_files_say_what_the_registered_model_says(name: str, tmp_path: Path) -> None:
    config = processor_config(write(tmp_path, FOLDERS[name]))

    expected = spec_of(name).processor
    assert config.replace(stop_ids=()) == expected.replace(
        video=config.video if expected.video is None else expected.video
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_the_files_are_written_back_unchanged(name: str, tmp_path: Path) -> None:
    source = small_vocabulary(write(tmp_path / "a", FOLDERS[name]), name)

    Processor.from_pretrained(source).save_pretrained(tmp_path / "b")
    again = Processor.from_pretrained(tmp_path / "b")

    written = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert written == {path.name: path.read_bytes() for path in source.iterdir()}
    assert again.config == Processor.from_pretrained(source).config


def test_files_of_the_model_are_left_to_the_model(tmp_path: Path) -> None:
    source = small_vocabulary(write(tmp_path / "a", FOLDERS["qwen3-vl-2b"]), "qwen3-vl-2b")
    changed = write(tmp_path / "b", {"config.json": {"model_type": "qwen3_vl", "other": 1}})

    Processor.from_pretrained(source).save_pretrained(changed)

    assert json.loads((changed / "config.json").read_text())["other"] == 1
    assert json.loads((changed / "generation_config.json").read_text()) == GENERATION


def conversation() -> list[dict[str, Any]]:
    image = Image.fromarray(np.zeros((300, 500, 3), np.uint8))
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Caf\u0065\u0301?"}]}
    ]


def test_qwen_vl_chat_writes_its_prompt(tmp_path: Path) -> None:
    """256 tokens for any image, and text in Unicode's composed form."""
    processor = Processor.from_pretrained(with_vocabulary(write(tmp_path, FOLDERS["qwen-vl-chat"]), "qwen-vl-chat"))

    batch = processor(conversation())

    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nPicture 1: <img>"
        + "<imgpad>" * 256
        + "</img>\nCaf\u00e9?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = batch.ids.tokens.tolist()
    assert ids == processor.tokenizer.encode(text, allow_special=True)
    assert ids[:4] == [151644, 8948, 198, 2610]
    assert ids[ids.index(151857) + 1 : ids.index(151858)] == [151859] * 256
    assert processor.stop_ids == (151645, 151644, 151643)
    assert batch.patches is not None
    assert batch.patches.layout.grids == ((1, 32, 32),)
    assert processor.tokenizer.special["<|extra_204|>"] == 151850
    assert [processor.tokenizer.special[name] for name in ("<ref>", "</quad>")] == [151851, 151856]


def test_andesvl_writes_its_prompt(tmp_path: Path) -> None:
    processor = Processor.from_pretrained(with_vocabulary(write(tmp_path, FOLDERS["andesvl-1b"]), "andesvl-1b"))

    ids = processor(conversation(), thinking=True).ids.tokens.tolist()

    rows, columns = processor.config.image.target_size(300, 500).grid
    tokens = rows * columns // 4
    assert ids[:4] == [151644, 872, 198, 151652]
    assert ids[4 : 4 + tokens] == [151654] * tokens
    assert ids[4 + tokens] == 151653
    assert ids[-4:] == [151644, 77091, 198, 151667]
    assert processor.stop_ids == (151645, 151643)
    assert processor.decode([151667, 9707, 151668, 151645]) == "<think>Hello</think>"


def test_a_vocabulary_without_the_marks_of_the_format_is_refused(tmp_path: Path) -> None:
    """Qwen3's own vocabulary would cut AndesVL's <img> into pieces."""
    with pytest.raises(ConfigError, match="the chat format writes '<img>'"):
        Processor.from_pretrained(with_vocabulary(write(tmp_path, FOLDERS["andesvl-1b"]), "qwen3"))


def test_files_joined_by_transformers_5_say_the_same(tmp_path: Path) -> None:
    parts = FOLDERS["qwen3-vl-2b"]
    joint = {
        "image_processor": parts["preprocessor_config.json"],
        "video_processor": parts["video_preprocessor_config.json"],
        "processor_class": "Qwen3VLProcessor",
    }

    apart = processor_config(write(tmp_path / "a", parts))
    together = processor_config(write(tmp_path / "b", {"processor_config.json": joint}))

    assert together == apart.replace(stop_ids=())


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056).save_pretrained(tmp_path)
    Qwen2VLVideoProcessor(cap_pixels_per_frame=True).save_pretrained(tmp_path)

    config = processor_config(tmp_path)

    assert config.image == spec_of("qwen2-vl-2b").processor.image
    assert config.video == VideoRule(total_pixels=int(128_000 * 28 * 28 * 0.9))


@pytest.mark.parametrize("ends", [151645, [151645, 151643, 7]])
def test_answers_end_where_generation_config_says_too(ends: Any, tmp_path: Path) -> None:
    files = {**FOLDERS["qwen2.5-vl-3b"], "generation_config.json": {"eos_token_id": ends}}

    processor = Processor.from_pretrained(small_vocabulary(write(tmp_path, files), "qwen2.5"))

    own = tuple(processor.tokenizer.special[name] for name in ("<|im_end|>", "<|endoftext|>"))
    assert processor.stop_ids == (*own, *(ends if isinstance(ends, list) else [ends]))


@pytest.mark.parametrize(
    ("name", "file", "changes", "match"),
    [
        ("qwen2-vl-2b", "preprocessor_config.json", {"min_pixels": None}, r"no 'min_pixels' and 'max_pixels'"),
        ("qwen2-vl-2b", "preprocessor_config.json", {"temporal_patch_size": 0}, "frames_per_patch: 0 is below 1"),
        ("qwen2-vl-2b", "generation_config.json", {"eos_token_id": "</s>"}, "no token id"),
        ("qwen3-vl-2b", "video_preprocessor_config.json", {"max_frames": 2}, "max_frames=2 is below min_frames=4"),
        ("qwen-vl-chat", "config.json", {"visual": {"image_size": 450, "patch_size": 14}}, "must be a multiple of"),
        ("qwen-vl-chat", "config.json", {"visual": {"image_size": 448}}, "no 'patch_size'"),
        ("andesvl-1b", "config.json", {"vision_config": {"patch_size": "14"}}, "patch_size must be a whole number"),
        ("andesvl-1b", "config.json", {"vision_config": 3}, "vision_config must be an object"),
        (
            "qwen2-vl-2b",
            "preprocessor_config.json",
            {"do_resize": False},
            "do_resize is false; images are always resized",
        ),
        ("qwen2-vl-2b", "preprocessor_config.json", {"do_convert_rgb": False}, "do_convert_rgb is false"),
        ("qwen2-vl-2b", "preprocessor_config.json", {"do_rescale": "no"}, "do_rescale must be true or false"),
        ("qwen2-vl-2b", "preprocessor_config.json", {"resample": 0}, "resample is 0; known are 1"),
        ("qwen2-vl-2b", "preprocessor_config.json", {"resample": 1}, "has no filter 'lanczos'"),
        ("qwen2-vl-2b", "preprocessor_config.json", {"rescale_factor": 0}, "rescale_factor must be a number above 0"),
        (
            "qwen2-vl-2b",
            "preprocessor_config.json",
            {"rescale_factor": 1, "image_std": 1},
            "image_mean and image_std must be three numbers",
        ),
        ("qwen3-vl-2b", "video_preprocessor_config.json", {"do_resize": False}, "do_resize is false"),
        ("qwen3-vl-2b", "video_preprocessor_config.json", {"patch_size": 14}, "patch_size is 14 for videos and 16"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_file(
    name: str, file: str, changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    files = {**FOLDERS[name], file: {**FOLDERS[name][file], **changes}}

    with pytest.raises(ConfigError, match=rf"/{file}: .*{match}".replace(".json", r"\.json")):
        processor_config(write(tmp_path, files))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("qwen2-vl-2b", "preprocessor_config.json"),
        ("qwen3-vl-2b", "preprocessor_config.json"),
        ("qwen3-vl-2b", "video_preprocessor_config.json"),
    ],
)
def test_fields_without_an_effect_are_named(name: str, file: str, tmp_path: Path) -> None:
    files = {**FOLDERS[name], file: {**FOLDERS[name][file], "my_field": 3, "do_sharpen": True, "crop_size": None}}

    with pytest.warns(UnknownFieldWarning, match="have fields without an effect here: do_sharpen, my_field$") as seen:
        processor_config(write(tmp_path, files))

    assert len(seen) == 1


def test_the_other_sizes_of_andesvl_are_one_change_away(tmp_path: Path) -> None:
    rule = processor_config(write(tmp_path, FOLDERS["andesvl-1b"])).image

    chat = rule.replace(fit="letterbox-chat", max_pixels=733**2)

    assert isinstance(chat, ImageRule)
    assert rule.num_tokens(rule.target_size(1080, 1920).grid) == 2691
    assert chat.num_tokens(chat.target_size(1080, 1920).grid) == 700


def test_what_was_saved_last_is_what_is_read(tmp_path: Path) -> None:
    source = small_vocabulary(write(tmp_path / "a", FOLDERS["qwen2-vl-2b"]), "qwen2-vl-2b")
    published = Processor.from_pretrained(source)
    other = published.config.replace(image=published.config.image.replace(max_pixels=100_000))
    changed = Processor(other, published.tokenizer)

    for processor in (published, changed, published, changed):
        processor.save_pretrained(tmp_path / "b")
        assert Processor.from_pretrained(tmp_path / "b").config == processor.config


def test_a_processor_keeps_its_config() -> None:
    """Its chat, ids and files come from it; a config put in later would be half of a processor."""
    processor = Processor()

    with pytest.raises(AttributeError):
        processor.config = processor.config.replace(max_length=3)  # type: ignore[misc]
