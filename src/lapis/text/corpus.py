"""Files of text and chats, read in a stream: documents(paths), chats(paths).

.txt and .md hold one document each, .jsonl one object per line with `text` or `messages`; .gz of these too. Folders and
globs stand for the files in them, by name. Memory is bounded: a long .txt comes in pieces, a line of jsonl may have
LINE_LIMIT bytes. What is wrong is one DataError with file, line, and byte or field; nothing is skipped in silence.
Leaves out: tokens (packing.py), mixing of sources, data sets on a hub.
"""

import codecs
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lapis.config import nearest
from lapis.errors import DataError

PIECE = 1 << 20  # bytes of a .txt that are held at once
LINE_LIMIT = 32 << 20  # bytes of one line of jsonl
ROLES = ("system", "developer", "user", "assistant", "tool")
_KINDS = (".txt", ".md", ".jsonl")
Source = str | Path


@dataclass(frozen=True)
class Document:
    """A text, or a piece of one. more: the document goes on in the next piece. line: where it begins, from 1."""

    text: str
    file: Path
    line: int
    more: bool = False

    @property
    def where(self) -> str:
        return f"{self.file} line {self.line}"


@dataclass(frozen=True)
class Chat:
    """Messages of `role` and `content`, at least one of them the assistant's. tools: JSON schemas, or None."""

    messages: list[dict[str, Any]]
    file: Path
    line: int
    tools: list[dict[str, Any]] | None = None

    @property
    def where(self) -> str:
        return f"{self.file} line {self.line}"


def documents(paths: Source | Iterable[Source]) -> Iterator[Document]:
    """Every document of the files. Raises DataError where a file is empty, damaged, or holds something else."""
    for path in files(paths):
        if _suffix(path) == ".jsonl":
            for number, record in records(path):
                yield Document(_text_of(record, path, number), path, number)
        else:
            yield from _pieces(path)


def chats(paths: Source | Iterable[Source]) -> Iterator[Chat]:
    """Every chat of the jsonl files. Raises DataError, naming line and field, for what is not a chat with an answer."""
    for path in files(paths):
        if _suffix(path) != ".jsonl":
            raise DataError(f"{path}: holds plain text; chats are read from .jsonl with messages")
        for number, record in records(path):
            yield _chat_of(record, path, number)


def texts(paths: Source | Iterable[Source]) -> Iterator[str]:
    """All text of documents and chats alike, for training a tokenizer."""
    for path in files(paths):
        if kind_of([path]) == "chats":
            for chat in chats([path]):
                yield from (m["content"] for m in chat.messages if isinstance(m.get("content"), str))
        else:
            yield from (document.text for document in documents([path]))


def kind_of(paths: Source | Iterable[Source]) -> Literal["documents", "chats"]:
    """What the first record of the first file is."""
    first = files(paths)[0]
    if _suffix(first) != ".jsonl":
        return "documents"
    number, record = next(records(first))
    if not isinstance(record, dict) or ("messages" in record) == ("text" in record):
        _text_of(record, first, number)
    return "chats" if "messages" in record else "documents"


def files(paths: Source | Iterable[Source]) -> list[Path]:
    """The files that paths, folders and globs stand for, each once. Raises DataError where one stands for none."""
    found: dict[Path, None] = {}
    for source in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(source)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if _suffix(p) in _KINDS and not _hidden(p, path) and p.is_file())
            if not inside:
                raise DataError(f"{path}: the folder holds no {', '.join(_KINDS)} (or .gz of these)")
            found.update(dict.fromkeys(inside))
        elif os.path.lexists(path):
            if not path.is_file():
                raise DataError(f"{path}: is not a regular file")
            if _suffix(path) not in _KINDS:
                raise DataError(f'{path}: "{path.suffix}" is not known; give {", ".join(_KINDS)}, or .gz of these')
            found[path] = None
        elif glob.has_magic(str(source)):
            matches = sorted(glob.glob(str(source), recursive=True))
            if not matches:
                raise DataError(f"{source}: no file matches")
            found.update(dict.fromkeys(files(matches)))
        else:
            hint = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
            raise DataError(f"{path}: there is no such file{f'; {hint}' if hint.startswith('did') else ''}")
    if not found:
        raise DataError("no files were given")
    return list(found)


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


class _Opened:
    """A file, decompressed where it is gzip, whose damage is a DataError. read and readline as of a binary file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "_Opened":
        try:
            self.file: BinaryIO | gzip.GzipFile = self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        self.stream: Any = self.file
        if self.path.suffix.lower() == ".gz":
            self.stream = io.BufferedReader(gzip.GzipFile(fileobj=self.file), PIECE)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, size: int) -> bytes:
        return self._told(self.stream.read, size)

    def readline(self, size: int) -> bytes:
        return self._told(self.stream.readline, size)

    def _told(self, call: Any, size: int) -> bytes:
        try:
            got: bytes = call(size)
            return got
        except EOFError:
            raise DataError(f"{self.path}: the gzip stream ends too early; it is truncated, fetch it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self.path}: not gzip, or damaged: {error}; fetch it again") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from None


def _pieces(path: Path) -> Iterator[Document]:
    """A .txt in pieces, cut where a tokenizer would cut as well: after a line, else before white space."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, line, position, lines, any_text = "", 1, 0, 1, False
    with _Opened(path) as file:
        while True:
            raw = file.read(PIECE)
            ended = not raw
            if position == 0 and raw.startswith(codecs.BOM_UTF8):
                raw, position = raw[3:], 3
            waiting = len(decoder.getstate()[0])
            _refuse_nul(raw, path, lines, position)
            try:
                fresh = decoder.decode(raw, final=ended)
            except UnicodeDecodeError as error:
                at = lines + error.object[: error.start].count(b"\n")
                raise _not_utf8(path, at, position - waiting + error.start, error) from None
            position += len(raw)
            lines += raw.count(b"\n")
            held += fresh
            any_text = any_text or bool(fresh.strip())
            if ended:
                break
            cut = _cut(held) if len(held) >= PIECE // 4 else 0
            if cut:
                yield Document(held[:cut], path, line, more=True)
                line += held.count("\n", 0, cut)
                held = held[cut:]
    if not any_text:
        raise DataError(f"{path}: is empty; there is nothing to read")
    yield Document(held, path, line)


def _cut(text: str) -> int:
    """Where to cut a long text, or 0 for not yet. A text without any white space is cut where it stands."""
    for pattern in (r"\S\n(?=\S)", r"\S(?=\s)"):
        found = list(re.finditer(pattern, text[-4096:]))
        if found:
            return max(0, len(text) - 4096) + found[-1].end()
    return len(text) if len(text) >= PIECE else 0


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and object of every line of a jsonl file that is not blank, checked as JSON in UTF-8."""
    number, position, count = 0, 0, 0
    with _Opened(path) as file:
        while raw := file.readline(LINE_LIMIT + 1):
            number += 1
            if len(raw) > LINE_LIMIT:
                raise DataError(
                    f"{path} line {number}: longer than {LINE_LIMIT >> 20} MB; split the record, or give it as .txt"
                )
            if position == 0 and raw.startswith(codecs.BOM_UTF8):
                raw, position = raw[3:], 3
            if raw.strip():
                count += 1
                yield number, _parse(raw, path, number, position)
            position += len(raw)
    if not count:
        raise DataError(f"{path}: is empty; there is nothing to read")


class _BadRecordError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise _BadRecordError(f'the field "{next(n for n in names if names.count(n) > 1)}" stands twice')
    return record


def _constant(word: str) -> None:
    raise _BadRecordError(f"{word} is not JSON")


def _parse(raw: bytes, path: Path, number: int, position: int) -> Any:
    _refuse_nul(raw, path, number, position)
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, position + error.start, error) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number}: not JSON at column {error.colno}: {error.msg}") from None
    except _BadRecordError as error:
        raise DataError(f"{path} line {number}: {error}") from None
    except RecursionError:
        raise DataError(f"{path} line {number}: nested too deeply") from None


def _not_utf8(path: Path, line: int, byte: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{path} line {line}: not UTF-8 at byte {byte} (0x{error.object[error.start]:02x}); convert the file to UTF-8"
    )


def _refuse_nul(raw: bytes, path: Path, line: int, position: int) -> None:
    at = raw.find(b"\0")
    if at >= 0:
        line += raw.count(b"\n", 0, at)
        raise DataError(f"{path} line {line}: a NUL byte at byte {position + at}; is it text in UTF-8? Remove the byte")


def checked_text(value: Any, field: str, path: Path, number: int) -> str:
    """The field's text. Raises DataError where it is none, or no text that can be encoded."""
    if not isinstance(value, str):
        raise DataError(f"{path} line {number}: {field} is {spelled(value)}; expected text")
    if "\0" in value:
        raise DataError(f"{path} line {number}: {field} holds a NUL character; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path} line {number}: {field} holds half a surrogate pair at character {error.start}; remove it"
        ) from None
    return value


def spelled(value: Any) -> str:
    """What kind of JSON value this is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _text_of(record: Any, path: Path, number: int) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{path} line {number}: is {spelled(record)}; expected an object with text")
    if "text" not in record:
        if "messages" in record:
            raise DataError(f"{path} line {number}: holds a chat (messages) where a document (text) was expected")
        raise DataError(f"{path} line {number}: the field text is missing; {nearest('text', record)}")
    if "messages" in record:
        raise DataError(f"{path} line {number}: has both text and messages; which is meant cannot be known")
    return checked_text(record["text"], "text", path, number)


def _chat_of(record: Any, path: Path, number: int) -> Chat:
    where = f"{path} line {number}"
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {spelled(record)}; expected an object with messages")
    if "messages" not in record:
        if "text" in record:
            raise DataError(f"{where}: holds a document (text) where a chat (messages) was expected")
        raise DataError(f"{where}: the field messages is missing; {nearest('messages', record)}")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: messages is {spelled(messages) if messages else 'empty'}; expected a list of messages"
        )
    for i, message in enumerate(messages):
        check_message(message, f"messages[{i}]", path, number)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's; there is nothing to learn from it")
    tools = record.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where}: tools is {spelled(tools)}; expected a list of objects")
    return Chat(messages, path, number, tools)


def check_message(message: Any, field: str, path: Path, number: int) -> None:
    """Raises DataError, naming line and field, for what is not a message of a chat."""
    where = f"{path} line {number}: {field}"
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
