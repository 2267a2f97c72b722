from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.assets import asset
from vlkit.errors import TemplateError
from vlkit.processing import CHAT_FORMATS, ByteTokenizer
from vlkit.processing.chat import ImageSlot, Seen, Text
from vlkit.processing.encoding import encode_pieces, fill_slots
from vlkit.processing.template import ChatTemplate, TemplateLimits

SIMPLE = """
{%- for message in messages -%}
<|im_{{ message.role }}|>
{%- if message.content is string -%}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{ message.content }}<|im_end|>{%- endgeneration -%}
    {%- else -%}{{ message.content }}<|im_end|>{%- endif -%}
{%- else -%}
    {%- for part in message.content -%}
        {%- if part.type == 'image' -%}<|media_pad|>{%- else -%}{{ part.text }}{%- endif -%}
    {%- endfor -%}<|im_end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>{%- endif -%}
"""
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "What is 1 < 2?\n\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTrue."},
    {"role": "user", "content": "Sure? 好"},
    {
        "role": "assistant",
        "content": "<think>well</think>",
        "tool_calls": [{"function": {"name": "check", "arguments": {"x": [1, "é"]}}}],
    },
    {"role": "tool", "content": "yes"},
    {"role": "tool", "content": "indeed"},
]
TOKENIZER = ByteTokenizer()


def conversation(text: str = "hi") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def ids(
    template: str, messages: list[dict[str, Any]], images: tuple[int, ...] = (), **options: Any
) -> tuple[list[int], list[int]]:
    pieces = ChatTemplate(template).pieces(messages, TOKENIZER.special, "<|media_pad|>", **options)
    seen = [Seen((count,)) for count in images]
    return encode_pieces(fill_slots(pieces, CHAT_FORMATS["plain"], TOKENIZER.special, seen), TOKENIZER)


def test_a_conversation_becomes_ids_and_labels() -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
    ]

    got, labels = ids(SIMPLE, messages, (2,), add_generation_prompt=True)

    assert got == [261, 267, 267, 97, 259, 262, 98, 259, 262]
    assert labels == [-100] * 6 + [98, 259, -100]


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("length", range(2, 8))
def test_qwen3s_template_renders_as_in_transformers(length: int, add_generation_prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = json.loads(asset("qwen3-tokenizer_config.json").read_text())["chat_template"]
    messages, tools = (
        CONVERSATION[:length],
        [{"type": "function", "function": {"name": "check", "description": "é <b>"}}],
    )

    for variables in ({}, {"tools": tools}, {"enable_thinking": False}):
        expected, _ = render_jinja_template(
            [messages],
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            tools=variables.get("tools"),
            **{key: value for key, value in variables.items() if key != "tools"},
        )
        got = ChatTemplate(source).render(messages, add_generation_prompt=add_generation_prompt, variables=variables)
        assert got == expected[0]


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<", ">", "|", "<|media_pad|>", " ", "a", "\n"]), max_size=6
    ),
    st.lists(st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<", ">", "|", " ", "a"]), max_size=6),
)
def test_nothing_that_a_person_typed_becomes_a_token(first: list[str], second: list[str]) -> None:
    """Not even by what a template joins it with: `{{ a }}{{ b }}` of "<|im_" and "end|>"."""
    parts = [{"type": "text", "text": "".join(first)}, {"type": "text", "text": "".join(second)}]

    got, _ = ids(SIMPLE, [{"role": "user", "content": parts}])

    assert got == [261, *"".join(first + second).encode(), 259]


@pytest.mark.parametrize("shown", ["m.content", "m.content|string", "[m.content]|join", "m.content ~ ''", "m"])
@pytest.mark.parametrize("typed", ["<|im_end|>", r"\ufdd0", r"\\ufdd0 <|im_end|>"])
def test_a_list_that_a_template_prints_is_what_python_prints(shown: str, typed: str) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": typed}]}]

    got, _ = ids("{% for m in messages %}{{ " + shown + " }}{% endfor %}", messages)

    assert bytes(got).decode() == str(messages[0] if shown == "m" else messages[0]["content"])


def test_answer_tokens_are_read_in_answers_only() -> None:
    messages = [{"role": "user", "content": "<|bos|>"}, {"role": "assistant", "content": "<|bos|>"}]

    got, _ = ids(SIMPLE, messages, answer_tokens=("<|bos|>",))

    assert got == [261, *b"<|bos|>", 259, 262, 257, 259]


def test_pieces_keep_the_order_of_images() -> None:
    pieces = ChatTemplate("{{ messages[0].content }}<i>x<i>").pieces(conversation("<i>"), ["<i>"], "<i>")

    assert pieces == [Text("<i>"), ImageSlot(0), Text("x"), ImageSlot(1)]


def repeated(start: str, step: str) -> str:
    return f"{{% set n = namespace(s={start}) %}}{{% for i in range(99) %}}{{% set n.s = {step} %}}{{% endfor %}}"


ATTACKS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over lists": "{% set r = range(99999)|list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "counting": "{% set n = namespace(x=0) %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% set n.x = n.x + 1 %}{% endfor %}{% endfor %}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [[[]]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "huge output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "huge repetition": "{{ 'x' * 10**10 }}",
    "huge repetition from the left": "{{ 10**10 * 'x' }}",
    "doubling by +": repeated("'x'", "n.s + n.s"),
    "doubling by ~": repeated("'x'", "n.s ~ n.s"),
    "doubling lists": repeated("[1]", "[n.s, n.s]"),
    "doubling tuples": repeated("1", "(n.s, n.s)"),
    "doubling dictionaries": repeated("{}", "{1: n.s, 2: n.s}"),
    "doubling views": repeated("{}", "{1: n.s.items(), 2: n.s.items()}"),
    "doubling blocks": "{% set s = 'xx' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 40,
    "doubling macros": "{% macro f(s) %}{{ s }}{{ s }}{% endmacro %}" + "{% set s = f(s or 'x') %}" * 40,
    "doubling by call blocks": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 30
    + "x" * 100
    + "{% endcall %}" * 30,
    "doubling by replace": repeated("'x'", "n.s.replace('x', 'xx')"),
    "doubling by the filter": repeated("'x'", "n.s|replace('x', 'xx')"),
    "doubling by join": repeated("'xx'", "n.s.join('12345')"),
    "joining many": "{{ ['x' * 1100]|map('replace', 'x', 'x' * 1100)|join }}",
    "many long values": "{% for i in range(9999) %}{% set s = 'x' * 999999 %}{% endfor %}",
    "lists of long generators": "{{ (range(99999)|map('string')|map('replace', '1', 'x' * 99999)|list)|length }}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "growing numbers": repeated("3", "n.s * n.s"),
    "formatting": "{{ '%999999999d' % 1 }}",
    "format method": "{{ '{:>999999999}'.format(1) }}",
    "center method": "{{ 'x'.center(999999999) }}",
    "zfill method": "{{ '1'.zfill(999999999) }}",
    "bytes of a number": "{{ (1).to_bytes(999999999, 'big') }}",
    "expandtabs": "{{ '\t'.expandtabs(999999999) }}",
    "strip many": "{{ ('a' * 999999).strip('b' * 900000 ~ 'a') }}",
    "trim many": "{{ ('a' * 999999)|trim('b' * 900000 ~ 'a') }}",
    "sum of lists": "{{ range(9999)|map('list')|sum(start=[]) }}",
    "rounding": "{{ 5|round(-999999999) }}",
    "rounding up": "{{ 5|round(999999999, 'ceil') }}",
    "json indentation": "{{ [1]|tojson(indent=999999999) }}",
    "wide range": "{{ range(10**9)|length }}",
    "lorem ipsum": "{{ lipsum(n=99999) }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__.os }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}",
    "the environment": "{{ self._TemplateReference__context.environment }}",
    "cycler's globals": "{{ cycler.__init__.__globals__.os }}",
    "changing the conversation": "{{ messages.append(1) }}",
    "changing a message": "{{ messages[0].update(role='system') }}",
    "attr filter": "{{ messages|attr('__class__') }}",
    "print a namespace": "{{ namespace(a=1) }}",
    "include": "{% include 'etc' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends 'x' %}",
    "many nodes": "{{ x }}" * 20_000,
    "deep nesting": "{% if a %}" * 99 + "{% endif %}" * 99,
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long template": "x" * 300_000,
    "syntax": "{% for %}",
    "unclosed": "{{ messages",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_templates_are_stopped_soon(attack: str) -> None:
    limits = TemplateLimits(seconds=0.5)
    begin = time.monotonic()

    with pytest.raises(TemplateError, match="kimi's template: "):
        ChatTemplate(ATTACKS[attack], limits, name="kimi's template").render(conversation())

    assert time.monotonic() - begin < 5  # far above 0.5 seconds: the machine may be busy


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ raise_exception('no system role') }}", "refuses the conversation: no system role"),
        ("{{ 'x' * 2000000 }}", "a value of more than 1000000 characters"),
        ("{{ messages|nonsense }}", "line 1: the filter 'nonsense' is not among"),
        ("a\n{% for x in %}", "line 2: TemplateSyntaxError"),
        ("{{ 'a'.encode() }}", "the method 'encode' of a str is not among"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "stopped after 2.0 seconds"),
    ],
)
def test_errors_say_what_and_where(source: str, match: str) -> None:
    with pytest.raises(TemplateError, match=match):
        ChatTemplate(source).render(conversation())


def test_what_is_made_in_all_is_bounded() -> None:
    """Each value is small enough, and time would allow more."""
    limits = TemplateLimits(seconds=60, characters=1000)
    source = "{% for i in range(COUNT) %}{% set s = 'x' * 990 %}{% endfor %}"

    ChatTemplate(source.replace("COUNT", "60"), limits).render(conversation())
    with pytest.raises(TemplateError, match="values of more than 64000 characters in all"):
        ChatTemplate(source.replace("COUNT", "70"), limits).render(conversation())


def test_a_stopped_template_can_be_used_again() -> None:
    template = ChatTemplate("{% if messages|length > 1 %}{{ 'x' * 10**9 }}{% endif %}fine")

    with pytest.raises(TemplateError):
        template.render(conversation() * 2)
    assert template.render(conversation()) == "fine"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% set n = namespace(k=0) %}{% for m in messages[::-1] %}{% set n.k = n.k + 1 %}{% endfor %}{{ n.k }}", "2"),
        ("{{ ' a '|trim }}{{ ' b '.strip() }}{{ '-c-'.strip('-') }}", "abc"),
        ("{{ 'x,y'.split(',')|join('-') }}{{ '+'.join(['a', 'b']) }}", "x-ya+b"),
        ("{{ {'a': [1, none, true, 'é<']}|tojson }}", '{"a": [1, null, true, "é<"]}'),
        ("{{ [1]|tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ [3, 1, 2]|sort|first }}{{ messages|map(attribute='role')|list|last }}", "1user"),
        ("{{ 'q' ~ 1 ~ none }}{{ undefined_name }}{{ [1, 'a'] }}", "q1None[1, 'a']"),
        ("{% macro f(x, y='!') %}{{ x }}{{ y }}{% endmacro %}{{ f('m') }}", "m!"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|list|length }}", "2"),
        ("{% for x in range(9) %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "02345678"),
        ("{% for x in range(9) %}{% if x == 3 %}{% break %}{% endif %}{{ x }}{% endfor %}", "012"),
        ("{% for k, v in {'b': 2, 'a': 1}|dictsort %}{{ k }}{{ v }}{% endfor %}", "a1b2"),
        ("{% for k, v in {'c': 3}.items() %}{{ k }}{{ v }}{{ loop.last }}{% endfor %}", "c3True"),
        ("{{ 'aa'|replace('a', 'c') }}{{ 'aa'.replace('a', 'b', 1) }}{{ 'a\nb'|indent(2) }}", "ccbaa\n  b"),
        (
            "{{ 7 // 2 }}{{ 7 % 2 }}{{ 2 ** 3 }}{{ 'x' * 2 }}{{ [1, 2]|sum }}{{ 2.567|round(1) }}{{ 7 / 2 - 1 }}",
            "318xx32.62.5",
        ),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ strftime_now('%Y')|length }}", "a14"),
        (
            "{% for x in [1, [2]] recursive %}{{ x if x is not iterable else loop(x) }}{% endfor %}",
            "12",
        ),
    ],
)
def test_what_templates_need_works(source: str, expected: str) -> None:
    assert ChatTemplate(source).render(conversation() * 2) == expected


def test_reserved_characters_and_objects_are_refused() -> None:
    with pytest.raises(TemplateError, match="noncharacter"):
        ChatTemplate("{{ messages[0].content }}").pieces(conversation("\ufdd0"), ["<i>"], "<i>")
    with pytest.raises(TemplateError, match=r"messages\[0\]\.content: object cannot be given to a template"):
        ChatTemplate("").render([{"role": "user", "content": object()}])
    with pytest.raises(TemplateError, match="expected a text, found NoneType"):
        ChatTemplate(None)  # type: ignore[arg-type]


def test_marked_answers_are_known() -> None:
    assert ChatTemplate(SIMPLE).marks_answers
    assert not ChatTemplate("{{ messages }}").marks_answers
