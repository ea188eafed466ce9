"""Calls of tools under templates that print none, or that print arguments only as objects or only as JSON text.

For what a model learns from or is scored on; the prompts that a user gives are rendered as they are.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from lapis.errors import DataError
from lapis.parsing import quoted
from lapis.text.chat.template import render_jobs
from lapis.text.corpus.chat_records import arguments_of

Message = Mapping[str, Any]
_NAME = "lapis-argument"  # of a call that shows how a template prints arguments
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def prints_calls(source: str) -> bool:
    """Whether a template prints calls of tools."""
    return "tool_calls" in source


def prints_tools(source: str) -> bool:
    """Whether a template prints the tools that a chat may call."""
    return re.search(r"\btools\b", source) is not None


def with_readable_calls(source: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> Sequence[Message]:
    """Messages with calls of tools as the template can print them.

    Where it prints no calls, they are JSON text in the content. Where it would print arguments that are JSON text as
    text once more (quoted), they become an object; where it takes text only, objects become JSON.

    Args:
        source: The template.
        messages: The chat.
        variables: What else the template is given.

    Raises:
        DataError: For arguments that are no JSON object, where the template needs one.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages
    if not prints_calls(source):
        return [_written(message) for message in messages]
    values = {**variables, "tools": _TOOLS if variables.get("tools") else None}
    forms = _argument_forms(source, json.dumps(values, sort_keys=True, default=str))
    if forms in ((True, True), (False, False)):  # it takes both, or shows nothing of either
        return messages
    changed = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, (list, tuple)):
            message = {**message, "tool_calls": [_with_arguments(call, as_object=forms[0]) for call in calls]}
        changed.append(message)
    return changed


def _written(message: Message) -> Message:
    calls = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    if not calls:
        return message
    words = [message["content"]] if message.get("content") else []
    for call in calls:
        called = {"name": call.get("name"), "arguments": arguments_of(call.get("arguments"))}
        words.append(json.dumps(called, ensure_ascii=False))
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join(words)}


def _with_arguments(call: Any, as_object: bool) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if as_object and isinstance(arguments, str):
        arguments = arguments_of(arguments)
        if not isinstance(arguments, Mapping):
            raise DataError(
                f"arguments of a call are {quoted(arguments)}, and the chat template reads them as an object; mend them"
            )
    elif not as_object and isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


@lru_cache(maxsize=256)
def _argument_forms(source: str, variables: str) -> tuple[bool, bool]:
    """Whether a template prints arguments that are an object as they are, and those that are JSON text; tried."""
    values = json.loads(variables)
    texts = []
    for arguments in ({_NAME: 1}, json.dumps({_NAME: 1})):
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": arguments}}
        messages: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": "b"},
            {"role": "assistant", "content": "c"},
        ]
        (rendering,) = render_jobs(source, messages, [(len(messages), False)], values)
        texts.append("" if rendering.error else rendering.text)
    spoiled = (f"'{_NAME}'", f"&#39;{_NAME}", f'\\"{_NAME}', f"\\u0022{_NAME}")
    of_object, of_text = (_NAME in text and not any(mark in text for mark in spoiled) for text in texts)
    return of_object, of_text
