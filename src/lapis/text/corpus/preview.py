"""The first records of a file as they are read, whatever kind it is: preview(path) -> kind, format, records."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lapis.text.corpus.corpus import chats, describe_file, documents, kind_of
from lapis.text.corpus.file_stream import RECORDS, suffix
from lapis.text.corpus.files import files
from lapis.text.corpus.labels import LABELED, TABLES, labeled
from lapis.text.corpus.pairs import describe_preference, first_record, is_verdict, pair_of, verdict_of
from lapis.text.corpus.records import records

Part = dict[str, Any]  # a speaker ("role") and the words ("text"), or of a document the text alone


def preview(source: str | Path, count: int, field: str | None = None) -> dict[str, Any]:
    """What a file, folder, glob or hub data set holds.

    Args:
        source: The place.
        count: How many records are read.
        field: What holds the text or the messages, where the file calls it otherwise.

    Returns:
        `kind` (documents, chats, preferences or labels), `format` (a line, or None) and `records`: of each where it
        stands (`where`) and its parts, each with `role` and `text`.

    Raises:
        DataError: For what cannot be read, naming file and line.
    """
    first = files(source, (*LABELED, ".txt", ".md"))[0]
    kind, line = _kind(first, field)
    return {"kind": kind, "format": line, "records": list(islice(_shown(kind, first, field), count))}


def _kind(first: Path, field: str | None) -> tuple[str, str | None]:
    if suffix(first) in TABLES:
        return "labels", "format: label and text"
    if suffix(first) in RECORDS and field is None:
        record = first_record(first)
        line = describe_preference(record)
        if line is not None:
            return "preferences", line
    return kind_of(first, field), describe_file(first, field)


def _shown(kind: str, path: Path, field: str | None) -> Iterator[dict[str, Any]]:
    if kind == "labels":
        for example in labeled(path):
            yield {"where": example.where, "parts": [{"role": example.label, "text": example.text}]}
    elif kind == "preferences":
        yield from _preferences(path)
    elif kind == "chats":
        for chat in chats(path, field):
            parts = [_part(message) for message in chat.messages]
            tools = [{"role": "tools", "text": str(chat.tools)}] if chat.tools else []
            yield {"where": chat.where, "parts": tools + parts}
    else:
        for document in documents(path, field):
            yield {"where": document.where, "parts": [{"role": "text", "text": document.text}]}


def _preferences(path: Path) -> Iterator[dict[str, Any]]:
    for number, record in records(path):
        if is_verdict(record):
            verdict = verdict_of(record, path, number)
            role = "desirable" if verdict.good else "undesirable"
            parts = [*map(_part, verdict.prompt), {**_part(verdict.reply), "role": role}]
        else:
            pair = pair_of(record, path, number)
            sides = [{**_part(reply), "role": role} for role, reply in
                     (("chosen", pair.chosen), ("rejected", pair.rejected))]  # fmt: skip
            parts = [*map(_part, pair.prompt), *sides]
        yield {"where": f"{path} {number}", "parts": parts}


def _part(message: Part) -> Part:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content)
    calls = message.get("tool_calls") or []
    words = [str(content)] * bool(content) + [str(call.get("function", call)) for call in calls]
    role = f"{message['role']} (not learned)" if message.get("weight") == 0 else message["role"]
    return {"role": role, "text": "\n".join(words)}
