"""Text of a language, part of it held out: files in, texts to learn from and texts to measure on out.

Which document is held out depends on its text alone, so that every step of an adaptation holds out the same ones; so
does their order, so that the first of them are of all files. Where a part of a text is enough, each file gives of it.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from lapis.errors import DataError
from lapis.text.corpus.labels import bare_texts, text_files
from lapis.wording import format_count

SHARE = 20  # one document in so many is held out
FEW = 200  # documents: below that, long ones are cut, so that something can be held out
PIECE = 2000  # characters of a piece of such a document
SCRAP = 200  # bytes: less of a document than that says nothing of its language
SAME = 0.1  # share of the replay documents that may stand in the target's text, too


def read_texts(files: Sequence[str | Path], most: int | None = None) -> tuple[list[str], list[str]]:
    """Texts to learn from, in their order, and held-out texts, by their digests.

    Args:
        files: Files, folders, globs.
        most: Bytes that are read at most, of each file by its size.

    Raises:
        DataError: Where there is no text, or too little to hold some out.
    """
    texts = [text for text in from_each(files, most) if text.strip()]
    if len(texts) < FEW:
        texts = [piece for text in texts for piece in pieces(text)]
    learn: list[str] = []
    held: list[str] = []
    for text in texts:
        (held if is_held_out(text) else learn).append(text)
    for some, none in ((learn, held), (held, learn)):
        if some and not none:  # of few texts chance put all on one side
            none += [text for text in some if text == some[-1]]
            some[:] = [text for text in some if text != none[0]]
    if not learn or not held:
        named = ", ".join(map(str, files))
        listed = format_count(len(set(texts)), "text")
        raise DataError(f"{named}: holds {listed}; give at least 2 that differ, to learn from one and hold one out")
    return learn, spread(held)


def from_each(files: Sequence[str | Path], most: int | None) -> Iterator[str]:
    """Texts of files, `most` bytes in all: of each file the beginning, as much as its size is of all sizes.

    Args:
        files: Files, folders, globs; of plain files that have fewer bytes together all texts are read.
        most: None reads all.
    """
    listed = text_files(files)
    sizes = [max(1, file.stat().st_size) for file in listed]
    for file, size in zip(listed, sizes, strict=True):
        yield from first_bytes(bare_texts(file), None if most is None else math.ceil(most * size / sum(sizes)))


def spread(texts: Iterable[str]) -> list[str]:
    """Texts in an order that does not depend on the files that they are from: the first ones are of all files."""
    return sorted(texts, key=lambda text: sha256(text.encode(errors="replace")).digest())


def same_as_target(texts: Iterable[str], replay: Iterable[str]) -> str:
    """A sentence where replay documents are the target's; "" where hardly one is."""
    target = {_digest(text) for text in texts}
    replayed = [_digest(text) for text in replay]
    share = sum(digest in target for digest in replayed) / max(1, len(replayed))
    if share <= SAME:
        return ""
    remedy = "replay is text of what the model knew before, so give other files"
    return f"{share:.0%} of the replay documents stand in the target's text, too; {remedy}"


def _digest(text: str) -> bytes:
    return sha256(text.strip().encode(errors="replace")).digest()


def is_held_out(text: str) -> bool:
    """Whether a document belongs to those that are held out."""
    return sha256(text.encode(errors="replace")).digest()[0] % SHARE == 0


def pieces(text: str) -> Iterator[str]:
    """A text cut at line ends, or else at spaces, into pieces of about PIECE characters."""
    place = 0
    while place < len(text):
        end = place + PIECE
        if end < len(text):
            cut = max(text.rfind("\n", place + PIECE // 2, end), text.rfind(" ", place + PIECE // 2, end))
            end = cut + 1 if cut > 0 else end
        yield text[place:end]
        place = end


def first_bytes(texts: Iterable[str], size: int | None) -> Iterator[str]:
    """Texts until they have `size` bytes. The last one is cut, and left out where only a scrap of it would be left; one
    alone has one character at least."""
    left = size
    for number, text in enumerate(texts):
        if left is None:
            yield text
            continue
        raw = text.encode(errors="replace")
        if len(raw) >= left:
            if not number or left >= SCRAP or len(raw) < SCRAP:
                yield raw[:left].decode(errors="ignore") or text[:1]
            return
        left -= len(raw)
        yield text


def after_bytes(texts: Iterable[str], size: int) -> Iterator[str]:
    """The texts that begin behind the first `size` bytes."""
    before = 0
    for text in texts:
        if before >= size:
            yield text
        before += len(text.encode(errors="replace"))


def first_sentence(text: str, most: int = 200) -> str:
    """The beginning of a text, as a user might write it: to the first end of a sentence or line, cut at a space."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    end = min((place + 1 for mark in ".!?。？！।" if (place := line.find(mark, 10)) > 0), default=len(line))
    sentence = line[:end]
    return sentence if len(sentence) <= most else sentence[:most].rpartition(" ")[0] or sentence[:most]


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """A JSON object with `text` for each text, one per line."""
    write_lines(path, ({"text": text} for text in texts))


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
