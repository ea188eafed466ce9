"""A corpus cut into parts of about SPAN bytes that are tokenized each for itself: parts(files), read(part).

Where a part ends depends on the data alone, never on how many workers there are, so neither does the result. A part is
some small files whole, or a stretch of a large one: lines of jsonl, a stretch of text between two lines, row groups of
parquet. A compressed file or a JSON array cannot be cut, and is one part.
Who does which part is in parallel_packing.py.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lapis.errors import DataError, TemplateError
from lapis.text.corpus.corpus import ChatRecord, Document, chats_of, documents_of
from lapis.text.corpus.file_stream import PIECE, pressed, suffix
from lapis.text.corpus.records import LINE_LIMIT, open_parquet

SPAN = 32 << 20  # bytes of files in one part


@dataclass(frozen=True)
class Stretch:
    """A file, or a part of it: bytes [first, last), or row groups of parquet; last None = all that follows."""

    file: Path
    first: int = 0
    last: int | None = None


def parts(files: list[Path], span: int = 0) -> list[list[Stretch]]:
    """The parts in order. Small files that follow one another share one."""
    span = span or SPAN
    cut: list[list[Stretch]] = []
    held = 0
    for path in files:
        for stretch, size in _stretches(path, span):
            if not cut or held + size > span:
                cut.append([])
                held = 0
            cut[-1].append(stretch)
            held += size
    return cut


def read(part: list[Stretch], kind: str, field: str | None) -> Iterator[Document | ChatRecord]:
    """The documents or chats of a part. Errors name the lines of the whole file."""
    for stretch in part:
        of = chats_of if kind == "chats" else documents_of
        try:
            yield from of(stretch.file, field, stretch.first, stretch.last)
        except DataError as error:
            raise DataError(placed(str(error), stretch)) from None


def placed(message: str, stretch: Stretch) -> str:
    """An error that counts lines from the beginning of the stretch, as one that counts them from that of the file."""
    if not stretch.first or suffix(stretch.file) == ".parquet" or not message.startswith(str(stretch.file)):
        return message
    before, left = 0, stretch.first
    with stretch.file.open("rb") as file:
        while left and (raw := file.read(min(PIECE, left))):
            before += raw.count(b"\n")
            left -= len(raw)
    rest = message.removeprefix(str(stretch.file))
    return str(stretch.file) + re.sub(r" line (\d+)", lambda m: f" line {int(m[1]) + before}", rest, count=1)


def named(
    error: DataError | TemplateError, item: Document | ChatRecord, part: list[Stretch]
) -> DataError | TemplateError:
    """What went wrong with one item of the part, with its file and line before it."""
    message = f"{item.where}: {error}"
    here = [s for s in part if s.file == item.file]
    return type(error)(placed(message, here[0]) if len(here) == 1 else message)


def _stretches(path: Path, span: int) -> Iterator[tuple[Stretch, int]]:
    """Stretches of a file, each with its size in bytes."""
    size = path.stat().st_size
    if size <= span or pressed(path) or suffix(path) == ".json":
        yield Stretch(path), size
    elif suffix(path) == ".parquet":
        yield from _row_groups(path, span)
    else:
        places = [0]
        for first in range(span, size, span):
            place = _border(path, first, size)
            if place is not None and places[-1] < place < size:
                places.append(place)
        for begin, end in zip(places, [*places[1:], None], strict=True):
            yield Stretch(path, begin, end), (size if end is None else end) - begin


def _row_groups(path: Path, span: int) -> Iterator[tuple[Stretch, int]]:
    with open_parquet(path) as opened:
        sizes = [opened.metadata.row_group(i).total_byte_size for i in range(opened.metadata.num_row_groups)]
    begin, held = 0, 0
    for i, size in enumerate(sizes):
        if i > begin and held + size > span:
            yield Stretch(path, begin, i), held
            begin, held = i, 0
        held += size
    yield Stretch(path, begin, len(sizes)), held


def _border(path: Path, first: int, size: int) -> int | None:
    """The first place after `first` where a stretch may begin, or None where there is none nearby."""
    lines = suffix(path) == ".jsonl"
    with path.open("rb") as file:
        file.seek(first - 1)
        if lines:
            read = len(file.readline(LINE_LIMIT + 1))
            return first - 1 + read if read <= LINE_LIMIT else None
        raw = file.read(PIECE)
    skipped = next((i for i in range(min(4, len(raw))) if raw[i] & 0xC0 != 0x80), 0)  # the rest of a character
    text = raw[skipped:].decode(errors="surrogateescape")
    border = re.search(r"\S\n(?=\S)", text)
    if border is None or border.end() >= len(text) - 1:
        return None
    return first - 1 + skipped + len(text[: border.end()].encode(errors="surrogateescape"))
