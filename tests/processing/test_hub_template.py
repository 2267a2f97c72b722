"""Templates of published folders: the same conversations as the own format, or used, or refused aloud."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tests.assets import asset
from tests.processing.test_hub_files import FOLDERS, small_vocabulary, with_vocabulary, write
from vlkit.errors import ConfigError, TemplateError
from vlkit.processing import CHAT_FORMATS, Processor
from vlkit.processing.hub_files import processor_config

QWEN2 = (
    "{% set n = namespace(image=0, video=0) %}{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}<|im_end|>\n{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' or 'image' in c or 'image_url' in c %}{% set n.image = n.image + 1 %}"
    "{% if add_vision_id %}Picture {{ n.image }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' or 'video' in c %}{% set n.video = n.video + 1 %}"
    "{% if add_vision_id %}Video {{ n.video }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KIMI = (
    "{%- for m in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}"
    "{{ '<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>' }}{%- endif -%}"
    "{{ '<|im_' + m['role'] + '|>' + m['role'] + '<|im_middle|>' }}"
    "{%- if m['content'] is string -%}{{ TEXT + '<|im_end|>' }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' or 'image' in c or 'image_url' in c -%}"
    "{{ '<|media_start|>image<|media_content|><|media_pad|><|media_end|>' }}{%- else -%}{{ c['text'] }}{%- endif -%}"
    "{%- endfor -%}{{ '<|im_end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_assistant|>assistant<|im_middle|>' }}{%- endif -%}"
)
KIMI_INSTRUCT = KIMI.replace("TEXT", "m['content']")
KIMI_THINKING = KIMI.replace(
    "TEXT", "(m['content'].split('◁/think▷')[-1] if m['role'] == 'assistant' and not loop.last else m['content'])"
)
QWEN3_PARTS = (
    "{%- macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for c in content %}"
    "{% if c.type == 'image' or 'image' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' or 'video' in c %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
OTHER = "{% for m in messages %}USER: {{ m['content'][0]['text'] }} ASSISTANT:{% endfor %}"
KIMI_FOLDER = {
    "preprocessor_config.json": {
        "in_token_limit": 4096,
        "patch_size": 14,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "pad_input": True,
        "merge_kernel_size": [2, 2],
    }
}


def stock_qwen3() -> str:
    return str(json.loads(asset("qwen3-tokenizer_config.json").read_text())["chat_template"])


def qwen3_vl() -> str:
    """Qwen3-VL's: Qwen3's tools around parts of text, images and videos, and no business with thoughts."""
    tools = stock_qwen3().split("{%- set ns", 1)[0].replace("messages[0].content", "show(messages[0].content)")
    return QWEN3_PARTS + (
        tools + "{%- for m in messages %}{%- if m.role == 'tool' %}"
        "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
        "{{- '\\n<tool_response>\\n' + show(m.content) + '\\n</tool_response>' }}"
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
        "{%- elif m.role != 'system' or not loop.first %}{{- '<|im_start|>' + m.role + '\\n' + show(m.content) }}"
        "{%- for call in m.tool_calls or [] %}{%- if not loop.first or m.content %}{{- '\\n' }}{%- endif %}"
        '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}{{- call.function.arguments | tojson }}'
        "{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )


def qwen3_vl_thinking() -> str:
    """The same with Qwen3's way with thoughts, and one begun in every answer."""
    begin = stock_qwen3().split("{%- if add_generation_prompt %}", 1)[0]
    shown = begin.replace("messages[0].content", "show(messages[0].content)")
    shown = shown.replace("message.content", "show(message.content)")
    return QWEN3_PARTS + (
        shown + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    )


def folder(path: Path, name: str, template: str | None, file: str = "chat_template.jinja") -> Path:
    write(path, KIMI_FOLDER if name.startswith("kimi") else FOLDERS[name])
    if template is not None:
        content = template if file.endswith(".jinja") else json.dumps({"chat_template": template})
        (path / file).write_text(content, encoding="utf-8")
    return path


def with_kimi_names(path: Path) -> Path:
    """A byte tokenizer has no such name."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(["[EOS]"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("name", "template", "chat"),
    [
        ("qwen2-vl-2b", QWEN2, "chatml"),
        ("qwen2.5-vl-3b", QWEN2, "chatml"),
        ("qwen3-vl-2b", qwen3_vl, "qwen3-vl"),
        ("qwen3-vl-2b", qwen3_vl_thinking, "qwen3-vl-thinking"),
        ("kimi-vl", KIMI_INSTRUCT, "kimi"),
        ("kimi-vl-thinking", KIMI_THINKING, "kimi-thinking"),
        ("andesvl-1b", stock_qwen3, "andesvl"),
    ],
)
def test_a_template_that_writes_as_the_format_leaves_it(
    name: str, template: Any, chat: str, file: str, tmp_path: Path
) -> None:
    """Warnings are errors here, so there are none either."""
    config = processor_config(folder(tmp_path, name, template if isinstance(template, str) else template(), file))

    assert config.template is None
    assert config.chat == CHAT_FORMATS[chat]


@pytest.mark.parametrize(
    ("name", "template", "difference"),
    [
        ("qwen2-vl-2b", OTHER, "the places of an image"),
        ("qwen2-vl-2b", QWEN2.replace("You are a helpful assistant.", "You are UI-TARS."), "a question"),
        ("qwen2-vl-2b", QWEN2.replace("{{ m['content'] }}", "{{ m['content']|trim }}"), "a question of spaces"),
        (
            "qwen2-vl-2b",
            QWEN2.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>"),
            "a video",
        ),
        ("qwen3-vl-2b", QWEN2, "a question"),
        ("kimi-vl", KIMI_INSTRUCT + "◁think▷", "a question"),
        ("andesvl-1b", QWEN2, "the places of an image"),
        (
            "qwen2-vl-2b",
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + QWEN2,
            "the places of images in several turns",
        ),
    ],
)
def test_another_template_is_used_and_said_to_be(name: str, template: str, difference: str, tmp_path: Path) -> None:
    source = with_kimi_names(small_vocabulary(folder(tmp_path, name, template), name))

    with pytest.warns(UserWarning, match=f"chat_template.jinja: the template writes {difference}") as seen:
        processor = Processor.from_pretrained(source)

    assert len(seen) == 1
    assert processor.config.template == template
    processor.save_pretrained(tmp_path / "b")
    with pytest.warns(UserWarning, match="the template writes"):
        again = Processor.from_pretrained(tmp_path / "b")
    assert again.config == processor.config
    assert (tmp_path / "b" / "chat_template.jinja").read_text(encoding="utf-8") == template


def test_a_template_of_ones_own_writes_the_prompt(tmp_path: Path) -> None:
    source = folder(with_vocabulary(tmp_path, "qwen2-vl"), "qwen2-vl-2b", OTHER)
    with pytest.warns(UserWarning, match="the template writes"):
        processor = Processor.from_pretrained(source)

    batch = processor([{"role": "user", "content": [{"type": "text", "text": "hello"}]}])

    by_format = Processor(processor.config.replace(template=None), processor.tokenizer)
    assert processor.decode(batch.ids.tokens.tolist(), skip_special=False) == "USER: hello ASSISTANT:"
    text = by_format.decode(by_format([{"role": "user", "content": "hello"}]).ids.tokens.tolist(), skip_special=False)
    assert text.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(TemplateError, match="labels are asked for, but the template does not mark answers"):
        processor([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], labels=True)


def test_names_of_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    template = "{{ bos_token }}\n{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    source = folder(with_vocabulary(tmp_path, "qwen2-vl"), "qwen2-vl-2b", template)
    names = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.warns(UserWarning, match="the template writes"):
        processor = Processor.from_pretrained(source)

    ids = processor([{"role": "user", "content": "<|im_end|>"}]).ids.tokens.tolist()

    assert ids == [*processor.tokenizer.encode("\n<|im_end|>"), processor.tokenizer.special["<|im_end|>"]]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages|pprint }}", "the filter 'pprint' is not among"),
        ("{{ 'x' * 10**9 }}", "a value of more than"),
        ("{{ raise_exception('not for you') }}", "not for you"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "stopped after"),
    ],
)
def test_a_template_that_cannot_be_used_is_said_not_to_be(template: str, reason: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"chat_template.jinja: .*{reason}.*The template is not used"):
        config = processor_config(folder(tmp_path, "qwen2-vl-2b", template))

    assert config.template is None
    assert config.chat == CHAT_FORMATS["chatml"]


def test_a_template_that_runs_on_does_so_for_seconds_at_most(tmp_path: Path) -> None:
    """All but a lone question is endless; each probe alone would be within its limit."""
    spin = "{% if messages|length > 1 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    begin = time.monotonic()

    with pytest.warns(UserWarning, match=r"conversations of a few words take more than 2\.0 s\. The template is not"):
        processor_config(folder(tmp_path, "qwen3-vl-2b", spin + "{% endif %}" + qwen3_vl()))

    assert time.monotonic() - begin < 10  # 4 seconds where the machine is idle; 16 without a bound


def test_a_template_for_texts_alone_is_no_processors(tmp_path: Path) -> None:
    """A tokenizer's own, such as that of the decoder a model began with."""
    source = folder(tmp_path, "qwen3-vl-2b", stock_qwen3(), "tokenizer_config.json")

    assert processor_config(source).template is None


def test_the_processors_template_goes_before_the_tokenizers(tmp_path: Path) -> None:
    folder(tmp_path, "qwen2-vl-2b", OTHER, "tokenizer_config.json")
    folder(tmp_path, "qwen2-vl-2b", QWEN2, "chat_template.json")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processor_config(tmp_path).template is None


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    folder(tmp_path, "qwen2-vl-2b", None)
    listed = [{"name": "rag", "template": OTHER}, {"name": "default", "template": QWEN2}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    assert processor_config(tmp_path).template is None

    (tmp_path / "chat_template.json").write_text('{"chat_template": 3}')
    with pytest.raises(ConfigError, match=r"chat_template\.json: chat_template must be a text, found int"):
        processor_config(tmp_path)
