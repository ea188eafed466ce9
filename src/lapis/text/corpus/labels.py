"""Files of labeled texts, for classifiers: labeled(paths) -> Labeled(text, label, file, line).

.tsv: a header with label and text, then one example per line, no quoting. .csv: the same, quoted as spreadsheets do.
.jsonl: one object per line with label and text. .gz of these too. A label is a word or a whole number. What is wrong is
one DataError with file and line. Leaves out: pictures (pictures.py), several labels for one text, tokens.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapis.config import nearest
from lapis.errors import DataError
from lapis.text.corpus.corpus import texts

KINDS = (".tsv", ".csv", ".jsonl")
Source = str | Path


@dataclass(frozen=True)
class Labeled:
    """A text and the name of its class. line: where it begins, from 1."""

    text: str
    label: str
    file: Path
    line: int

    @property
    def where(self) -> str:
        return f"{self.file} line {self.line}"


def labeled(paths: Source | Iterable[Source]) -> Iterator[Labeled]:
    """Every example of the files. Raises DataError where one is empty, damaged, or lacks label or text."""
    for source in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(source)
        raw = _read(path)
        kind = _kind(path)
        if kind == ".jsonl":
            rows = _objects(raw, path)
        else:
            rows = _table(raw, path, kind)
        empty = True
        for line, label, text in rows:
            empty = False
            yield Labeled(_checked(text, "text", path, line), _label(label, path, line), path, line)
        if empty:
            raise DataError(f"{path}: holds no examples; there is nothing to read")


def bare_texts(paths: Source | Iterable[Source]) -> Iterator[str]:
    """All text of files of documents, chats and labeled tables alike, for tokenizers and pre-training."""
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        if _kind(Path(path)) in (".tsv", ".csv"):
            yield from (example.text for example in labeled(path))
        else:
            yield from texts(path)


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


def _kind(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _read(path: Path) -> str:
    if _kind(path) not in KINDS:
        raise DataError(f'{path}: "{path.suffix}" is not known; labeled texts are {", ".join(KINDS)}, or .gz of these')
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except FileNotFoundError:
        hint = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(f"{path}: there is no such file{f'; {hint}' if hint.startswith('did') else ''}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not gzip, or truncated: {error}; fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if (at := raw.find(b"\0")) >= 0:
        raise DataError(f"{path} line {1 + raw.count(bytes([10]), 0, at)}: a NUL byte; is it text in UTF-8?")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise DataError(
            f"{path} line {line}: not UTF-8 at byte {error.start} (0x{raw[error.start]:02x}); convert the file to UTF-8"
        ) from None


def _table(raw: str, path: Path, kind: str) -> Iterator[tuple[int, Any, Any]]:
    rows = _tsv(raw) if kind == ".tsv" else _csv(raw, path)
    header = next(rows, (1, []))[1]
    names = [name.strip().lower() for name in header]
    for name in ("label", "text"):
        if names.count(name) != 1:
            told = nearest(name, names) if any(names) else "the file is empty"
            raise DataError(f'{path} line 1: the header needs one column "{name}"; {told}')
    at_label, at_text = names.index("label"), names.index("text")
    for line, cells in rows:
        if len(cells) != len(names):
            raise DataError(f"{path} line {line}: has {len(cells)} columns; the header has {len(names)}")
        yield line, cells[at_label].strip(), cells[at_text]


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


def _objects(raw: str, path: Path) -> Iterator[tuple[int, Any, Any]]:
    for number, line in enumerate(raw.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number}: not JSON at column {error.colno}: {error.msg}") from None
        except RecursionError:
            raise DataError(f"{path} line {number}: nested too deeply") from None
        if not isinstance(record, dict):
            raise DataError(f"{path} line {number}: is no object; expected label and text")
        for name in ("label", "text"):
            if name not in record:
                raise DataError(f"{path} line {number}: the field {name} is missing; {nearest(name, record)}")
        yield number, record["label"], record["text"]


def _checked(value: Any, field: str, path: Path, line: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{path} line {line}: {field} is {'empty' if value in ('', None) else repr(value)[:40]}; "
                        "expected words")  # fmt: skip
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path} line {line}: {field} holds half a surrogate pair at character {error.start}") from None
    return value


def _label(value: Any, path: Path, line: int) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _checked(value, "label", path, line)
