"""Documents and chats -> arrays of tokens: what a worker does with one part of a corpus.

Documents follow one another without gaps; each begins with the end-of-text token (or BOS, where the tokenizer puts one
before every text). Chats are laid into rows whole, best fit first, among at most GROUP of them, so that memory is
bounded. Arrays go to files as they grow, or stay in memory. Special tokens that the text spells are counted; they are
plain text, or tokens where the source is trusted. Reading is in corpus_parts.py, who does which part in
parallel_packing.py.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lapis.errors import DataError, TemplateError
from lapis.text.chat.chat import count_gaps, count_replies, encode_turns, write_calls
from lapis.text.chat.special_token_guard import spelled_tokens
from lapis.text.corpus.corpus import ChatRecord, Document, describe_file
from lapis.text.rows.corpus_parts import Stretch, named
from lapis.text.rows.sequences import best_fit
from lapis.text.tokenizer.tokenizer import Tokenizer

GROUP = 1 << 16  # chats that are laid into rows together
_BATCH = 1_000_000  # characters that are encoded at once
Report = Callable[[int, int], None]  # texts done, tokens written
SpecialText = Literal["plain", "trusted"]


@dataclass(frozen=True)
class Shape:
    """What rows are to be.

    Attributes:
        kind: "documents" or "chats".
        length: Tokens of a row.
        too_long: Whether a longer chat is cut at its end, or dropped.
        special: What special tokens that the text spells become: plain text, or, where the text is trusted, tokens.
    """

    kind: str
    length: int
    too_long: Literal["cut", "drop"] = "cut"
    special: SpecialText = "plain"


@dataclass
class Shard:
    """What came of a part.

    Attributes:
        counts: Documents or chats, tokens, supervised, cut, dropped, bytes.
        rows: Of chats.
        types: dtype and length of each array.
        digests: sha256 of each array.
        arrays: The arrays; empty where they are in files.
        notices: How often each special token was spelled ("special TOKEN"), `replies`, and `open_replies`, those of
            them that nothing closes.
    """

    counts: dict[str, int]
    rows: int
    types: dict[str, tuple[str, int]]
    digests: dict[str, str]
    arrays: dict[str, NDArray[Any]]
    notices: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": self.counts,
            "rows": self.rows,
            "types": self.types,
            "digests": self.digests,
            "notices": dict(self.notices),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Shard":
        types = {name: (str(kind), int(size)) for name, (kind, size) in value["types"].items()}
        return cls(value["counts"], value["rows"], types, value["digests"], {}, value.get("notices", {}))


def write_shard(
    items: Iterable[Any],
    tokenizer: Tokenizer,
    shape: Shape,
    folder: Path | None = None,
    *,
    part: list[Stretch] | None = None,
    report: Report | None = None,
) -> Shard:
    """The arrays of one part, in files `NAME.bin` of the folder, or in memory. part: where the items are from."""
    sink = _Sink(folder)
    notices: Counter[str] = Counter()
    try:
        write = _write_chats if shape.kind == "chats" else _write_documents
        work = _ShardWork(tokenizer, shape, sink, part or [], _throttled(report), notices)
        counts, rows = write(iter(items), work)
        return Shard(counts, rows, sink.types, sink.digests(), sink.arrays(), notices)
    finally:
        sink.close()


def assemble(
    shards: list[Shard], shape: Shape, tokenizer: Tokenizer, source_format: str | None = None
) -> tuple[dict[str, Any], list[int]]:
    """What rows.json says of the shards together, and the numbers of those that are not empty.

    Args:
        shards: One of each part, in order.
        shape: What rows they were made for.
        tokenizer: The one that was used.
        source_format: The line that says in which format the records were read.

    Raises:
        DataError: Where nothing is left to learn from.
    """
    used = [i for i, shard in enumerate(shards) if shard.types.get("tokens", ("", 0))[1]]
    counts: dict[str, int] = {}
    for shard in shards:
        for name, number in shard.counts.items():
            counts[name] = counts.get(name, 0) + number
    if shape.kind == "chats":
        if not used:
            raise DataError(
                f"no chat is left to learn from: {counts['dropped_long']:,} longer than {shape.length:,} tokens, "
                f"{counts['dropped_silent']:,} without a token of the assistant in it; give a larger length"
            )
        rows = sum(shard.rows for shard in shards)
    else:
        if not used:
            raise DataError("every document is empty; there is nothing to learn from")
        rows = -(-counts["tokens"] // shape.length)
    counts["padding"] = rows * shape.length - counts["tokens"]
    digests = [sorted(shards[i].digests.items()) for i in used]
    total = hashlib.sha256(json.dumps([shape.length, shape.kind == "chats", rows, digests]).encode())
    info = {
        "format": 2,
        "kind": shape.kind,
        "length": shape.length,
        "rows": rows,
        "vocab": tokenizer.rows,
        "end": tokenizer.eos_id,
        "pad": tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id,
        "counts": counts,
        "digest": total.hexdigest(),
        "tokenizer": tokenizer.digest(),
        "shards": [{"rows": shards[i].rows, "arrays": shards[i].types} for i in used],
    }
    notices: Counter[str] = Counter()
    for shard in shards:
        notices.update(shard.notices)
    if notices:
        info["notices"] = dict(sorted(notices.items()))
    if shape.special != "plain":
        info["special"] = shape.special
    if source_format is not None:
        info["source_format"] = source_format
    return info, used


def format_line(kind: str, first: Path, field: str | None) -> str | None:
    """The line that says in which format the records of files are read; first: the first file. None for documents."""
    return describe_file(first, field) if kind == "chats" else None


class _Sink:
    """Where arrays grow: files of a folder, or lists in memory. Takes the sha256 of what goes by."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.hashes: dict[str, Any] = {}
        self.types: dict[str, tuple[str, int]] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._held: dict[str, list[NDArray[Any]]] = {}

    def add(self, name: str, values: Any, dtype: str) -> None:
        array = np.asarray(values, dtype)
        if name not in self.hashes:
            self.hashes[name] = hashlib.sha256()
            if self.folder is not None:
                self._files[name] = (self.folder / f"{name}.bin").open("wb")
        raw = array.tobytes()
        self.hashes[name].update(raw)
        self.types[name] = (dtype, self.types.get(name, (dtype, 0))[1] + len(array))
        if name in self._files:
            self._files[name].write(raw)
        else:
            self._held.setdefault(name, []).append(array)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What lies in memory; nothing where it went to files, which are on the disk then."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: np.concatenate(parts) for name, parts in self._held.items()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def digests(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self.hashes.items()}


def _throttled(report: Report | None) -> Report:
    """The report, at most ten times a second."""
    last = [time.monotonic()]

    def report_now_and_then(texts: int, tokens: int) -> None:
        if report is not None and time.monotonic() - last[0] > 0.1:
            last[0] = time.monotonic()
            report(texts, tokens)

    return report_now_and_then


def _wide(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.rows <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class _ShardWork:
    """How the items of a part are written. part: where they are from. notices: counted on the way."""

    tokenizer: Tokenizer
    shape: Shape
    sink: _Sink
    part: list[Stretch]
    report: Report
    notices: Counter[str]


def _write_documents(items: Iterator[Any], work: _ShardWork) -> tuple[dict[str, int], int]:
    """Counts and rows of what was written."""
    tokenizer, shape, sink = work.tokenizer, work.shape, work.sink
    lead = tokenizer.document_lead
    wide = _wide(tokenizer)
    trusted = shape.special == "trusted"
    border = lead if trusted and lead == tokenizer.eos_id else None  # an end-of-text in the text begins a document
    place, done, empty, nbytes, going_on = 0, 0, 0, 0, False
    for batch in _batches(items):
        work.notices.update(_special_notices(tokenizer, [document.text for document in batch]))
        encoded = tokenizer.encode_batch([document.text for document in batch], special=trusted)
        flat: list[int] = []
        starts: list[int] = []
        for document, ids in zip(batch, encoded, strict=True):
            if not (going_on or document.rest):
                if trusted and ids[:1] == [lead]:  # the text has it already
                    ids = ids[1:]
                if not ids and not document.more:
                    empty += 1
                    continue
                starts.append(place + len(flat))
                flat.append(lead)  # type: ignore[arg-type]
                done += 1
            if border is not None and border in ids:
                inner = [place + len(flat) + i for i, token_id in enumerate(ids) if token_id == border]
                starts += inner
                done += len(inner)
            flat += ids
            nbytes += len(document.text.encode())
            going_on = document.more
        sink.add("tokens", flat, wide)
        sink.add("starts", starts, "int64")
        place += len(flat)
        work.report(done, place)
    sink.add("starts", [place], "int64")
    return {"documents": done, "empty": empty, "tokens": place, "supervised": place, "bytes": nbytes}, 0


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
    if batch:
        yield batch


def _special_notices(tokenizer: Tokenizer, value: Any) -> dict[str, int]:
    return {f"special {token}": count for token, count in spelled_tokens(tokenizer, value).items()}


def _write_chats(items: Iterator[Any], work: _ShardWork) -> tuple[dict[str, int], int]:
    """Counts and rows of what was written."""
    tokenizer, shape, sink = work.tokenizer, work.shape, work.sink
    names = ("chats", "tokens", "supervised", "cut_chats", "cut_tokens", "dropped_long", "dropped_silent")
    counts = dict.fromkeys(names, 0)
    length, wide = shape.length, _wide(tokenizer)
    sizes: list[int] = []
    place, rows, laid = 0, 0, 0

    def lay() -> None:
        """Lays the chats that are held into rows."""
        nonlocal rows, laid
        order, begins = best_fit(np.asarray(sizes, np.int64), length)
        sink.add("order", order + laid, "int64")
        sink.add("rows", begins[:-1] + laid, "int64")
        rows, laid = rows + len(begins) - 1, laid + len(sizes)
        sizes.clear()

    for item in items:
        if not isinstance(item, ChatRecord):
            raise DataError(f"{item.where}: holds a document where the files before hold chats; pack them apart")
        try:
            ids, mask = encode_turns(
                tokenizer,
                write_calls(tokenizer, item.messages, item.tools, item.variables),
                tools=item.tools,
                variables=item.variables,
                trusted=shape.special == "trusted",
            )
        except (DataError, TemplateError) as error:
            raise named(error, item, work.part) from None
        work.notices.update(_special_notices(tokenizer, item.messages))
        replies, unclosed = count_replies(tokenizer, ids, mask)
        work.notices.update(replies=replies, open_replies=unclosed, **count_gaps(tokenizer, item.messages, item.tools))
        mask[0] = False  # nothing stands before it from which it could be predicted
        if len(ids) > length + 1:
            if shape.too_long == "drop":
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
        counts["tokens"] += len(ids) - 1
        counts["supervised"] += sum(mask)
        if len(sizes) == GROUP:
            lay()
        work.report(counts["chats"], place)
    if sizes:
        lay()
    if rows:
        sink.add("starts", [place], "int64")
        sink.add("rows", [laid], "int64")
    return counts, rows
