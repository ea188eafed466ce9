"""Records of jsonl, JSON and parquet files, each with its place: records(path).

A line of jsonl, or an item of a JSON array, may have LINE_LIMIT bytes, and one is held at a time; a .json file may also
hold one object in each line. Parquet is read in batches of some rows, and only the columns that are needed. What is not
JSON in UTF-8, or damaged, is one DataError with file, line, item or row, and byte or column. What a record means is in
chat_records.py, corpus.py, pairs.py and labels.py.
"""

import codecs
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lapis.errors import DataError, MissingExtra
from lapis.parsing import ParseError, parse_json
from lapis.text.corpus.file_stream import PIECE, OpenedFile, at, pressed, suffix

LINE_LIMIT = 32 << 20  # bytes of one line of jsonl
_PEEK = 1 << 16  # bytes that show what a .json file is
_MARK = re.compile(rb'"(?:[^"\\]|\\.)*+(?P<closed>"?)|[{}\[\],]', re.DOTALL)
_NEXT = re.compile(rb"[ \t\r\n,]*")
_ROWS = 256  # of a parquet file that are decoded at once


def records(
    path: Path, first: int = 0, last: int | None = None, columns: Collection[str] | None = None
) -> Iterator[tuple[int, Any]]:
    """Every record with its number: the line of a jsonl file, the item of a JSON array, the row of a parquet file.

    Args:
        path: The file; .gz and .zst of all but parquet.
        first, last: A stretch of it, in bytes (see OpenedFile); for parquet, row groups.
        columns: Of a parquet file, those that are read where it has them.

    Raises:
        DataError: For a file that is empty or damaged.
    """
    if suffix(path) == ".parquet":
        yield from _rows(path, first, last, columns)
        return
    if suffix(path) == ".json" and _is_array(path):
        yield from _items(path)
        return
    number, position, count = 0, first, 0
    with OpenedFile(path, first, last) as file:
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
    if not count and first == 0 and last is None:
        raise empty(path)


def _is_array(path: Path) -> bool:
    """True for a JSON array; False for one object in each line. Raises DataError for anything else."""
    with OpenedFile(path) as file:
        raw = file.read(_PEEK).removeprefix(codecs.BOM_UTF8).lstrip()
    if raw.startswith(b"["):
        return True
    line = raw.split(b"\n", 1)[0].strip()
    if not raw or (line.startswith(b"{") and (line.endswith(b"}") or len(line) > _PEEK // 2)):
        return False
    raise DataError(f"{path}: is neither an array of records nor one object in each line; give one of these")


def _items(path: Path) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array, one at a time: where an item ends is seen by its brackets and quotes."""
    number, place, start = 0, 0, 0  # place: where in the file the buffer begins; start: where in it the next item does
    with OpenedFile(path) as file:
        raw = file.read(PIECE)
        start = raw.index(b"[") + 1
        while True:
            begin = _NEXT.match(raw, start)
            start = begin.end() if begin else start
            if raw[start : start + 1] == b"]":
                break
            end = _item_end(raw, start)
            if end is None:
                raw, place, start = raw[start:], place + start, 0
                more = file.read(max(PIECE, len(raw)))
                raw += more
                if not more:
                    raise DataError(f"{path}: the array ends too early, after item {number}; it is truncated")
                if len(raw) > LINE_LIMIT + PIECE:
                    raise DataError(f"{at(path, number + 1)}: longer than {LINE_LIMIT >> 20} MB; split the record")
                continue
            number += 1
            yield number, _parse(raw[start:end], path, number, place + start)
            start = end
    if not number:
        raise empty(path)


def _item_end(raw: bytes, start: int) -> int | None:
    """Where the item that begins at `start` ends; None where more is needed to know."""
    depth = 0
    for match in _MARK.finditer(raw, start):
        mark = match[0]
        if mark.startswith(b'"'):
            if not match["closed"]:
                return None
        elif mark in b"{[":
            depth += 1
        elif depth == 0:  # a comma or the array's end after a number, a word or a text
            return match.start()
        elif mark in b"}]":
            depth -= 1
            if depth == 0:
                return match.end()
    return None


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises DataError for what is not one, MissingExtra without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("reading .parquet: pyarrow", "data") from None
    if pressed(path):
        raise DataError(f"{path}: parquet is compressed within; decompress the file first")
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=False, page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        raise DataError(f"{path}: not parquet, or truncated ({_line(error)}); fetch it again") from None


def _rows(
    path: Path, first: int, last: int | None, columns: Collection[str] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    opened = open_parquet(path)
    import pyarrow

    with opened:
        groups = range(first, opened.num_row_groups if last is None else last)
        number = sum(opened.metadata.row_group(i).num_rows for i in range(first))
        if not opened.metadata.num_rows:
            raise empty(path)
        names = opened.schema_arrow.names
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f'{path}: the column "{twice}" stands twice')
        chosen = names if columns is None else [name for name in names if name in columns]
        try:
            for batch in opened.iter_batches(_ROWS, list(groups), chosen or names):
                for row in _listed(batch, path, number):
                    number += 1
                    yield number, row
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: damaged after row {number:,} ({_line(error)}); fetch it again") from None


def _listed(batch: Any, path: Path, number: int) -> list[dict[str, Any]]:
    """Rows as Python objects. Text in parquet is UTF-8 only by promise."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            for name in batch.schema.names:
                try:
                    batch.column(name)[i].as_py()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path} row {number + i + 1}: {name} is not UTF-8 at byte {error.start} "
                        f"(0x{error.object[error.start]:02x}); convert it to UTF-8"
                    ) from None
        raise
    return rows


def _line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:120].rstrip(".")


def _parse(raw: bytes, path: Path, number: int, position: int) -> Any:
    where = at(path, number)
    refuse_nul(raw, path, number, position)
    try:
        return parse_json(raw.decode(), constants=False)
    except UnicodeDecodeError as error:
        raise not_utf8(path, number, position + error.start, error) from None
    except ParseError as error:
        raise DataError(f"{where}: {error}; mend or remove it") from None


def empty(path: Path) -> DataError:
    """The refusal of a file without anything to read."""
    return DataError(f"{path}: is empty; give another file, or leave it out")


def not_utf8(path: Path, line: int, byte: int, error: UnicodeDecodeError) -> DataError:
    """The refusal of a byte that is not UTF-8."""
    return DataError(
        f"{at(path, line)}: not UTF-8 at byte {byte} (0x{error.object[error.start]:02x}); convert the file to UTF-8"
    )


def refuse_nul(raw: bytes, path: Path, line: int, position: int) -> None:
    """Raises DataError where `raw`, which begins at this line and byte of the file, holds a zero byte."""
    place = raw.find(b"\0")
    marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if place >= 0 and (marked or raw.count(0) > len(raw) / 4):
        raise DataError(f"{at(path, line)}: is UTF-16; convert the file to UTF-8")
    if place >= 0:
        line += 0 if suffix(path) == ".json" else raw.count(b"\n", 0, place)
        raise DataError(
            f"{at(path, line)}: a NUL byte at byte {position + place}; is it text in UTF-8? Remove the byte"
        )


def checked_text(value: Any, field: str, path: Path, number: int) -> str:
    """The field's text. Raises DataError where it is none, or no text that can be encoded."""
    where = at(path, number)
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is {spelled(value)}; expected text")
    if "\0" in value:
        raise DataError(f"{where}: {field} holds a NUL character; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {field} holds half a surrogate pair at character {error.start}; remove it") from None
    return value


def spelled(value: Any) -> str:
    """What kind of JSON value this is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
