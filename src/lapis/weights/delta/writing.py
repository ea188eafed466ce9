"""Items in, delta.safetensors out: spans are encoded on a few threads and written in order, journaled tensor by tensor.

How long a compressed tensor becomes is known only at its end, and a safetensors header stands at the start: room for
the longest header that there can be is left free, and the header is written last, padded with spaces. Until then that
room is zero, so that the journal's running sha256 holds for a rerun. Memory: AHEAD spans and one tensor's factors.
Leaves out: what the items are (extract.py).
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lapis.checkpoint.tensor_file import DELTA, header_bytes
from lapis.errors import CheckpointError
from lapis.weights.delta.codes.code import Code, Encoded, Shape
from lapis.weights.engine.ahead import Reads
from lapis.weights.engine.journal import Journal, Progress
from lapis.weights.engine.sources import Source, as_bytes
from lapis.weights.engine.tiles import THREADS, Reader, checksum, dot, each
from lapis.weights.engine.writer import begin_writing

if TYPE_CHECKING:
    from hashlib import _Hash

AHEAD = 6 * THREADS  # spans that may be under way
_BEGIN = 16 << 20  # bytes after which the disk is told to begin
_LONG = 10**15  # elements that no part has


@dataclass(frozen=True)
class Item:
    """Something to store under a name of the file.

    Attributes:
        name: Of the tensor that it belongs to.
        shape: Of the difference.
        code: How that is stored; None: no difference.
        sources: base and chat.
        extra: Parts that are in memory: dtype, shape and bytes.
        digested: Whether the base's values count for its digest.
    """

    name: str
    shape: Shape = ()
    code: Code | None = None
    sources: tuple[Source, ...] = ()
    extra: Mapping[str, tuple[str, Shape, bytes]] = field(default_factory=dict)
    digested: bool = False

    def spans(self) -> list[tuple[int, int]]:
        return self.code.spans(self.shape) if self.code else []

    def parts(self, payload: int | None) -> dict[str, tuple[str, Shape]]:
        """The parts by their names in the file. payload: elements of a part of unknown length."""
        coded = self.code.parts(self.shape) if self.code else {}
        parts = {part: (dtype, (payload or 0,) if shape is None else shape) for part, (dtype, shape) in coded.items()}
        parts |= {part: (dtype, shape) for part, (dtype, shape, _) in self.extra.items()}
        return {f"{self.name}:{part}" if part else self.name: value for part, value in parts.items()}


@dataclass
class ItemFigures:
    """What was seen of one item. payload: bytes; the others are sums of squares. sha256: of the base's values."""

    payload: int = 0
    delta_sq: float = 0.0
    error_sq: float = 0.0
    base_sq: float = 0.0
    sha256: str = ""


@dataclass
class Written:
    """What a run did."""

    figures: dict[str, ItemFigures]
    bytes_read: int
    bytes_written: int
    bytes_resumed: int


@dataclass(frozen=True)
class _Span:
    number: int
    item: Item
    first: int
    last: int
    ends: bool  # the item's last one

    def reads(self) -> Reads:
        return [(source, self.first, self.last) for source in self.item.sources]


@dataclass(frozen=True)
class _Ready:
    piece: Encoded
    base: Tensor  # as it is stored
    squares: tuple[float, float, float]
    inputs: int


def write_items(
    items: Sequence[Item],
    folder: Path,
    journal: Journal,
    describe: Callable[[Mapping[str, ItemFigures] | None], dict[str, str]],
    *,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Writes the file into `folder`, going on from the journal.

    Args:
        items: In the order of the file.
        folder: Where it goes.
        journal: Of the staging folder.
        describe: The metadata of the file by the items' figures; with None in their place the longest there can be.
        allow_nonfinite: Keep NaN and Inf, for codes that lose nothing.
        progress: Called with bytes of the chat model, done and in all.

    Raises:
        CheckpointError: For NaN and Inf.
    """
    room = longest_header(items, describe)
    run = _Writing(items, folder / DELTA, journal, room, allow_nonfinite, progress)
    run()
    write_header(folder / DELTA, items, run.figures, describe, room, run.at)
    return Written(run.figures, run.read, run.at - run.resumed, run.resumed)


def write_piece(items: Sequence[Item], folder: Path, journal: Journal, *, allow_nonfinite: bool) -> Written:
    """Writes a run of a file's items, without a header, as `write_items` does."""
    run = _Writing(items, folder / DELTA, journal, 0, allow_nonfinite, None)
    run()
    return Written(run.figures, run.read, run.at - run.resumed, run.resumed)


def longest_header(
    items: Sequence[Item], describe: Callable[[Mapping[str, ItemFigures] | None], dict[str, str]]
) -> int:
    """Bytes of the longest header that there can be."""
    longest: dict[str, tuple[str, Shape]] = {}
    for item in items:
        longest |= item.parts(_LONG)
    return len(header_bytes(longest, describe(None)))


def write_header(
    path: Path,
    items: Sequence[Item],
    figures: Mapping[str, ItemFigures],
    describe: Callable[[Mapping[str, ItemFigures] | None], dict[str, str]],
    room: int,
    end: int,
) -> None:
    """Writes the header into the room that was left for it; the file then ends at `end`."""
    final: dict[str, tuple[str, Shape]] = {}
    for item in items:
        final |= item.parts(figures[item.name].payload)
    with path.open("r+b") as file:
        file.write(header_bytes(final, describe(figures), room))
        file.truncate(end)


class _Writing:
    def __init__(
        self,
        items: Sequence[Item],
        path: Path,
        journal: Journal,
        room: int,
        allow_nonfinite: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.journal, self.path, self.allow_nonfinite, self.report = journal, path, allow_nonfinite, progress
        if path.exists():  # a run that was killed with the header in its place
            with path.open("r+b") as file:
                file.write(bytes(room))
        again = _inputs_again(items)
        self.state = journal.progress(DELTA, lambda first, last: next(again))
        journal.settle()
        self.figures = {name: ItemFigures(*seen) for name, seen in self.state.figures.items()}
        self.resumed = self.at = self.state.done
        self.left = items[len(self.figures) :]
        self.total = sum(chat_bytes(item) for item in items)
        self.done = self.total - sum(chat_bytes(item) for item in self.left)
        if not self.at:
            path.write_bytes(bytes(room))
            self.state = Progress(room, hashlib.sha256(bytes(room)))
            self.at = room
        self.read, self.sent = 0, self.at
        self.turn, self.failed = 0, False
        self.changed = threading.Condition()
        self.pending: dict[int, tuple[_Span, _Ready | None]] = {}
        self.tails: dict[str, list[bytes | memoryview]] = {}
        self.digest: _Hash = hashlib.sha256()
        self.current = ItemFigures()

    def __call__(self) -> None:
        tasks = list(_numbered(self.left))
        handle = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            self.handle = handle
            os.ftruncate(handle, self.at)
            each(tasks, self._work, reads=_Span.reads)
        finally:
            os.close(handle)

    def _work(self, _reader: Reader, span: _Span) -> None:
        try:
            with self.changed:  # all earlier spans are in somebody's hands, so this comes to an end
                while span.number - self.turn > AHEAD and not self.failed:
                    self.changed.wait(0.1)
            encoded = self._encode(span) if span.item.code and span.last > span.first else None
            self._finish(span, encoded)
        except BaseException:
            self.failed = True
            raise

    def _encode(self, span: _Span) -> _Ready:
        item, count = span.item, span.last - span.first
        assert item.code is not None
        stored, inputs, taken = [], 0, 0
        for number, source in enumerate(item.sources):
            values = torch.empty(count, dtype=source.dtype)
            taken += source.read(span.first, span.last, as_bytes(values))
            inputs += checksum(values, number, span.first)
            stored.append(values)
        base, chat = stored
        wide = base.float()
        base_sq = dot(wide, wide)
        delta = chat.float().sub_(wide) if chat.dtype is not torch.float32 else chat.sub_(wide)
        delta_sq = dot(delta, delta)
        if not isfinite(delta_sq) and not bool(torch.isfinite(delta).all()):
            self._refuse_nonfinite(span)
        piece = item.code.encode(delta, item.shape, item.name)
        error_sq = 0.0
        if piece.decoded is not None:
            error = piece.decoded.sub_(delta)
            error_sq = dot(error, error)
        with self.changed:
            self.read += taken
        return _Ready(piece, base, (delta_sq, error_sq, base_sq), inputs)

    def _refuse_nonfinite(self, span: _Span) -> None:
        item = span.item
        if self.allow_nonfinite:
            return
        for source in item.sources:
            values = torch.empty(span.last - span.first, dtype=source.dtype)
            source.read(span.first, span.last, as_bytes(values))
            if bad := int((~torch.isfinite(values.float())).sum()):
                where = f"{source.name} in {source.role} holds {bad:,} NaN or Inf"
                break
        else:
            where = f"{item.name}: a difference is too large for float32"
        remedy = "; --allow-nonfinite keeps them" if item.code and item.code.name in ("planes", "plain") else ""
        raise CheckpointError(f"{where} (elements {span.first:,} to {span.last:,}){remedy}")

    def _finish(self, span: _Span, encoded: _Ready | None) -> None:
        """Hands on a span to be written, in order: whoever brings the next one does all that wait."""
        with self.changed:
            self.pending[span.number] = span, encoded
            if span.number != self.turn:
                return
            taken = self.pending.pop(self.turn)
        while True:
            self._write(*taken)
            with self.changed:
                self.turn += 1
                self.changed.notify_all()
                following = self.pending.pop(self.turn, None)
            if following is None:
                return
            taken = following

    def _write(self, span: _Span, encoded: _Ready | None) -> None:
        item, seen = span.item, self.current
        if encoded is not None:
            for part, data in encoded.piece.parts.items():
                if part:
                    self.tails.setdefault(part, []).append(data)
                else:
                    seen.payload += len(data)
                    self._put(data)
            if item.digested:
                self.digest.update(as_bytes(encoded.base))
            delta_sq, error_sq, base_sq = encoded.squares
            seen.delta_sq += delta_sq
            seen.error_sq += error_sq
            seen.base_sq += base_sq
            self.state.inputs = (self.state.inputs + encoded.inputs) % 2**64
            self.done += (span.last - span.first) * item.sources[1].dtype.itemsize
        if span.ends:
            for part in item.code.parts(item.shape) if item.code else ():
                for data in self.tails.pop(part, ()):
                    self._put(data)
            for _, _, data in item.extra.values():
                self._put(data)
            seen.sha256 = self.digest.hexdigest() if item.digested else ""
            self.figures[item.name] = seen
            self.state.done = self.at
            self.journal.record(DELTA, self.state, {item.name: list(vars(seen).values())})
            self.current, self.digest, self.tails = ItemFigures(), hashlib.sha256(), {}
        if self.report:
            self.report(self.done, self.total)

    def _put(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        self.state.sha256.update(left)
        while left:
            size = os.pwrite(self.handle, left, self.at)
            self.at += size
            left = left[size:]
        if self.at - self.sent >= _BEGIN:
            begin_writing(self.handle, self.sent, self.at)
            self.sent = self.at


def _numbered(items: Sequence[Item]) -> Iterator[_Span]:
    number = 0
    for item in items:
        spans = item.spans() or [(0, 0)]  # an item without numbers has its parts all the same
        for place, (first, last) in enumerate(spans):
            yield _Span(number, item, first, last, place == len(spans) - 1)
            number += 1


def _inputs_again(items: Sequence[Item]) -> Iterator[int]:
    """The checksum of what each item is made from, item by item."""
    for item in items:
        total = 0
        for first, last in item.spans():
            for number, source in enumerate(item.sources):
                values = torch.empty(last - first, dtype=source.dtype)
                source.read(first, last, as_bytes(values))
                total += checksum(values, number, first)
        yield total


def chat_bytes(item: Item) -> int:
    """Of the chat model that are read for an item."""
    return prod(item.shape) * item.sources[1].dtype.itemsize if item.code else 0


def figures_or_longest(seen: ItemFigures | None) -> dict[str, Any]:
    """The relative figures of a tensor as its description has them; the longest that there can be, for None."""
    if seen is None:
        return {"relative_error": 1.23457e-300, "relative_norm": 1.23457e-300}
    error = (seen.error_sq / seen.delta_sq) ** 0.5 if seen.delta_sq else 0.0
    norm = (seen.delta_sq / seen.base_sq) ** 0.5 if seen.base_sq else 0.0
    return {"relative_error": _six(error), "relative_norm": _six(norm)}


def _six(value: float) -> float:
    return float(f"{value:.6g}") if isfinite(value) else 0.0
