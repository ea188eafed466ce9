"""Preference pairs: a prompt, the reply that was chosen and the one that was rejected, read from jsonl.

    {"prompt": "...", "chosen": "...", "rejected": "..."}                    prompt: text, or a list of messages
    {"chosen": [messages], "rejected": [messages]}                           two chats that part at their last message

`margin`, a number, may say by how much a reply is better. What is wrong is one DataError with file, line and field.
Leaves out: tokens (paired.py); records of one reply and a verdict.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapis.config import nearest
from lapis.errors import DataError
from lapis.text.corpus.corpus import Source, check_message, checked_text, files, records, spelled

Message = dict[str, Any]
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """prompt: messages of which the last is not the assistant's. chosen, rejected: the assistant's message after it."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    file: Path
    line: int
    margin: float | None = None

    @property
    def where(self) -> str:
        return f"{self.file} line {self.line}"


def pairs(paths: Source | Iterable[Source]) -> Iterator[Pair]:
    """Every pair of the jsonl files. Raises DataError for a record whose replies are equal or empty, whose prompts do
    not agree, or that is no pair at all."""
    for path in files(paths):
        for number, record in records(path):
            yield pair_of(record, path, number)


def pair_of(record: Any, path: Path, number: int) -> Pair:
    """One record, checked; path and number (a line) are what errors name."""
    where = f"{path} line {number}"
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {spelled(record)}; expected an object with prompt, chosen and rejected")
    for name in SIDES:
        if name not in record:
            raise DataError(f"{where}: the field {name} is missing; {nearest(name, record)}")
    prompt = _prompt(record.get("prompt"), path, number)
    texts = [isinstance(record[name], str) for name in SIDES]
    if texts[0] != texts[1]:
        raise DataError(f"{where}: chosen is {spelled(record['chosen'])}, rejected is {spelled(record['rejected'])}; "
                        "give both as text or both as messages")  # fmt: skip
    if texts[0]:
        if prompt is None:
            raise DataError(f"{where}: the field prompt is missing; {nearest('prompt', record)}")
        replies = [{"role": "assistant", "content": checked_text(record[name], name, path, number)} for name in SIDES]
    else:
        chats = [_chat(record[name], name, path, number) for name in SIDES]
        prompt, replies = _agreed(prompt, [head for head, _ in chats], where), [reply for _, reply in chats]
    for name, reply in zip(SIDES, replies, strict=True):
        if not _says(reply):
            raise DataError(f"{where}: {name} is an empty reply; remove the record")
    if replies[0] == replies[1]:
        raise DataError(f"{where}: chosen and rejected are the same reply; nothing is preferred, remove the record")
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{where}: the prompt ends with the assistant's message; a reply follows somebody else's")
    return Pair(prompt, replies[0], replies[1], path, number, _margin(record.get("margin"), where))


def _prompt(value: Any, path: Path, number: int) -> list[Message] | None:
    """Messages of a prompt that is text or messages already; None where there is none."""
    where = f"{path} line {number}"
    if value is None:
        return None
    if isinstance(value, str):
        if not checked_text(value, "prompt", path, number).strip():
            raise DataError(f"{where}: prompt is empty; a reply needs something that it replies to")
        return [{"role": "user", "content": value}]
    return _messages(value, "prompt", path, number)


def _messages(value: Any, field: str, path: Path, number: int) -> list[Message]:
    if not isinstance(value, list) or not value:
        said = spelled(value) if value != [] else "empty"
        raise DataError(f"{path} line {number}: {field} is {said}; expected text or a list of messages")
    for i, message in enumerate(value):
        check_message(message, f"{field}[{i}]", path, number)
    return value


def _chat(value: Any, field: str, path: Path, number: int) -> tuple[list[Message], Message]:
    """The messages before the reply, and the reply."""
    messages = _messages(value, field, path, number)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{path} line {number}: {field} ends with a message of {messages[-1]['role']}; "
                        "its last message has to be the assistant's reply")  # fmt: skip
    return messages[:-1], messages[-1]


def _agreed(prompt: list[Message] | None, heads: Sequence[list[Message]], where: str) -> list[Message]:
    """What stands before both replies: `prompt`, or what the two chats share, or both where they say the same."""
    chosen, rejected = heads
    if chosen != rejected:
        at = _parting(chosen, rejected)
        raise DataError(f"{where}: chosen and rejected part at message {at + 1}, before the reply; "
                        "the prompts of a pair have to agree")  # fmt: skip
    if prompt is None:
        if not chosen:
            raise DataError(f"{where}: nothing stands before the replies; give a prompt")
        return chosen
    if chosen and chosen != prompt:
        at = _parting(chosen, prompt)
        raise DataError(f"{where}: prompt and chosen part at message {at + 1}; the prompts of a pair have to agree")
    return prompt


def _parting(one: Sequence[Any], two: Sequence[Any]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _says(reply: Mapping[str, Any]) -> bool:
    content = reply.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(reply.get("tool_calls"))


def _margin(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{where}: margin is {value!r:.40}; expected a number")
    return float(value)
