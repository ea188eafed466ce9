"""Files of labeled texts, for classifiers: labeled(paths) -> Labeled(text, label, file, line).

.tsv: a header with label and text, then one example per line, no quoting. .csv: the same, quoted as spreadsheets do.
.jsonl, .json and .parquet: records with label and text. .gz and .zst of these too, but for parquet; folders and globs
stand for the files in them. A label is a word or a whole number. What is wrong is one DataError with file and line.
"""

import codecs
import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapis.config import nearest
from lapis.errors import DataError
from lapis.text.corpus.corpus import texts
from lapis.text.corpus.file_stream import PIECE, RECORDS, OpenedFile, at, suffix
from lapis.text.corpus.files import Source, files
from lapis.text.corpus.records import checked_text, not_utf8, records, refuse_nul
from lapis.wording import format_count

TABLES = (".tsv", ".csv")
LABELED = (*TABLES, *RECORDS)


@dataclass(frozen=True)
class Labeled:
    """A text and the name of its class. line: where it begins, from 1; of parquet the row, of .json the item."""

    text: str
    label: str
    file: Path
    line: int

    @property
    def where(self) -> str:
        return at(self.file, self.line)


def labeled(paths: Source | Iterable[Source]) -> Iterator[Labeled]:
    """Every example of the files. Raises DataError where one is empty, damaged, or lacks label or text."""
    for path in files(paths, LABELED, "labeled texts are"):
        any_example = False
        for line, label, text in _table(path) if suffix(path) in TABLES else _records(path):
            any_example = True
            yield Labeled(_words(text, "text", path, line), _label(label, path, line), path, line)
        if not any_example:
            raise DataError(f"{path}: holds no examples; give another file, or leave it out")


def bare_texts(paths: Source | Iterable[Source]) -> Iterator[str]:
    """All text of documents, chats and labeled tables alike, for tokenizers and pre-training; each file once."""
    for file in text_files(paths):
        if suffix(file) in TABLES:
            yield from (example.text for example in labeled(file))
        else:
            yield from texts(file)


def text_files(paths: Source | Iterable[Source]) -> list[Path]:
    """The files that `bare_texts` reads, each once."""
    listed: dict[str, Path] = {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        is_table = suffix(Path(path)) in TABLES
        for file in files(path, LABELED, "labeled texts are") if is_table else files(path):
            listed.setdefault(os.path.abspath(file), file)
    return list(listed.values())


def classes_of(labels: Iterable[str]) -> list[str]:
    """The names that occur, each once: whole numbers in their order, words in the alphabet's."""
    names = set(labels)
    if all(name.isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def numbers_of(labels: Sequence[str], where: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The number of each label in `classes`. Raises DataError, naming file and line, for one that is not there."""
    number = {name: i for i, name in enumerate(classes)}
    for label, place in zip(labels, where, strict=True):
        if label not in number:
            raise DataError(f'{place}: the label "{label:.40}" is not one of the classes; {nearest(label, classes)}')
    return [number[label] for label in labels]


def _read(path: Path) -> str:
    """A whole table as text. Raises DataError for what is not UTF-8."""
    with OpenedFile(path) as file:
        raw = b"".join(iter(lambda: file.read(PIECE), b"")).removeprefix(codecs.BOM_UTF8)
    refuse_nul(raw, path, 1, 0)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(path, 1 + raw.count(b"\n", 0, error.start), error.start, error) from None


def _table(path: Path) -> Iterator[tuple[int, Any, Any]]:
    raw = _read(path)
    rows = _tsv(raw) if suffix(path) == ".tsv" else _csv(raw, path)
    header = next(rows, (1, []))[1]
    names = [name.strip().lower() for name in header]
    for name in ("label", "text"):
        if names.count(name) != 1:
            hint = nearest(name, names) if any(names) else "the file is empty"
            raise DataError(f'{path} line 1: the header needs one column "{name}"; {hint}')
    label_column, text_column = names.index("label"), names.index("text")
    for line, cells in rows:
        if len(cells) != len(names):
            raise DataError(
                f"{path} line {line}: has {format_count(len(cells), 'column')}; the header has {len(names)}"
            )
        yield line, cells[label_column].strip(), cells[text_column]


def _tsv(raw: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(raw.split("\n"), 1):
        line = line.removesuffix("\r")
        if line:
            yield number, line.split("\t")


def _csv(raw: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(raw, newline=""), strict=True)
    begins = 1
    try:
        for cells in reader:
            if cells:
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path} line {begins}: not csv: {error}") from None


def _records(path: Path) -> Iterator[tuple[int, Any, Any]]:
    for number, record in records(path, columns=("label", "text")):
        where = at(path, number)
        if not isinstance(record, dict):
            raise DataError(f"{where}: is no object; expected label and text")
        for name in ("label", "text"):
            if name not in record:
                raise DataError(f"{where}: the field {name} is missing; {nearest(name, record)}")
        yield number, record["label"], record["text"]


def _words(value: Any, field: str, path: Path, line: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{at(path, line)}: {field} is {'empty' if value in ('', None) else repr(value)[:40]}; "
                        "expected words")  # fmt: skip
    return checked_text(value, field, path, line)


def _label(value: Any, path: Path, line: int) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _words(value, "label", path, line)
