"""Tools in a conversation, the way Qwen writes them: signatures before it, calls in answers, results as questions.

Source: the chat template of Qwen3, arXiv:2505.09388, in its published tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlkit.errors import TemplateError

SECTION_BEGIN = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
SECTION_END = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
CALL_BEGIN, CALL_END = "<tool_call>\n", "\n</tool_call>"
RESULT_BEGIN, RESULT_END = "<tool_response>\n", "\n</tool_response>"


def signatures(tools: Sequence[Any]) -> str:
    """One line of JSON per tool, each after a line break.

    Raises:
        TemplateError: Not a list of JSON objects.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise TemplateError(f"tools: expected a list of signatures, found {type(tools).__name__}")
    lines = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise TemplateError(f"tool {index}: expected a JSON object, found {type(tool).__name__}")
        lines.append("\n" + _json(tool, f"tool {index}"))
    return "".join(lines)


def calls(message: Mapping[str, Any], where: str) -> list[str]:
    """What stands between the marks of each call in an answer.

    Raises:
        TemplateError: A call without a name or arguments.
    """
    listed = message.get("tool_calls") or []
    if isinstance(listed, (str, bytes, Mapping)) or not isinstance(listed, Sequence):
        raise TemplateError(f"{where}: tool_calls must be a list, found {type(listed).__name__}")
    texts = []
    for index, call in enumerate(listed):
        if isinstance(call, Mapping) and call.get("function"):
            call = call["function"]
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise TemplateError(f"{where}: tool call {index} needs 'name', a str, and 'arguments'; found {call!r:.200}")
        arguments = call["arguments"]
        if not isinstance(arguments, str):
            arguments = _json(arguments, f"{where}: tool call {index}")
        texts.append(f'{{"name": "{call["name"]}", "arguments": {arguments}}}')
    return texts


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"{where}: cannot be written as JSON: {error}") from error
