"""Files of text and chats, read in a stream: documents(paths), chats(paths).

.txt and .md hold one document each; .jsonl one object per line, .json an array of them, .parquet one per row, with a
field of text (`text`) or a chat in one of the formats of chat_records.py. .gz and .zst of these too, but for parquet. A
field of another name is taken where there is only one that could be it, or is named with `field`. Memory is bounded: a
long .txt comes in pieces. What is wrong is one DataError with file, line, row or item, and byte or field; nothing is
skipped in silence. Which files paths stand for is in files.py.
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lapis.config import nearest
from lapis.errors import DataError
from lapis.text.corpus.chat_records import (
    CHAT_FIELDS,
    MEDIA,
    RECORD_FIELDS,
    ChatRecord,
    chat_of,
    check_message,
    describe_format,
    format_of,
)
from lapis.text.corpus.file_stream import PIECE, RECORDS, OpenedFile, at, suffix
from lapis.text.corpus.files import Source, files
from lapis.text.corpus.records import checked_text, empty, not_utf8, records, refuse_nul, spelled

TEXT_FIELDS = ("text", "content", "body", "document", "article", "raw_content")
Kind = Literal["documents", "chats"]

__all__ = [
    "ChatRecord", "Document", "Kind", "Source", "chats", "check_message", "checked_text", "describe_file", "documents",
    "files", "kind_of", "records", "spelled", "texts",
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


def documents(paths: Source | Iterable[Source], field: str | None = None) -> Iterator[Document]:
    """Every document of the files. Raises DataError where a file is empty, damaged, or holds something else."""
    for path in files(paths):
        yield from documents_of(path, field)


def chats(paths: Source | Iterable[Source], field: str | None = None) -> Iterator[ChatRecord]:
    """Every chat of the files. Raises DataError, naming line and field, for what is not a chat with an answer."""
    for path in files(paths):
        yield from chats_of(path, field)


def documents_of(path: Path, field: str | None = None, first: int = 0, last: int | None = None) -> Iterator[Document]:
    """The documents of one file, or of a stretch of it (see OpenedFile). Lines are counted from `first`."""
    if suffix(path) in RECORDS:
        for number, record in records(path, first, last, set(_columns(field)) - set(MEDIA)):
            yield Document(_text_of(record, field, path, number), path, number)
    else:
        yield from _pieces(path, first, last)


def chats_of(path: Path, field: str | None = None, first: int = 0, last: int | None = None) -> Iterator[ChatRecord]:
    """The chats of one file, or of a stretch of it."""
    if suffix(path) not in RECORDS:
        raise DataError(f"{path}: holds plain text; chats are read from .jsonl, .json or .parquet with messages")
    for number, record in records(path, first, last, _columns(field)):
        yield chat_of(record, field, path, number)


def texts(paths: Source | Iterable[Source], field: str | None = None) -> Iterator[str]:
    """All text of documents and chats alike, for training a tokenizer."""
    for path in files(paths):
        if kind_of([path], field) == "chats":
            for chat in chats([path], field):
                yield from (m["content"] for m in chat.messages if isinstance(m.get("content"), str))
        else:
            yield from (document.text for document in documents([path], field))


def kind_of(paths: Source | Iterable[Source], field: str | None = None, prefer: Kind | None = None) -> Kind:
    """What the first record of the first file is.

    Args:
        paths: Files, folders, globs, hub data sets.
        field: What holds the text or the messages.
        prefer: What is taken where a record is both: an instruction that is also written out as `text`.

    Raises:
        DataError: Where it is neither, or both and nothing says which.
    """
    first = files(paths)[0]
    if suffix(first) not in RECORDS:
        return "documents"
    number, record = next(records(first, columns=_columns(field)))
    if field is not None:
        return "chats" if isinstance(record, dict) and isinstance(record.get(field), list) else "documents"
    if isinstance(record, dict) and "text" not in record:
        if any(name in record for name in CHAT_FIELDS) or format_of(record) is not None:
            return "chats"
    elif isinstance(record, dict) and format_of(record) is not None and not any(n in record for n in CHAT_FIELDS):
        return prefer or "chats"
    _text_of(record, None, first, number)
    return "documents"


def describe_file(paths: Source | Iterable[Source], field: str | None = None) -> str | None:
    """One line that says in which format the first record of the first file is read; None for plain text."""
    first = files(paths)[0]
    if suffix(first) not in RECORDS:
        return None
    record = next(records(first, columns=_columns(field)))[1]
    return describe_format(record) if isinstance(record, dict) and field is None else None


def _columns(field: str | None) -> tuple[str, ...]:
    """Columns of a parquet file that say what a record is."""
    return (*TEXT_FIELDS, *RECORD_FIELDS, *(() if field is None else (field,)))


def _pieces(path: Path, first: int, last: int | None) -> Iterator[Document]:
    """A .txt in pieces, cut where a tokenizer would cut as well: after a line, else before white space.

    A stretch begins and ends at such a place too (rows/corpus_parts.py), so its first piece goes on with what came
    before it.
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
        raise empty(path)
    yield Document(held, path, line, more=last is not None, rest=rest)


def _cut(text: str) -> int:
    """Where to cut a long text, or 0 for not yet. A text without any white space is cut where it stands."""
    for pattern in (r"\S\n(?=\S)", r"\S(?=\s)"):
        places = list(re.finditer(pattern, text[-4096:]))
        if places:
            return max(0, len(text) - 4096) + places[-1].end()
    return len(text) if len(text) >= PIECE else 0


def _text_of(record: Any, field: str | None, path: Path, number: int) -> str:
    where = at(path, number)
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {spelled(record)}; expected an object with text")
    if field is not None:
        if field not in record:
            raise DataError(f"{where}: the field {field} is missing; {nearest(field, record)}")
        return checked_text(record[field], field, path, number)
    chat = next((name for name in CHAT_FIELDS if name in record), None)
    present = [name for name in TEXT_FIELDS if name in record]
    if chat is None and "text" not in present and (recognised := format_of(record)) is not None:
        chat = ", ".join(recognised[1])
    if chat is not None and "text" in present:
        raise DataError(f"{where}: has both text and {chat}; which of them counts cannot be known; say it with field")
    if chat is not None:
        raise DataError(f"{where}: holds a chat ({chat}) where a document (text) was expected")
    if not present:
        raise DataError(f"{where}: the field text is missing; {nearest('text', record)}, or name another with field")
    strings = [name for name in present if isinstance(record[name], str)]
    if len(strings) > 1:
        raise DataError(
            f"{where}: {' and '.join(strings)} could both be the text; say which with field, as in field={strings[0]}"
        )
    name = (strings or present)[0]
    return checked_text(record[name], name, path, number)
