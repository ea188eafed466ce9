"""A delta made by several processes (checkpoint/sharing.py): each encodes runs of tensors into pieces of the file.

How long a compressed tensor becomes is known only at its end, so pieces are files of their own; who commits puts them
behind each other under one header, and the bytes are those that one process writes. Leaves out: what is encoded
(writing.py).
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lapis.checkpoint.files import read_json
from lapis.checkpoint.sharing import SharedJob, joined, share_parts
from lapis.checkpoint.staging import Staging, disk_errors
from lapis.checkpoint.tensor_file import DELTA
from lapis.weights.delta.writing import (
    Item,
    ItemFigures,
    Written,
    chat_bytes,
    longest_header,
    write_header,
    write_piece,
)
from lapis.weights.engine.journal import Journal
from lapis.weights.engine.ranks import PART

Describe = Callable[[Mapping[str, ItemFigures] | None], dict[str, str]]


def in_parts(items: Sequence[Item]) -> list[list[Item]]:
    """The items in runs of at least PART bytes of the chat model."""
    parts: list[list[Item]] = [[]]
    for item in items:
        if sum(map(chat_bytes, parts[-1])) >= PART:
            parts.append([])
        parts[-1].append(item)
    return parts


def encode_together(
    job: SharedJob, items: Sequence[Item], *, allow_nonfinite: bool, progress: Callable[[int, int], None] | None
) -> Written | None:
    """Encodes parts until all are done, by this process and whoever else is at it; None where all was committed."""
    parts = in_parts(items)
    total = sum(map(chat_bytes, items))
    with disk_errors(job.out), joined(job) as there:
        if not there:
            return None

        def report(done: Sequence[int]) -> None:
            if progress:
                progress(sum(sum(map(chat_bytes, parts[number])) for number in done), total)

        share_parts(
            job.journal, len(parts), lambda number: _encode(job, number, parts[number], allow_nonfinite), report
        )
        return _written(job.journal, len(parts))


def join_pieces(journal: Path, items: Sequence[Item], describe: Describe, folder: Path) -> Written:
    """Writes the file of all pieces into `folder`."""
    parts = in_parts(items)
    written, room = _written(journal, len(parts)), longest_header(items, describe)
    with (folder / DELTA).open("wb") as file:
        file.write(bytes(room))
        for number in range(len(parts)):
            with _piece(journal, number).open("rb") as piece:
                shutil.copyfileobj(piece, file, 4 << 20)
        end = file.tell()
    write_header(folder / DELTA, items, written.figures, describe, room, end)
    return written


def _piece(journal: Path, number: int) -> Path:
    return journal / f"piece-{number}" / DELTA


def _encode(job: SharedJob, number: int, items: Sequence[Item], allow_nonfinite: bool) -> dict[str, Any]:
    """One part, and what is to be known of it. What a process that was killed did of it is gone on with."""
    folder = _piece(job.journal, number).parent
    folder.mkdir(exist_ok=True)
    journal = Journal(Staging(folder, folder), job.key)
    try:
        written = write_piece(items, folder, journal, allow_nonfinite=allow_nonfinite)
    finally:
        journal.close()
    figures = {name: list(vars(seen).values()) for name, seen in written.figures.items()}
    return {"figures": figures, "read": written.bytes_read, "written": written.bytes_written}


def _written(journal: Path, parts: int) -> Written:
    """What all processes did."""
    done = [read_json(journal / f"{number}.json") for number in range(parts)]
    figures = {name: ItemFigures(*values) for part in done for name, values in part["figures"].items()}
    return Written(figures, sum(part["read"] for part in done), sum(part["written"] for part in done), 0)
