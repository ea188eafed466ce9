"""Tools in chats: what a model is told of them, and its calls read back from the text of a reply.

Two written forms are known: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen, SmolLM and many
others), and a reply that is nothing but `{"name": ..., "parameters": {...}}` (Llama 3). What names no tool of the
request, or is no JSON, stays text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from lapis.errors import DataError
from lapis.parsing import ParseError, parse_json
from lapis.text.chat.calls import prints_tools
from lapis.text.chat.special_token_guard import template_for
from lapis.text.tokenizer.tokenizer import Tokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"  # Llama 3 may begin a call with it


@dataclass(frozen=True)
class Call:
    """A call of a tool. arguments: JSON text."""

    name: str
    arguments: str
    id: str

    def to_json(self) -> dict[str, Any]:
        """As OpenAI has it in a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Toolbox:
    """The tools of a request, as JSON objects with a "function". tags: whether calls are written with tags."""

    tools: Sequence[Mapping[str, Any]]
    tags: bool
    one: bool = False  # at most one call in a reply

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.tools)

    @property
    def strict(self) -> bool:
        """Whether a tool of them asks that its schema be kept to."""
        return any(tool["function"].get("strict") for tool in self.tools)

    def grammar(self, tokenizer: Tokenizer, only: str | None = None, forced: bool = True) -> str:
        """The Lark grammar of a reply that is a call, or that may hold calls.

        Args:
            tokenizer: Of the model; where it has the tags as tokens of their own, those are used.
            only: The one tool that may be called; None for any.
            forced: The reply is a call and nothing else; else words may stand before and between calls.
        """
        given = "arguments" if self.tags else "parameters"
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    given: tool["function"].get("parameters") or {"type": "object"},
                },
                "required": ["name", given],
                "additionalProperties": False,
                "x-guidance": {"whitespace_pattern": "[ ]?"},
            }
            for tool in self.tools
            if only is None or tool["function"]["name"] == only
        ]
        lines = [f"call: {' | '.join(f'call{i}' for i in range(len(calls)))}"]
        lines += [f"call{i}: %json {json.dumps(call)}" for i, call in enumerate(calls)]
        if not self.tags:
            start = ["start: call"] if forced else ["start: call | WORDS", r"WORDS: /[^{](.|\n)*/"]
            return "\n".join([*start, *lines])
        own = tokenizer.id(OPEN) in tokenizer.added
        opening, closing = (OPEN, CLOSE) if own else (json.dumps(OPEN), json.dumps(CLOSE))
        tagged = f'"\\n" call "\\n" {closing}'
        if forced:
            return "\n".join([f"start: {opening} {tagged}", *lines])
        tag = [f"tag: WORDS {OPEN} {tagged}"] if own else [f"open[lazy]: WORDS {opening}", f"tag: open {tagged}"]
        return "\n".join(["start: tag* last", "last: WORDS", r"WORDS: /(.|\n)*/", *tag, *lines])


def make_toolbox(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], one: bool) -> Toolbox:
    """The tools of a request for a model. Raises DataError where its template cannot tell the model of tools."""
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise DataError(f"tools: {max(names, key=names.count)} is given twice; each needs a name of its own")
    source = template_for(tokenizer, tools)
    if not prints_tools(source):
        raise DataError("tools: the model's chat template has no place for tools; describe them in a message")
    return Toolbox(tools, OPEN in source, one)


class CallReader:
    """Splits the text of a reply, as it comes, into words and calls. `calls` has those that are complete."""

    def __init__(self, toolbox: Toolbox) -> None:
        self.calls: list[Call] = []
        self._toolbox = toolbox
        self._held = ""
        self._spoken = False  # whether words were let through
        self._inside = False

    @property
    def full(self) -> bool:
        """Whether no further call may come."""
        return self._toolbox.one and bool(self.calls)

    def read(self, text: str, *, last: bool) -> str:
        """Takes in text; the words that are certain to be no part of a call. last: the reply has ended."""
        return self._feed(text) + (self._end() if last else "")

    def _feed(self, text: str) -> str:
        self._held += text
        words = ""
        while self._held:
            if self._inside:
                inner, closed, rest = self._held.partition(CLOSE)
                if not closed:
                    break
                self._inside, self._held = False, rest
                words += self._take(inner, f"{OPEN}{inner}{CLOSE}")
                continue
            if not self._spoken and self._may_be_bare():
                break
            blanks_wait = bool(self.calls) or not self._spoken  # they are words only where words follow
            before, opened, rest = self._held.partition(OPEN)
            if opened:
                self._inside, self._held = True, rest
                if before.strip() or not blanks_wait:
                    words += self._words(before)
                continue
            cut = len(self._held) - _beginning(self._held, OPEN)
            if blanks_wait and not self._held[:cut].strip():
                break
            words, self._held = words + self._words(self._held[:cut]), self._held[cut:]
            break
        return words

    def _end(self) -> str:
        """The words that are left when the reply has ended."""
        rest, self._held = self._held, ""
        if self._inside:
            self._inside = False
            return self._take(rest, OPEN + rest)
        if not self._spoken and self._bare(rest):
            return ""
        return "" if self.calls and not rest.strip() else self._words(rest)

    def _words(self, text: str) -> str:
        self._spoken = self._spoken or bool(text.strip())
        return text

    def _may_be_bare(self) -> bool:
        """Whether the reply so far may be a call without tags, or the beginning of one."""
        text = self._held.lstrip()
        return text.startswith("{") or PYTHON_TAG.startswith(text[: len(PYTHON_TAG)])

    def _take(self, inner: str, whole: str) -> str:
        """A call between tags; what is none is given back as words."""
        call = self._call(inner)
        if call is None:
            return self._words(whole)
        if not self.full:
            self.calls.append(call)
        return ""

    def _bare(self, text: str) -> bool:
        """Whether a whole reply is one call, or several with a semicolon between them."""
        calls = [self._call(part) for part in _objects(text.strip().removeprefix(PYTHON_TAG))]
        if not calls or None in calls:
            return False
        self.calls += [call for call in calls if call][: 1 if self._toolbox.one else None]
        return True

    def _call(self, text: str) -> Call | None:
        try:
            value = parse_json(text.strip(), constants=False)
        except ParseError:
            return None
        if not isinstance(value, dict) or value.get("name") not in self._toolbox.names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            return Call(value["name"], arguments, f"call_{uuid4().hex[:24]}")
        return Call(value["name"], json.dumps(arguments, ensure_ascii=False), f"call_{uuid4().hex[:24]}")


def _objects(text: str) -> list[str]:
    """The JSON objects that a text consists of; an empty list where it consists of anything else."""
    parts, decoder, place = [], json.JSONDecoder(), 0
    while place < len(text):
        try:
            _, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return []
        parts.append(text[place:end])
        place = end + len(text[end:]) - len(text[end:].lstrip("; \n"))
    return parts


def _beginning(text: str, tag: str) -> int:
    """Characters at the end of a text that a tag begins with."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
