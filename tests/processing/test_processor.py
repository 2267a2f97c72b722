from __future__ import annotations

import base64
import io
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.errors import (
    CheckpointError,
    ConfigError,
    EmptyBatchError,
    ImageError,
    PlaceholderMismatchError,
    SequenceTooLongError,
    TemplateError,
    VideoError,
    VlkitError,
)
from vlkit.processing import (
    CHAT_FORMATS,
    ByteTokenizer,
    ImageRule,
    Processor,
    ProcessorConfig,
    VideoRule,
    pack_images,
    pack_video,
)

PROCESSOR = Processor(ProcessorConfig(image=ImageRule(patch_size=4)))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def question(text: str, *images: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}],
    }


ANSWER = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (8, 8), (17, 30), (3, 77)])
def test_placeholders_are_as_many_as_the_projector_gives_tokens(size: tuple[int, int]) -> None:
    batch = PROCESSOR([question("?", picture(*size), picture(9, 4))])

    assert batch.patches is not None
    merged = batch.patches.layout.merged(2)
    assert int((batch.ids.tokens == PROCESSOR.image_token_id).sum()) == merged.num_tokens
    runs = PROCESSOR.decode(batch.ids.tokens, skip_special=False).split("<|media_start|>")[1:]
    assert tuple(run.count("<|media_pad|>") for run in runs) == merged.lengths


def test_the_patches_are_those_of_the_images_in_order() -> None:
    first, second = picture(5, 9), picture(8, 3, seed=1)

    batch = PROCESSOR([question("a", first), ANSWER, question("b", second)])

    assert batch.patches is not None
    assert torch.equal(batch.patches.tokens, pack_images([first, second], PROCESSOR.config.image).tokens)


@pytest.mark.parametrize(
    "named",
    [
        lambda path, url: {"type": "image_url", "image_url": {"url": url}},
        lambda path, url: {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
        lambda path, url: {"type": "image_url", "image_url": url},
        lambda path, url: {"type": "image", "url": url},
        lambda path, url: {"type": "image", "path": path},
        lambda path, url: {"type": "image", "image": {"bytes": None, "path": path}},
        lambda path, url: {"type": "image", "image": f"file://{path}"},
    ],
)
def test_images_are_found_under_the_names_of_other_libraries(named: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(5, 9).save(path)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    part = named(str(path), url)

    for processor in (PROCESSOR, Processor(PROCESSOR.config.replace(template=TEMPLATE))):
        batch = processor([{"role": "user", "content": [part, {"type": "text", "text": "?"}]}])
        expected = processor([question("?", picture(5, 9))])

        assert batch.ids.tokens.tolist() == expected.ids.tokens.tolist()
        assert torch.equal(batch.patches.tokens, expected.patches.tokens)


def test_videos_are_found_likewise(tmp_path: Path) -> None:
    frames = [picture(20, 31, seed) for seed in range(4)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=500, lossless=True)
    content = (tmp_path / "a.webp").read_bytes()
    url = "data:image/webp;base64," + base64.b64encode(content).decode()

    expected = VIDEOS([{"role": "user", "content": [{"type": "video", "video": content}]}])
    for part in (
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "video", "path": str(tmp_path / "a.webp")},
        {"type": "video", "video": io.BytesIO(content)},
    ):
        batch = VIDEOS([{"role": "user", "content": [part]}])
        assert torch.equal(batch.patches.tokens, expected.patches.tokens)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}, "is an address; fetch it first"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "expected {'bytes': ..., 'path': ...}"),
        ({"type": "image_url", "image_url": {}}, "parts hold no image"),
        ({"type": "image", "path": "a.png", "url": "b.png"}, "unknown key 'path'"),
        ({"type": "image", "image": "a.png", "path": "b.png"}, "unknown key 'path'"),
        ({"type": "image", "video_url": "b.png"}, "unknown key 'video_url'"),
        ({"type": "image_url"}, "type 'image_url' is not one of"),
        ({"type": "image", "path": "a.png", "min_pixels": 3}, "unknown key 'min_pixels'"),
    ],
)
def test_other_names_are_refused_where_they_say_something_else(part: Any, match: str) -> None:
    with pytest.raises(VlkitError, match=match):
        PROCESSOR([{"role": "user", "content": [part]}])


def test_several_conversations_are_packed_as_each_alone() -> None:
    conversations = [
        [question("a", picture(5, 9)), ANSWER],
        [question("bb"), ANSWER],
        [question("c", picture(9, 3)), ANSWER],
    ]

    together = PROCESSOR(conversations, labels=True)
    alone = [PROCESSOR(conversation, labels=True) for conversation in conversations]

    assert together.patches is not None
    assert together.labels is not None
    assert together.ids.layout.lengths == tuple(batch.ids.layout.num_tokens for batch in alone)
    assert torch.equal(together.ids.tokens, torch.cat([batch.ids.tokens for batch in alone]))
    assert torch.equal(together.labels, torch.cat([batch.labels for batch in alone if batch.labels is not None]))
    assert torch.equal(together.patches.tokens, torch.cat([b.patches.tokens for b in alone if b.patches is not None]))


def test_the_prompt_ends_where_the_answer_begins() -> None:
    prompt = PROCESSOR([question("a")]).ids.tokens
    whole = PROCESSOR([question("a"), ANSWER], labels=True)

    assert torch.equal(whole.ids.tokens[: len(prompt)], prompt)
    assert PROCESSOR.decode(whole.ids.tokens[len(prompt) :]) == "yes"
    assert whole.labels is not None
    assert torch.equal(whole.labels[len(prompt) :], whole.ids.tokens[len(prompt) :])
    assert (whole.labels[: len(prompt)] == -100).all()
    assert int(whole.ids.tokens[-1]) in PROCESSOR.stop_ids


def test_the_answer_can_be_begun() -> None:
    ids = PROCESSOR([question("a")], answer_prefix="(<|eos|>").ids.tokens

    assert ids.tolist() == [*PROCESSOR([question("a")]).ids.tokens.tolist(), *b"(<|eos|>"]
    with pytest.raises(TemplateError, match="answer_prefix"):
        PROCESSOR([question("a"), ANSWER], answer_prefix="(", labels=True)


def test_without_generation_prompt_the_question_is_last() -> None:
    assert PROCESSOR([question("a")], add_generation_prompt=False).ids.tokens.tolist() == [261, 97, 259]


def test_images_may_come_beside_the_messages() -> None:
    first, second = picture(5, 9), picture(8, 3, seed=1)
    open_slot = {"type": "image"}
    message = {"role": "user", "content": [open_slot, {"type": "image", "image": second}, open_slot]}

    batch = PROCESSOR([message], [first, first])

    expected = PROCESSOR([question("", first, second, first)])
    assert torch.equal(batch.ids.tokens, expected.ids.tokens)
    assert batch.patches is not None
    assert expected.patches is not None
    assert torch.equal(batch.patches.tokens, expected.patches.tokens)
    assert torch.equal(PROCESSOR([[message]] * 2, [[first, first]] * 2).ids.unpack()[1], batch.ids.tokens)


def test_one_image_needs_no_list() -> None:
    slot = {"role": "user", "content": [{"type": "image"}]}
    expected = PROCESSOR([question("", picture(5, 9))])

    for image in (picture(5, 9), np.asarray(picture(5, 9))):
        assert torch.equal(PROCESSOR([slot], image).ids.tokens, expected.ids.tokens)
        assert PROCESSOR([[slot]] * 2, [image, [image]]).ids.layout.num_items == 2
    with pytest.raises(PlaceholderMismatchError, match="2 conversations, but Image"):
        PROCESSOR([[slot]] * 2, picture(5, 9))
    with pytest.raises(ImageError, match=r"image 0: expected a path, bytes, .* found builtins\.int"):
        PROCESSOR([slot], 7)


VIDEOS = Processor(
    ProcessorConfig(
        chat=CHAT_FORMATS["qwen3-vl"].replace(stop=("<|im_end|>",)),
        image=ImageRule(patch_size=4, fit="resize", max_patches=None, frames_per_patch=2),
        video=VideoRule(budget="video", min_pixels=64, max_pixels=100_000, spacing="ends", multiple=1),
    )
)


def clip(num_frames: int, height: int = 9, width: int = 17) -> list[Image.Image]:
    return [picture(height, width, seed) for seed in range(num_frames)]


def watch(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_images_and_videos_keep_their_order() -> None:
    """Every time step of Qwen3-VL is an item of its own, between its time and the marks."""
    image, frames = picture(5, 9), clip(3)

    batch = VIDEOS(watch({"type": "video", "video": frames}, {"type": "image", "image": image}))

    rule, video = VIDEOS.config.image, VIDEOS.config.video
    moving, still = pack_video(frames, rule, video).patches, pack_images([image], rule)
    assert batch.patches is not None
    assert batch.patches.layout.grids == ((1, 2, 4), (1, 2, 4), *(still.layout.grids or ()))
    assert torch.equal(batch.patches.tokens, torch.cat([moving.tokens, still.tokens]))
    assert batch.seconds == (0.0, 0.0, 0.0)
    text = VIDEOS.decode(batch.ids.tokens, skip_special=False)
    step = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    assert f"user\n<0.2 seconds>{step}<1.0 seconds>{step}<|vision_start|><|image_pad|>" in text


def test_a_video_is_one_item_where_its_steps_are_not_parted() -> None:
    processor = Processor(VIDEOS.config.replace(chat=CHAT_FORMATS["chatml"], video=VideoRule(min_pixels=64)))

    batch = processor(watch({"type": "image", "image": picture(5, 9)}, {"type": "video", "video": clip(60), "fps": 15}))

    assert batch.patches is not None
    assert batch.patches.layout.grids is not None
    assert batch.patches.layout.grids[1] == (4, 2, 4)
    assert batch.seconds == (0.0, 1.0)  # two frames a second, two frames a step
    assert int((batch.ids.tokens == processor.video_token_id).sum()) == 8


def test_videos_may_come_beside_the_messages() -> None:
    slot = {"type": "video"}
    expected = VIDEOS(watch({"type": "video", "video": clip(3)}))

    for videos in (np.stack([np.asarray(frame) for frame in clip(3)]), [clip(3)]):
        got = VIDEOS(watch(slot), videos=videos)
        assert got.patches is not None
        assert expected.patches is not None
        assert torch.equal(got.ids.tokens, expected.ids.tokens)
        assert torch.equal(got.patches.tokens, expected.patches.tokens)
    with pytest.raises(PlaceholderMismatchError, match="1 video parts hold no video, 0 videos were given"):
        VIDEOS(watch(slot))


def test_errors_of_videos_name_them() -> None:
    good = {"type": "video", "video": clip(3)}

    with pytest.raises(VideoError, match="conversation 1: video 1: it has no frames"):
        VIDEOS([watch(good), watch(good, {"type": "video", "video": []})])
    with pytest.raises(ImageError, match=r"image 1: .*NaN"):
        VIDEOS(
            watch({"type": "image", "image": picture(3, 3)}, good, {"type": "image", "image": np.full((3, 3), np.nan)})
        )
    with pytest.raises(TemplateError, match="this chat format has no videos"):
        PROCESSOR(watch(good))
    with pytest.raises(VideoError, match=r"video 0: this processor has no ProcessorConfig.video, its"):
        Processor(VIDEOS.config.replace(video=None))(watch(good))
    with pytest.raises(ConfigError, match="the chat format has no video_token"):
        ProcessorConfig(video=VideoRule())
    with pytest.raises(SequenceTooLongError, match="for 0 images and 1 videos"):
        Processor(VIDEOS.config.replace(max_length=5))(watch(good))


def test_batches_with_and_without_videos_join() -> None:
    alone = [watch({"type": "video", "video": clip(3)}), watch({"type": "image", "image": picture(5, 9)}), watch()]

    together = VIDEOS(alone)

    assert together.patches is not None
    assert together.patches.layout.num_items == 3
    assert together.seconds == (0.0, 0.0, 0.0)


def test_a_video_processor_comes_back(tmp_path: Path) -> None:
    VIDEOS.save_pretrained(tmp_path)

    assert Processor.from_pretrained(tmp_path).config == VIDEOS.config


def test_thinking_and_tools_are_asked_for() -> None:
    processor = Processor(VIDEOS.config.replace(chat=CHAT_FORMATS["qwen3"].replace(stop=("<|im_end|>",))))
    think, done = processor.tokenizer.special["<think>"], processor.tokenizer.special["</think>"]

    assert processor([question("a")], thinking=False).ids.tokens.tolist()[-6:] == [think, 10, 10, done, 10, 10]
    text = processor.decode(processor([question("a")], tools=[{"name": "f"}], number_visuals=True).ids.tokens)
    assert '<tools>\n{"name": "f"}\n</tools>' in text
    with pytest.raises(TemplateError, match="begin an answer that is still to come"):
        processor([question("a"), ANSWER], thinking=False, labels=True)


def test_a_template_may_stand_for_a_format_with_videos() -> None:
    """The marks that a template puts around a video go around its steps, as in the format."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'video' %}"
        "{% if add_vision_id %}Video 1: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif p.type == 'image' %}"
        "{% if add_vision_id %}Picture 1: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = watch(
        {"type": "text", "text": "<|video_pad|>"},
        {"type": "image", "image": picture(5, 9)},
        {"type": "video", "video": clip(5)},
    )

    for options in ({}, {"number_visuals": True}):
        for outer in ({}, {"video_prefix": "<|vision_start|>", "video_suffix": "<|vision_end|>"}):
            config = VIDEOS.config.replace(chat=VIDEOS.config.chat.replace(**outer))
            by_template = Processor(config.replace(template=template))(messages, **options)
            by_format = Processor(config)(messages, **options)
            assert torch.equal(by_template.ids.tokens, by_format.ids.tokens)


@pytest.mark.parametrize(("slots", "given"), [(1, 0), (0, 1), (2, 1), (1, 2)])
def test_another_number_of_images_than_slots_is_refused(slots: int, given: int) -> None:
    message = {"role": "user", "content": [{"type": "image"}] * slots}

    with pytest.raises(PlaceholderMismatchError, match=f"{slots} image parts hold no image, {given} images were given"):
        PROCESSOR([message], [picture(3, 3)] * given)


def test_errors_name_the_conversation() -> None:
    good = [question("a", picture(3, 3))]

    with pytest.raises(ImageError, match=r"conversation 1: image 1: .*NaN"):
        PROCESSOR([good, [question("a", picture(3, 3), np.full((3, 3), np.nan))]])
    with pytest.raises(TemplateError, match="conversation 1: message 0: role 'bot'"):
        PROCESSOR([good, [{"role": "bot", "content": ""}]])
    with pytest.raises(PlaceholderMismatchError, match="2 conversations, but 1 lists of images"):
        PROCESSOR([good, good], [[]])


def test_empty_input_is_refused() -> None:
    with pytest.raises(EmptyBatchError, match="no conversations"):
        PROCESSOR([])
    with pytest.raises(TemplateError, match="conversation 0: the conversation has no messages"):
        PROCESSOR([[]])
    with pytest.raises(TemplateError, match="found str"):
        PROCESSOR("hi")  # type: ignore[arg-type]


def test_an_empty_question_is_a_question() -> None:
    assert PROCESSOR([{"role": "user", "content": ""}]).ids.tokens.tolist() == [261, 259, 262]


def test_labels_need_an_answer() -> None:
    with pytest.raises(TemplateError, match="nothing to learn"):
        PROCESSOR([question("a")], labels=True)


def test_long_sequences_are_refused_not_cut() -> None:
    processor = Processor(PROCESSOR.config.replace(max_length=8))
    longest = question("a", picture(8, 9))  # role, begin, 2 tokens, end, a, close, role: 8

    assert processor([longest]).ids.layout.lengths == (8,)
    with pytest.raises(SequenceTooLongError, match=r"10 tokens \(2 of them for 1 images\); at most 8"):
        processor([question("abc", picture(8, 9))])


def test_a_format_must_fit_the_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"writes '<\|box\|>', which is no special token"):
        Processor(ProcessorConfig(chat=CHAT_FORMATS["chatml"].replace(image_token="<|box|>")))
    with pytest.raises(ConfigError, match="give the tokenizer too"):
        Processor(ProcessorConfig(tokenizer="files"))


def test_a_saved_processor_comes_back(tmp_path: Path) -> None:
    PROCESSOR.save_pretrained(tmp_path / "new" / "folder")

    again = Processor.from_pretrained(tmp_path / "new" / "folder")

    assert again.config == PROCESSOR.config
    conversation = [question("a", picture(5, 9))]
    assert torch.equal(again(conversation).ids.tokens, PROCESSOR(conversation).ids.tokens)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"tokenizer": "bytes"\n "x": 1}', r"processor\.json: line 2, column 2: not JSON"),
        ("[]", "expected a JSON object, found a list"),
        ('{"tokeniser": "bytes"}', "no field 'tokeniser'; did you mean 'tokenizer'"),
        ('{"max_length": NaN}', "NaN is not a JSON number"),
        ('{"max_length": 1, "max_length": 2}', "key 'max_length' appears twice"),
        ("[" * 100_000, r"processor\.json"),
        ("\ufeff{}", r"processor\.json"),
    ],
)
def test_a_broken_processor_file_is_refused(content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "processor.json").write_text(content, encoding="utf-8")

    with pytest.raises(ConfigError, match=match):
        Processor.from_pretrained(tmp_path)


def test_a_repository_gives_its_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files of the one commit, and nothing that holds weights or code."""
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    PROCESSOR.save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    processor = Processor.from_pretrained("owner/name-1.5", revision="abc", local_files_only=True)

    assert processor.config == PROCESSOR.config
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("owner/name-1.5", "abc", True)
    wanted = ("processor.json", "tiktoken.model", "qwen.tiktoken", "chat_template.jinja", "tokenizer.json")
    assert all(any(fnmatch(name, pattern) for pattern in asked["allow_patterns"]) for name in wanted)
    refused = ("model.safetensors", "modeling_kimi_vl.py", "pytorch_model.bin")
    assert not any(fnmatch(name, pattern) for name in refused for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("name", ["./a/b", "a/b/c", "../b", ""])
def test_what_is_neither_folder_nor_repository_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder, and no repository name"):
        Processor.from_pretrained(name)


def test_a_tokenizer_that_is_not_the_configs_is_refused(tmp_path: Path) -> None:
    class Words:
        special, vocab_size, files = ByteTokenizer().special, 320, {}

    with pytest.raises(ConfigError, match="tokenizer is 'bytes', but a Words was given"):
        Processor(PROCESSOR.config, Words())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tokenizer is 'files', but a ByteTokenizer was given"):
        Processor(PROCESSOR.config.replace(tokenizer="files"), ByteTokenizer())
    with pytest.raises(ConfigError, match="the Words has no files"):
        Processor(PROCESSOR.config.replace(tokenizer="files"), Words()).save_pretrained(tmp_path)


def test_a_file_is_no_folder_to_save_into(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot be made a folder"):
            PROCESSOR.save_pretrained(path)


def test_a_folder_without_a_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"processor\.json"):
        Processor.from_pretrained(tmp_path)


def test_importing_costs_no_tokenizer_library() -> None:
    code = (
        "import sys, vlkit.processing; print(sorted({'timm', 'tokenizers', 'tiktoken', 'jinja2'} & set(sys.modules)))"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


TEMPLATE = """
{%- for m in messages -%}<|im_{{ m.role }}|>
{%- if m.role == 'assistant' -%}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{%- elif m.content is string -%}{{ m.content }}<|im_end|>
{%- else -%}{% for p in m.content %}{% if p.type == 'image' %}<|media_start|><|media_pad|><|media_end|>
{%- else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>{%- endif %}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>{{ tools or '' }}{%- endif -%}
"""


def test_a_jinja_template_can_take_the_place_of_the_format(tmp_path: Path) -> None:
    processor = Processor(PROCESSOR.config.replace(template=TEMPLATE))
    conversation = [question("a<|eos|>", picture(5, 9)), ANSWER]
    processor.save_pretrained(tmp_path)

    for each in (processor, Processor.from_pretrained(tmp_path)):
        for options in ({"labels": True}, {"add_generation_prompt": True}):
            got, expected = each(conversation, **options), PROCESSOR(conversation, **options)
            assert torch.equal(got.ids.tokens, expected.ids.tokens)
            assert got.labels is expected.labels or torch.equal(got.labels, expected.labels)
        assert each.decode(each([question("a")], template_variables={"tools": "<t>"}).ids.tokens) == "a<t>"


def test_a_template_that_forgets_an_image_is_refused() -> None:
    processor = Processor(PROCESSOR.config.replace(template="{{ messages[0].role }}"))

    with pytest.raises(PlaceholderMismatchError, match="0 image placeholders, 1 images"):
        processor([question("a", picture(5, 9))])


def test_labels_need_a_template_that_marks_answers() -> None:
    processor = Processor(PROCESSOR.config.replace(template="{{ messages[0].role }}"))

    with pytest.raises(TemplateError, match=r"does not mark answers by {% generation %}"):
        processor([question("a"), ANSWER], labels=True)
    with pytest.raises(TemplateError, match="are for a jinja template"):
        PROCESSOR([question("a")], template_variables={"tools": []})


def test_a_template_that_writes_nothing_is_named() -> None:
    processor = Processor(PROCESSOR.config.replace(template="{% if messages|length > 1 %}more{% endif %}"))

    with pytest.raises(TemplateError, match="the template makes an empty text of it"):
        processor([{"role": "user", "content": "a"}])
