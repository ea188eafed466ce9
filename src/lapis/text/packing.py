"""Documents and chats -> rows of one length.

Documents follow one another without gaps; each begins with the end-of-text token (or BOS, where the tokenizer puts one
before every text) and is followed by the end-of-text token as its last target, so every token of every text is learned
once. A document longer than a row goes on in the next one. Chats are packed whole, best fit first, with loss on the
assistant's tokens; one longer than a row is cut at its end, or dropped, as `too_long` says, and counted. Memory is
bounded: tokens go to disk as they come, the plan for chats needs 16 bytes for each.
Leaves out: reading files (corpus.py), reading rows (rows.py), several sources mixed by weights.
"""

import bisect
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lapis.checkpoint.commit import commit
from lapis.errors import ConfigError, DataError, TemplateError
from lapis.text.chat import encode_turns
from lapis.text.corpus import Chat, Document, Source, chats, documents, kind_of
from lapis.text.rows import MANIFEST, Rows
from lapis.text.tokenizer import Tokenizer

_BATCH = 1_000_000  # characters that are encoded at once
Report = Callable[[int, int], None]  # texts done, tokens written


def pack(
    sources: Source | Iterable[Source] | Iterable[Document] | Iterable[Chat],
    tokenizer: Tokenizer,
    out: str | Path | None = None,
    length: int = 512,
    *,
    too_long: Literal["cut", "drop"] = "cut",
    overwrite: bool = False,
    report: Report | None = None,
) -> Rows:
    """Rows of `length` tokens from files, documents or chats; in the folder `out`, or in memory.

    Raises DataError for damaged input or where nothing is left to learn from, ConfigError for a tokenizer without an
    end-of-text token, OutputError where `out` cannot be written.
    """
    if length < 2:
        raise ConfigError(f"length is {length}; the least is 2")
    if tokenizer.eos_id is None:
        raise ConfigError(f"{tokenizer.source}: names no eos_token, which stands between documents; name one")
    items = _items(sources)
    first = next(items, None)
    if first is None:
        raise DataError("there is nothing to pack")
    items = chain([first], items)
    if out is None:
        return _pack(items, isinstance(first, Chat), tokenizer, _Sink(None), length, too_long, report)
    with commit(out, overwrite=overwrite) as staging, ExitStack() as stack:
        sink = _Sink(staging.path, stack)
        rows = _pack(items, isinstance(first, Chat), tokenizer, sink, length, too_long, report)
        (staging.path / "tokenizer").mkdir()
        tokenizer.save(staging.path / "tokenizer")
        (staging.path / MANIFEST).write_text(json.dumps(rows.info, indent=1) + "\n")
        staging.digests.update(sink.digests())
    return Rows.open(out)


def _items(sources: Any) -> Iterator[Document | Chat]:
    if isinstance(sources, (str, Path)):
        sources = [sources]
    iterator = iter(sources)
    first = next(iterator, None)
    if isinstance(first, (str, Path)):
        paths = [first, *iterator]
        return chats(paths) if kind_of(paths) == "chats" else documents(paths)
    return chain([] if first is None else [first], iterator)


class _Sink:
    """Where arrays grow: files of a folder, or lists in memory. Takes the sha256 of what goes by."""

    def __init__(self, folder: Path | None, stack: ExitStack | None = None) -> None:
        self.folder = folder
        self.stack = stack
        self.hashes: dict[str, Any] = {}
        self.sizes: dict[str, int] = {}
        self.types: dict[str, str] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._held: dict[str, list[NDArray[Any]]] = {}

    def add(self, name: str, values: Any, dtype: str) -> None:
        array = np.asarray(values, dtype)
        if name not in self.hashes:
            self.hashes[name], self.sizes[name], self.types[name] = hashlib.sha256(), 0, dtype
            if self.folder is not None and self.stack is not None:
                self._files[name] = self.stack.enter_context((self.folder / f"{name}.bin").open("wb"))
        raw = array.tobytes()
        self.hashes[name].update(raw)
        self.sizes[name] += len(array)
        if name in self._files:
            self._files[name].write(raw)
        else:
            self._held.setdefault(name, []).append(array)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What lies in memory; nothing where it went to files."""
        for file in self._files.values():
            file.close()
        return {name: np.concatenate(parts) for name, parts in self._held.items()}

    def digests(self) -> dict[str, str]:
        return {f"{name}.bin": found.hexdigest() for name, found in self.hashes.items()}


def _pack(
    items: Iterator[Document | Chat],
    are_chats: bool,
    tokenizer: Tokenizer,
    sink: _Sink,
    length: int,
    too_long: str,
    report: Report | None,
) -> Rows:
    wide = "uint16" if tokenizer.rows <= 1 << 16 else "uint32"
    if are_chats:
        counts, count = _write_chats(items, tokenizer, sink, length, too_long, wide, report)
    else:
        counts, count = _write_documents(items, tokenizer, sink, length, wide, report)
    total = hashlib.sha256(json.dumps([length, are_chats, count, sorted(sink.digests().items())]).encode())
    info = {
        "format": 1,
        "kind": "chats" if are_chats else "documents",
        "length": length,
        "rows": count,
        "vocab": tokenizer.rows,
        "end": tokenizer.eos_id,
        "pad": tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id,
        "counts": counts,
        "digest": total.hexdigest(),
        "tokenizer": tokenizer.digest(),
        "arrays": {name: [sink.types[name], sink.sizes[name]] for name in sorted(sink.sizes)},
    }
    return Rows(info, sink.arrays())


def _write_documents(
    items: Iterator[Any], tokenizer: Tokenizer, sink: _Sink, length: int, wide: str, report: Report | None
) -> tuple[dict[str, int], int]:
    lead = tokenizer.bos_id if tokenizer.adds_bos else tokenizer.eos_id
    place, done, empty, nbytes, going_on = 0, 0, 0, 0, False
    told = time.monotonic()
    for batch in _batches(items):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        flat: list[int] = []
        starts: list[int] = []
        for document, ids in zip(batch, encoded, strict=True):
            if not going_on:
                if not ids and not document.more:
                    empty += 1
                    continue
                starts.append(place + len(flat))
                flat.append(lead)  # type: ignore[arg-type]
                done += 1
            flat += ids
            nbytes += len(document.text.encode())
            going_on = document.more
        if flat:
            sink.add("tokens", flat, wide)
            sink.add("starts", starts, "int64")
        place += len(flat)
        if report is not None and time.monotonic() - told > 0.1:
            told = time.monotonic()
            report(done, place)
    if not done:
        raise DataError("every document is empty; there is nothing to learn from")
    sink.add("starts", [place], "int64")
    rows = -(-place // length)
    counts = {"documents": done, "empty": empty, "tokens": place, "supervised": place, "padding": rows * length - place}
    return {**counts, "bytes": nbytes}, rows


def _batches(items: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for item in items:
        if not isinstance(item, Document):
            raise DataError(f"{item.where}: holds a chat where the files before hold documents; pack them apart")
        batch.append(item)
        size += len(item.text)
        if size > _BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _write_chats(
    items: Iterator[Any],
    tokenizer: Tokenizer,
    sink: _Sink,
    length: int,
    too_long: str,
    wide: str,
    report: Report | None,
) -> tuple[dict[str, int], int]:
    names = ("chats", "tokens", "supervised", "padding", "cut_chats", "cut_tokens", "dropped_long", "dropped_silent")
    counts = dict.fromkeys(names, 0)
    sizes: list[int] = []
    place, told = 0, time.monotonic()
    for item in items:
        if not isinstance(item, Chat):
            raise DataError(f"{item.where}: holds a document where the files before hold chats; pack them apart")
        try:
            ids, mask = encode_turns(tokenizer, item.messages, tools=item.tools)
        except (DataError, TemplateError) as error:
            raise type(error)(f"{item.where}: {error}") from None
        mask[0] = False  # nothing stands before it from which it could be told
        if len(ids) > length + 1:
            if too_long == "drop":
                counts["dropped_long"] += 1
                continue
            counts["cut_chats"] += 1
            counts["cut_tokens"] += len(ids) - length - 1
            ids, mask = ids[: length + 1], mask[: length + 1]
        if not any(mask):
            counts["dropped_silent"] += 1
            continue
        sink.add("tokens", ids, wide)
        sink.add("said", mask, "uint8")
        sink.add("starts", [place], "int64")
        place += len(ids)
        sizes.append(len(ids) - 1)
        counts["chats"] += 1
        counts["supervised"] += sum(mask)
        if report is not None and time.monotonic() - told > 0.1:
            told = time.monotonic()
            report(counts["chats"], place)
    if not sizes:
        raise DataError(
            f"no chat is left to learn from: {counts['dropped_long']:,} longer than {length:,} tokens, "
            f"{counts['dropped_silent']:,} without a token of the assistant in it; give a larger length"
        )
    sink.add("starts", [place], "int64")
    order, begins = best_fit(np.asarray(sizes, np.int64), length)
    sink.add("order", order, "int64")
    sink.add("rows", begins, "int64")
    counts["tokens"] = sum(sizes)
    counts["padding"] = (len(begins) - 1) * length - counts["tokens"]
    return counts, len(begins) - 1


def best_fit(sizes: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which items share a row: the longest first, each into the fullest row that still holds it.

    Returns the items in the order of rows, and where in it each row begins (and the last one ends). Best-fit decreasing
    takes at most 22 % more rows than the least possible (Johnson et al., 1974). Time: n log(length), since rows with
    the same room are one entry.
    """
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free places -> rows
    rooms: list[int] = []  # the keys of `room`, sorted
    for item in np.argsort(-sizes, kind="stable"):
        size = int(sizes[item])
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            free = rooms[at]
            row = room[free].pop()
            if not room[free]:
                del room[free], rooms[at]
            rows[row].append(int(item))
        else:
            free, row = length, len(rows)
            rows.append([int(item)])
        left = free - size
        if left:
            if left not in room:
                bisect.insort(rooms, left)
                room[left] = []
            room[left].append(row)
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.fromiter(chain.from_iterable(rows), np.int64, len(sizes)), ends
