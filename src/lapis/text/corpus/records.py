"""Records of jsonl and parquet files, each with its place: records(path), parquet_rows(path).

A line of jsonl may have LINE_LIMIT bytes; parquet is read in batches of some rows, and only the columns that are asked
for. What is not JSON in UTF-8, or damaged, is one DataError with file, line or row, and byte or column.
Leaves out: what is in a record (corpus.py).
"""

import codecs
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lapis.errors import DataError, MissingExtra
from lapis.text.corpus.file_stream import OpenedFile, at, pressed, suffix

LINE_LIMIT = 32 << 20  # bytes of one line of jsonl
_ROWS = 256  # of a parquet file that are decoded at once


def records(
    path: Path, first: int = 0, last: int | None = None, columns: Collection[str] | None = None
) -> Iterator[tuple[int, Any]]:
    """Line number and object of every line of a jsonl file that is not blank, checked as JSON in UTF-8; row number and
    object of every row of a parquet file. first, last: see OpenedFile; for parquet, row groups.

    columns: of a parquet file, those that are read where it has them.
    """
    if suffix(path) == ".parquet":
        yield from _rows(path, first, last, columns)
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
        raise DataError(f"{path}: is empty; there is nothing to read")


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
            raise DataError(f"{path}: is empty; there is nothing to read")
        names = opened.schema_arrow.names
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f'{path}: the column "{twice}" stands twice')
        wanted = names if columns is None else [name for name in names if name in columns]
        try:
            for batch in opened.iter_batches(_ROWS, list(groups), wanted or names):
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
    refuse_nul(raw, path, number, position)
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise not_utf8(path, number, position + error.start, error) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number}: not JSON at column {error.colno}: {error.msg}") from None
    except _BadRecordError as error:
        raise DataError(f"{path} line {number}: {error}") from None
    except RecursionError:
        raise DataError(f"{path} line {number}: nested too deeply") from None


def not_utf8(path: Path, line: int, byte: int, error: UnicodeDecodeError) -> DataError:
    """The refusal of a byte that is not UTF-8."""
    return DataError(
        f"{path} line {line}: not UTF-8 at byte {byte} (0x{error.object[error.start]:02x}); convert the file to UTF-8"
    )


def refuse_nul(raw: bytes, path: Path, line: int, position: int) -> None:
    """Raises DataError where `raw`, which begins at this line and byte of the file, holds a zero byte."""
    place = raw.find(b"\0")
    if place >= 0:
        line += raw.count(b"\n", 0, place)
        raise DataError(
            f"{path} line {line}: a NUL byte at byte {position + place}; is it text in UTF-8? Remove the byte"
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
