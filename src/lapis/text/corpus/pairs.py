"""Preferences: a prompt with a reply that was chosen and one that was rejected, in the formats that people have.

    {"prompt": "...", "chosen": "...", "rejected": "..."}         prompt: text, or a list of messages
    {"chosen": [messages], "rejected": [messages]}                two chats that part at their last message
    {"conversations": [...], "chosen": {...}, "rejected": {...}}  LLaMA-Factory's, and its Alpaca form
    {"chosen": "\\n\\nHuman: ... Assistant: ...", "rejected": ...}  transcripts as of Anthropic's HH
    {"prompt": "...", "completion": "...", "label": true}         one reply and a verdict, for KTO

`margin`, a number, may say by how much a reply is better. Verdicts become pairs: the first desirable reply with the
first undesirable one, and so on; where there are fewer of one kind, these are read again, so that both weigh the same.
What is wrong is one DataError with file, line and field. Tokens are in rows/pair_rows.py.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapis.config import nearest
from lapis.errors import DataError
from lapis.parsing import quoted
from lapis.text.corpus.chat_records import (
    CHAT_FIELDS,
    RECORD_FIELDS,
    messages_of,
    prompt_of,
    refuse_fields,
    tools_of,
    with_system,
)
from lapis.text.corpus.file_stream import at
from lapis.text.corpus.files import Source, files
from lapis.text.corpus.records import checked_text, records, spelled
from lapis.wording import format_count

Message = dict[str, Any]
SIDES = ("chosen", "rejected")
PROMPTS = ("prompt", "instruction", "question", "query")
REPLIES = ("completion", "response", "output", "answer")
VERDICTS = ("label", "kto_tag")
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt.

    Attributes:
        prompt: Messages of which the last is not the assistant's.
        chosen, rejected: The assistant's message after it.
        file, line: Where it stands.
        margin: By how much chosen is better, where the record says so.
        tools: JSON schemas, or None.
        rejected_prompt, rejected_tools: Those of `rejected` where two verdicts became a pair.
    """

    prompt: list[Message]
    chosen: Message
    rejected: Message
    file: Path
    line: int
    margin: float | None = None
    tools: list[dict[str, Any]] | None = None
    rejected_prompt: list[Message] | None = None
    rejected_tools: list[dict[str, Any]] | None = None

    @property
    def where(self) -> str:
        return at(self.file, self.line)

    def side(self, name: str) -> tuple[list[Message], Message, list[dict[str, Any]] | None]:
        """Prompt, reply and tools of one of SIDES."""
        if name == "rejected" and self.rejected_prompt is not None:
            return self.rejected_prompt, self.rejected, self.rejected_tools
        return self.prompt, (self.chosen if name == "chosen" else self.rejected), self.tools


@dataclass(frozen=True)
class Verdict:
    """One reply to a prompt, and whether it is a good one."""

    prompt: list[Message]
    reply: Message
    good: bool
    file: Path
    line: int
    tools: list[dict[str, Any]] | None = None


def pairs(paths: Source | Iterable[Source]) -> Iterator[Pair]:
    """Every pair of the files.

    Args:
        paths: Files, folders, globs or data sets of the hub.

    Raises:
        DataError: For a record whose replies are equal or empty, whose prompts do not agree, that is no pair at all, or
            that is a reply with a verdict.
    """
    for path in files(paths):
        for number, record in records(path, columns=RECORD_FIELDS):
            if is_verdict(record):
                raise DataError(
                    f"{at(path, number)}: holds one reply and a verdict ({_verdict_field(record)}), which KTO learns "
                    "from; a pair has chosen and rejected"
                )
            yield pair_of(record, path, number)


def first_record(paths: Source | Iterable[Source]) -> Any:
    """The first record of the first file."""
    return next(records(files(paths)[0], columns=RECORD_FIELDS))[1]


def pairs_of_verdicts(paths: Source | Iterable[Source]) -> tuple[list[Pair], int, int]:
    """Replies with verdicts as pairs, each of a good and a bad one.

    Args:
        paths: Files, folders, globs or data sets of the hub.

    Returns:
        The pairs, and how many good and how many bad replies there were.

    Raises:
        DataError: For a record that is none, an empty reply, or where all verdicts are the same.
    """
    good: list[Verdict] = []
    bad: list[Verdict] = []
    for path in files(paths):
        for number, record in records(path, columns=RECORD_FIELDS):
            verdict = verdict_of(record, path, number)
            (good if verdict.good else bad).append(verdict)
    if not good or not bad:
        raise DataError(
            f"{files(paths)[0]}: all {format_count(len(good) + len(bad), 'reply has', 'replies have')} one verdict; "
            "both are needed"
        )
    made = []
    for i in range(max(len(good), len(bad))):
        one, two = good[i % len(good)], bad[i % len(bad)]
        place = one if i < len(good) else two
        made.append(
            Pair(one.prompt, one.reply, two.reply, place.file, place.line, None, one.tools, two.prompt, two.tools)
        )
    return made, len(good), len(bad)


def is_verdict(record: Any) -> bool:
    """Whether a record is one reply and a verdict."""
    return isinstance(record, dict) and not any(side in record for side in SIDES) and bool(_verdict_field(record))


def describe_preference(record: Any) -> str | None:
    """One line that says how a record of preferences is read; None for a record that is none."""
    if not isinstance(record, dict):
        return None
    if is_verdict(record):
        return f"format: one reply and a verdict ({_verdict_field(record)})"
    if not all(side in record for side in SIDES):
        return None
    beside = [name for name in (*PROMPTS, *CHAT_FIELDS) if name in record]
    if isinstance(record["chosen"], str) and not beside and _turns(record["chosen"]):
        return "format: HH transcripts (chosen, rejected)"
    name = "LLaMA-Factory preferences" if isinstance(record["chosen"], dict) or "instruction" in beside else "pairs"
    return f"format: {name} ({', '.join([*beside, *SIDES])})"


def pair_of(record: Any, path: Path, number: int) -> Pair:
    """One record, checked; path and number (a line, row or item) are what errors name."""
    where = at(path, number)
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {spelled(record)}; expected an object with prompt, chosen and rejected")
    for name in SIDES:
        if name not in record:
            raise DataError(f"{where}: the field {name} is missing; {nearest(name, record)}")
    refuse_fields(record, where, ("chat_template_kwargs",))
    sides = {name: record[name] for name in SIDES}
    if all(isinstance(value, str) for value in sides.values()) and not _prompt_field(record):
        turns = {name: _turns(value) for name, value in sides.items()}
        sides = {name: turns[name] or sides[name] for name in SIDES}
    prompt = _prompt(record, path, number)
    texts = [isinstance(sides[name], str) for name in SIDES]
    if texts[0] != texts[1]:
        raise DataError(f"{where}: chosen is {spelled(sides['chosen'])}, rejected is {spelled(sides['rejected'])}; "
                        "give both as text or both as messages")  # fmt: skip
    if texts[0]:
        if prompt is None:
            raise DataError(f"{where}: the field prompt is missing; {nearest('prompt', record)}")
        replies = [{"role": "assistant", "content": checked_text(sides[name], name, path, number)} for name in SIDES]
    else:
        chats = [_chat(sides[name], name, path, number) for name in SIDES]
        prompt, replies = _agreed(prompt, [head for head, _ in chats], where), [reply for _, reply in chats]
    for name, reply in zip(SIDES, replies, strict=True):
        if not _says(reply):
            raise DataError(f"{where}: {name} is an empty reply; remove the record")
    if replies[0] == replies[1]:
        raise DataError(f"{where}: chosen and rejected are the same reply; nothing is preferred, remove the record")
    prompt = with_system(record, prompt, where)
    _refuse_reply_at_end(prompt, where)
    margin, tools = _margin(record.get("margin"), where), tools_of(record, path, number)
    return Pair(prompt, replies[0], replies[1], path, number, margin, tools)


def verdict_of(record: Any, path: Path, number: int) -> Verdict:
    """One reply and its verdict. Raises DataError, naming line and field, for anything else."""
    where = at(path, number)
    if not is_verdict(record):
        raise DataError(f"{where}: has no verdict; expected prompt, completion and label (true or false), as before")
    refuse_fields(record, where, ("chat_template_kwargs",))
    label = record[_verdict_field(record)]
    reply_field = next((name for name in REPLIES if name in record), None)
    if reply_field is None:
        name = next((name for name in CHAT_FIELDS if name in record), None)
        if name is None:
            raise DataError(f"{where}: the field completion is missing; {nearest('completion', record)}")
        prompt, reply = _chat(record[name], name, path, number)
    else:
        before = _prompt(record, path, number)
        if before is None:
            raise DataError(f"{where}: the field prompt is missing; {nearest('prompt', record)}")
        value = record[reply_field]
        prompt = before
        if isinstance(value, str):
            reply = {"role": "assistant", "content": checked_text(value, reply_field, path, number)}
        else:
            between, reply = _chat(value, reply_field, path, number)
            prompt = before + between
    if not _says(reply):
        raise DataError(f"{where}: the reply is empty; remove the record")
    if not prompt:
        raise DataError(f"{where}: nothing stands before the reply; give a prompt")
    prompt = with_system(record, prompt, where)
    _refuse_reply_at_end(prompt, where)
    return Verdict(prompt, reply, bool(label), path, number, tools_of(record, path, number))


def _verdict_field(record: Mapping[str, Any]) -> str:
    """The field of the verdict; "" where there is none that is true or false beside a reply."""
    replies = any(name in record for name in (*REPLIES, *CHAT_FIELDS))
    return next((n for n in VERDICTS if replies and isinstance(record.get(n), bool)), "")


def _prompt_field(record: Mapping[str, Any]) -> str | None:
    return next((name for name in (*PROMPTS, *CHAT_FIELDS) if record.get(name) is not None), None)


def _prompt(record: Mapping[str, Any], path: Path, number: int) -> list[Message] | None:
    """Messages of a prompt, which is text, a transcript, or messages already; None where there is none."""
    name = _prompt_field(record)
    if name is None:
        return None
    value = record[name]
    if isinstance(value, str):
        if not checked_text(value, name, path, number).strip():
            raise DataError(f"{at(path, number)}: {name} is empty; a reply needs something that it replies to")
        turns = _turns(value)
        if turns and turns[-1] == {"role": "assistant", "content": ""}:  # "... Assistant:" waits for the reply
            return turns[:-1]
        return prompt_of(record, name, path, number)
    if not isinstance(value, list):
        value_text = spelled(value)
        raise DataError(f"{at(path, number)}: {name} is {value_text}; expected text or a list of messages")
    if not value:
        raise DataError(f"{at(path, number)}: {name} is empty; expected text or a list of messages")
    return prompt_of(record, name, path, number) if name in PROMPTS else messages_of(value, name, path, number)


def _turns(text: str) -> list[Message] | None:
    """The messages of a transcript ("\\n\\nHuman: ...\\n\\nAssistant: ..."); None for other text."""
    marks = list(_SPEAKER.finditer(text))
    if len(marks) < 2 or marks[0].start() or marks[0][1] != "Human":
        return None
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def _chat(value: Any, field: str, path: Path, number: int) -> tuple[list[Message], Message]:
    """The messages before the reply, and the reply. A reply alone may stand without a list."""
    messages = messages_of([value] if isinstance(value, dict) else value, field, path, number)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{at(path, number)}: {field} ends with a message of {messages[-1]['role']}; "
                        "its last message has to be the assistant's reply")  # fmt: skip
    return messages[:-1], messages[-1]


def _agreed(prompt: list[Message] | None, heads: Sequence[list[Message]], where: str) -> list[Message]:
    """What stands before both replies: `prompt`, or what the two chats share, or both where they say the same."""
    chosen, rejected = heads
    if chosen != rejected:
        place = _parting(chosen, rejected)
        raise DataError(f"{where}: chosen and rejected part at message {place + 1}, before the reply; "
                        "the prompts of a pair have to agree")  # fmt: skip
    if prompt is None:
        if not chosen:
            raise DataError(f"{where}: nothing stands before the replies; give a prompt")
        return chosen
    if chosen and chosen != prompt:
        place = _parting(chosen, prompt)
        raise DataError(f"{where}: prompt and chosen part at message {place + 1}; the prompts of a pair have to agree")
    return prompt


def _parting(one: Sequence[Any], two: Sequence[Any]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _refuse_reply_at_end(prompt: Sequence[Message], where: str) -> None:
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{where}: the prompt ends with the assistant's message; a reply follows somebody else's")


def _says(reply: Mapping[str, Any]) -> bool:
    content = reply.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(reply.get("tool_calls"))


def _margin(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{where}: margin is {quoted(value)}; expected a number")
    return float(value)
