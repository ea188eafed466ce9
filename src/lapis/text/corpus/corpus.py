"""Files of text and chats, read in a stream: documents(paths), chats(paths).

.txt and .md hold one document each; .jsonl one object per line, .parquet one per row, with a field of text (`text`) or
of messages (`messages`). .gz and .zst of these too, but for parquet. A field of another name is found where there is
only one that could be it, or is named with `field`. Memory is bounded: a long .txt comes in pieces. What is wrong is
one DataError with file, line or row, and byte or field; nothing is skipped in silence.
Leaves out: which files are meant (files.py), tokens (packing.py), mixing of sources (mixture.py).
"""

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lapis.config import nearest
from lapis.errors import DataError
from lapis.text.corpus.file_stream import PIECE, OpenedFile, at, suffix
from lapis.text.corpus.files import Source, files
from lapis.text.corpus.records import checked_text, not_utf8, records, refuse_nul, spelled

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_FIELDS = ("text", "content", "body", "document", "article", "raw_content")
CHAT_FIELDS = ("messages", "conversations", "conversation")
_SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # ShareGPT's words for roles

__all__ = [
    "Chat", "Document", "Source", "chats", "check_message", "checked_text", "documents", "files", "kind_of", "records",
    "spelled", "texts",
]  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A text, or a piece of one. more: it goes on in the next piece. rest: it began before. line: or row, from 1."""

    text: str
    file: Path
    line: int
    more: bool = False
    rest: bool = False

    @property
    def where(self) -> str:
        return at(self.file, self.line)


@dataclass(frozen=True)
class Chat:
    """Messages of `role` and `content`, at least one of them the assistant's. tools: JSON schemas, or None."""

    messages: list[dict[str, Any]]
    file: Path
    line: int
    tools: list[dict[str, Any]] | None = None

    @property
    def where(self) -> str:
        return at(self.file, self.line)


def documents(paths: Source | Iterable[Source], field: str | None = None) -> Iterator[Document]:
    """Every document of the files. Raises DataError where a file is empty, damaged, or holds something else."""
    for path in files(paths):
        yield from documents_of(path, field)


def chats(paths: Source | Iterable[Source], field: str | None = None) -> Iterator[Chat]:
    """Every chat of the files. Raises DataError, naming line and field, for what is not a chat with an answer."""
    for path in files(paths):
        yield from chats_of(path, field)


def documents_of(path: Path, field: str | None = None, first: int = 0, last: int | None = None) -> Iterator[Document]:
    """The documents of one file, or of a stretch of it (see OpenedFile). Lines are counted from `first`."""
    if suffix(path) in (".jsonl", ".parquet"):
        for number, record in records(path, first, last, _columns(field, TEXT_FIELDS + CHAT_FIELDS)):
            yield Document(_text_of(record, field, path, number), path, number)
    else:
        yield from _pieces(path, first, last)


def chats_of(path: Path, field: str | None = None, first: int = 0, last: int | None = None) -> Iterator[Chat]:
    """The chats of one file, or of a stretch of it."""
    if suffix(path) not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: holds plain text; chats are read from .jsonl or .parquet with messages")
    for number, record in records(path, first, last, _columns(field, (*CHAT_FIELDS, "text", "tools"))):
        yield _chat_of(record, field, path, number)


def texts(paths: Source | Iterable[Source], field: str | None = None) -> Iterator[str]:
    """All text of documents and chats alike, for training a tokenizer."""
    for path in files(paths):
        if kind_of([path], field) == "chats":
            for chat in chats([path], field):
                yield from (m["content"] for m in chat.messages if isinstance(m.get("content"), str))
        else:
            yield from (document.text for document in documents([path], field))


def kind_of(paths: Source | Iterable[Source], field: str | None = None) -> Literal["documents", "chats"]:
    """What the first record of the first file is."""
    first = files(paths)[0]
    if suffix(first) not in (".jsonl", ".parquet"):
        return "documents"
    number, record = next(records(first, columns=_columns(field, TEXT_FIELDS + CHAT_FIELDS)))
    if field is not None:
        return "chats" if isinstance(record, dict) and isinstance(record.get(field), list) else "documents"
    if isinstance(record, dict) and any(name in record for name in CHAT_FIELDS) and "text" not in record:
        return "chats"
    _text_of(record, None, first, number)
    return "documents"


def _columns(field: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    return known if field is None else (field, "tools")


def _pieces(path: Path, first: int, last: int | None) -> Iterator[Document]:
    """A .txt in pieces, cut where a tokenizer would cut as well: after a line, else before white space.

    A stretch begins and ends at such a place too (shares.py), so its first piece goes on with what came before it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, line, position, lines, any_text = "", 1, first, 1, first > 0 or last is not None
    rest = first > 0
    with OpenedFile(path, first, last) as file:
        while True:
            raw = file.read(PIECE)
            ended = not raw
            if position == 0 and raw.startswith(codecs.BOM_UTF8):
                raw, position = raw[3:], 3
            waiting = len(decoder.getstate()[0])
            refuse_nul(raw, path, lines, position)
            try:
                fresh = decoder.decode(raw, final=ended)
            except UnicodeDecodeError as error:
                place = lines + error.object[: error.start].count(b"\n")
                raise not_utf8(path, place, position - waiting + error.start, error) from None
            position += len(raw)
            lines += raw.count(b"\n")
            held += fresh
            any_text = any_text or bool(fresh.strip())
            if ended:
                break
            cut = _cut(held) if len(held) >= PIECE // 4 else 0
            if cut:
                yield Document(held[:cut], path, line, more=True, rest=rest)
                line += held.count("\n", 0, cut)
                held, rest = held[cut:], True
    if not any_text:
        raise DataError(f"{path}: is empty; there is nothing to read")
    yield Document(held, path, line, more=last is not None, rest=rest)


def _cut(text: str) -> int:
    """Where to cut a long text, or 0 for not yet. A text without any white space is cut where it stands."""
    for pattern in (r"\S\n(?=\S)", r"\S(?=\s)"):
        found = list(re.finditer(pattern, text[-4096:]))
        if found:
            return max(0, len(text) - 4096) + found[-1].end()
    return len(text) if len(text) >= PIECE else 0


def _text_of(record: Any, field: str | None, path: Path, number: int) -> str:
    where = at(path, number)
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {spelled(record)}; expected an object with text")
    if field is not None:
        return checked_text(_named(record, field, where), field, path, number)
    chat = next((name for name in CHAT_FIELDS if name in record), None)
    found = [name for name in TEXT_FIELDS if name in record]
    if chat is not None and "text" in found:
        raise DataError(f"{where}: has both text and {chat}; which is meant cannot be known; say it with field")
    if chat is not None:
        raise DataError(f"{where}: holds a chat ({chat}) where a document (text) was expected")
    if not found:
        raise DataError(f"{where}: the field text is missing; {nearest('text', record)}, or name another with field")
    strings = [name for name in found if isinstance(record[name], str)]
    if len(strings) > 1:
        raise DataError(
            f"{where}: {' and '.join(strings)} could both be the text; say which with field, as in field={strings[0]}"
        )
    name = (strings or found)[0]
    return checked_text(record[name], name, path, number)


def _named(record: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in record:
        raise DataError(f"{where}: the field {field} is missing; {nearest(field, record)}")
    return record[field]


def _chat_of(record: Any, field: str | None, path: Path, number: int) -> Chat:
    where = at(path, number)
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {spelled(record)}; expected an object with messages")
    found = [name for name in CHAT_FIELDS if name in record]
    if field is None and not found:
        if "text" in record:
            raise DataError(f"{where}: holds a document (text) where a chat (messages) was expected")
        raise DataError(f"{where}: the field messages is missing; {nearest('messages', record)}")
    if field is None and len(found) > 1:
        raise DataError(f"{where}: {' and '.join(found)} could both be the chat; say which with field")
    name = field or found[0]
    messages = _named(record, name, where)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: {name} is {spelled(messages) if messages else 'empty'}; expected a list of messages")
    messages = [_plain(message) for message in messages]
    for i, message in enumerate(messages):
        check_message(message, f"{name}[{i}]", path, number)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's; there is nothing to learn from it")
    tools = record.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where}: tools is {spelled(tools)}; expected a list of objects")
    return Chat(messages, path, number, tools or None)


def _plain(message: Any) -> Any:
    """A message under our names: ShareGPT says from and value, human and gpt. Parquet fills gaps with null."""
    if not isinstance(message, dict):
        return message
    if "from" in message and "value" in message and "role" not in message:
        role = message["from"]
        message = {"role": _SPEAKERS.get(role, role) if isinstance(role, str) else role, "content": message["value"]}
    return {name: value for name, value in message.items() if value is not None or name == "content"}


def check_message(message: Any, field: str, path: Path, number: int) -> None:
    """Raises DataError, naming line and field, for what is not a message of a chat."""
    where = f"{at(path, number)}: {field}"
    if not isinstance(message, dict):
        raise DataError(f"{where} is {spelled(message)}; expected an object with role and content")
    if "role" not in message:
        raise DataError(f"{where}.role is missing; {nearest('role', message)}")
    if message["role"] not in ROLES:
        raise DataError(f"{where}.role is {message['role']!r:.40}; {nearest(str(message['role']), ROLES)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if "content" not in message:
        raise DataError(f"{where}.content is missing; {nearest('content', message)}")
    if isinstance(content, list):
        for j, part in enumerate(content):
            if not isinstance(part, dict) or "type" not in part:
                raise DataError(f"{where}.content[{j}] is {spelled(part)}; expected an object with type and text")
            if part["type"] == "text":
                checked_text(part.get("text"), f"{field}.content[{j}].text", path, number)
    else:
        checked_text(content, f"{field}.content", path, number)
