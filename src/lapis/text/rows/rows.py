"""Rows of tokens to train on, and the exact place in them.

Tokens lie in shards, document after document, as if they were one array; a row is made when it is needed. So a
packed folder is little more than its tokens and opens in no time. Its files are read and never mapped, so that one that
is cut or changed meanwhile is an error and not a crash. The order of rows is a seeded
permutation that is known at any place by itself (a Feistel network), so a cursor is three numbers and resuming is free.
How rows come to be is in packing.py, several sources in mixture.py.
Shape suffixes: B rows of a batch, T places of a row.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lapis.checkpoint.commit import MANIFEST as COMMITTED
from lapis.checkpoint.files import contained, read_at, read_json, stamp
from lapis.errors import CheckpointError, DataError
from lapis.parsing import quoted

if TYPE_CHECKING:
    import torch

IGNORE = -100  # a target without loss, as torch's cross_entropy has it
MANIFEST = "rows.json"
MOST_LENGTH = 1 << 24  # tokens of a row
_LONG = ("tokens", "said")  # arrays with an entry for each token
_DTYPES = {
    "tokens": ("uint16", "uint32"),
    "starts": ("int64",),
    "said": ("uint8",),
    "order": ("int64",),
    "rows": ("int64",),
}


@dataclass(frozen=True)
class Cursor:
    """The next row to be read: how many rows of which epoch are behind, in the order that the seed gives."""

    epoch: int = 0
    row: int = 0
    seed: int = 0

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Cursor":
        """Raises DataError where `value` is not what to_json gave."""
        names = {field.name for field in dataclasses.fields(cls)}
        good = isinstance(value, dict) and set(value) == names
        if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value.values()):
            raise DataError(f"the data cursor is {quoted(value)}; expected {', '.join(sorted(names))}")
        return cls(**value)


@dataclass(frozen=True)
class RowBatch:
    """ids_BT: int64. targets_BT: int64, the token that follows, or -100 for no loss. segments_BT: int32, 1, 2, ... for
    the documents of a row, 0 for padding; a token attends only to its own. positions_BT: int64, from 0 in each."""

    ids_BT: "torch.Tensor"
    targets_BT: "torch.Tensor"
    segments_BT: "torch.Tensor"
    positions_BT: "torch.Tensor"

    @property
    def supervised(self) -> int:
        """Tokens that carry loss."""
        return int((self.targets_BT != IGNORE).sum())

    def to(self, device: "str | torch.device") -> "RowBatch":
        return RowBatch(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))


class Rows:
    """Packed data: in memory (pack without `out`) or read from a folder (`Rows.open`).

    info: what rows.json says: kind ("documents" or "chats"), length, rows, digest, counts, vocab, tokenizer.
    shards: arrays of each: tokens; starts, the place in tokens where each document begins, and the end of all. For
    chats also: said, 1 for the assistant's tokens; order, the chats in the order of rows; rows, where in `order` each
    row begins, and the end of all. A document may go on in the next shard; a chat does not.
    begins: rows of chats, tokens of documents before each shard.
    """

    def __init__(
        self,
        info: dict[str, Any],
        shards: Mapping[str, NDArray[Any]] | Sequence[Mapping[str, NDArray[Any]]],
        source: str = "rows in memory",
    ) -> None:
        self.info = info
        self.source = source
        self.shards = [shards] if isinstance(shards, Mapping) else list(shards)
        self.length = int(info["length"])
        self.count = int(info["rows"])
        self.chats = info["kind"] == "chats"
        sizes = [_size(shard, "rows") - 1 if self.chats else _size(shard, "tokens") for shard in self.shards]
        self.begins = np.cumsum([0, *sizes], dtype=np.int64)

    @classmethod
    def open(cls, folder: str | Path) -> "Rows":
        """Opens a packed folder. Raises DataError where it is not one, or a file has not the size it should have."""
        root = Path(folder)
        if not (root / MANIFEST).is_file():
            raise DataError(
                f"{root}: there is no {MANIFEST}; make one with: lapis data pack FILES --tokenizer DIR --out {root}"
            )
        info = read_json(contained(root, MANIFEST))
        try:
            if info["format"] != 2:
                raise ValueError(f"format {quoted(info['format'])}")
            _check_facts(info)
            needs = {"tokens", "starts"} | ({"said", "order", "rows"} if info["kind"] == "chats" else set())
            shards: list[Mapping[str, NDArray[Any]]] = []
            for number, entry in enumerate(info["shards"]):
                if set(entry["arrays"]) != needs:
                    raise KeyError("arrays")
                shards.append(_StoredShard(root, number, {name: tuple(kind) for name, kind in entry["arrays"].items()}))
            if not shards:
                raise KeyError("shards")
            rows = cls(info, shards, str(root))
            had = int(rows.begins[-1]) if rows.chats else -(-int(rows.begins[-1]) // rows.length)
            if had != rows.count:
                raise ValueError("rows")
            return rows
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{root / MANIFEST}: {error!s:.100} is missing or wrong; pack the data again") from None

    def verify(self) -> None:
        """Reads a folder's files whole and compares them with its manifest. Rows in memory are as they are.

        Raises:
            DataError: Naming a file that is damaged, or was changed since the data was packed.
        """
        stored = [shard for shard in self.shards if isinstance(shard, _StoredShard)]
        if not stored:
            return
        root = stored[0].root
        try:
            listed = {name: str(entry["sha256"]) for name, entry in read_json(root / COMMITTED)["files"].items()}
        except (CheckpointError, KeyError, TypeError, AttributeError):
            raise DataError(f"{root}: has no list of its files and their digests; pack the data again") from None
        names = [MANIFEST, *(array_name(name, shard.number) for shard in stored for name in shard.types)]
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
            for name, digest in zip(names, pool.map(lambda name: _sha256(root / name), names), strict=True):
                if digest != listed.get(name):
                    raise DataError(f"{root / name}: is not as it was packed; restore it, or pack the data again")

    def __len__(self) -> int:
        return self.count

    @property
    def digest(self) -> str:
        """sha256 of tokens, borders and masks: the same data in the same rows."""
        return str(self.info["digest"])

    @property
    def counts(self) -> dict[str, int]:
        """What was packed: documents or chats, tokens, supervised, padding, cut, dropped, bytes."""
        return dict(self.info["counts"])

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token that carries loss, for bits per byte (documents only)."""
        return self.counts["bytes"] / max(1, self.counts["supervised"])

    def start(self, seed: int) -> Cursor:
        return Cursor(seed=seed)

    def resumed(self, value: Any) -> Cursor:
        """The cursor that to_json gave. Raises DataError for another."""
        return Cursor.from_json(value)

    def batch(self, cursor: Cursor, size: int) -> tuple[RowBatch, Cursor]:
        """The next `size` rows and the cursor after them. At the end of an epoch the next one follows at once."""
        rows, after = self.indices(cursor, size)
        return self.take(rows), after

    def indices(self, cursor: Cursor, size: int) -> tuple[NDArray[np.int64], Cursor]:
        """Which rows `batch` takes; each rank may `take` its own share of them. Constant time per row."""
        if cursor.row > self.count:
            raise DataError(
                f"{self.source}: the cursor stands at row {cursor.row:,} of {self.count:,}; the data changed"
            )
        parts, epoch, row, left = [], cursor.epoch, cursor.row, size
        while left:
            if row == self.count:
                epoch, row = epoch + 1, 0
            now = min(left, self.count - row)
            parts.append(shuffled(np.arange(row, row + now), self.count, cursor.seed, epoch))
            row, left = row + now, left - now
        return np.concatenate(parts or [np.empty(0, np.int64)]), Cursor(epoch, row, cursor.seed)

    def take(self, rows: NDArray[np.int64]) -> RowBatch:
        """These rows, by number."""
        import torch  # here, so that packing need not wait for it

        return RowBatch(*(torch.from_numpy(array) for array in self.arrays(rows)))

    def arrays(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """These rows as ids, targets, segments and positions, for who needs no tensors."""
        shape = (len(rows), self.length)
        ids = np.full(shape, self.info["pad"], np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        segments = np.zeros(shape, np.int32)
        positions = np.zeros(shape, np.int64)
        fill = self._fill_chats if self.chats else self._fill_documents
        for i, row in enumerate(rows):
            try:
                fill(int(row), ids[i], targets[i], segments[i], positions[i])
            except (ValueError, IndexError, OverflowError):
                raise DataError(f"{self.source}: row {int(row):,} is damaged; pack the data again") from None
        if ids.size and not 0 <= int(ids.min()) <= max(int(ids.max()), int(targets.max())) < self.info["vocab"]:
            raise DataError(f"{self.source}: holds a token of which there is none; pack the data again")
        return ids, targets, segments, positions

    def _fill_documents(self, row: int, ids: Any, targets: Any, segments: Any, positions: Any) -> None:
        """A row is a stretch of the stream. What follows a document's last token is the end-of-text token."""
        total = int(self.begins[-1])
        begin = row * self.length
        end = min(begin + self.length, total)
        n = end - begin
        tokens, borders = self._stretch(begin, min(end + 1, total))
        ids[:n] = tokens[:n]
        targets[: len(tokens) - 1] = tokens[1:]
        if end == total:
            borders = np.append(borders, n)  # the last document ends the stream
        targets[borders - 1] = self.info["end"]
        marks = np.zeros(n, np.int32)
        marks[borders[borders < n]] = 1
        segments[:n] = 1 + np.cumsum(marks)
        places = np.arange(n)
        positions[:n] = places - np.maximum.accumulate(np.where(marks == 1, places, 0))

    def _stretch(self, begin: int, end: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Tokens of the stream, and where after the first of them a document begins. It may span several shards."""
        tokens, borders = [], []
        at = int(np.searchsorted(self.begins, begin, side="right")) - 1
        while begin < end:
            shard, base = self.shards[at], int(self.begins[at])
            stop = min(end, int(self.begins[at + 1]))
            tokens.append(shard["tokens"][begin - base : stop - base])
            starts = shard["starts"][:-1]
            first, last = np.searchsorted(starts, [begin - base, stop - base], side="left")
            borders.append(starts[first:last] + base)
            begin, at = stop, at + 1
        places = np.concatenate(borders) - (end - sum(map(len, tokens)))
        return np.concatenate(tokens), places[places > 0]

    def _fill_chats(self, row: int, ids: Any, targets: Any, segments: Any, positions: Any) -> None:
        """A row is some whole chats. The last token of each is only ever a target."""
        number = int(np.searchsorted(self.begins, row, side="right")) - 1
        shard = self.shards[number]
        row -= int(self.begins[number])
        tokens, starts, own = shard["tokens"], shard["starts"], shard["said"]
        at = 0
        for segment, chat in enumerate(shard["order"][slice(*shard["rows"][row : row + 2])], 1):
            a, b = int(starts[chat]), int(starts[chat + 1])
            n = b - a - 1
            ids[at : at + n] = tokens[a : b - 1]
            targets[at : at + n] = np.where(own[a + 1 : b] == 1, tokens[a + 1 : b].astype(np.int64), IGNORE)
            segments[at : at + n] = segment
            positions[at : at + n] = np.arange(n)
            at += n


def array_name(name: str, shard: int) -> str:
    """The file of one array of a shard."""
    return f"{name}-{shard:05}.bin"


class _StoredArray:
    """Tokens, or marks of tokens, that lie in a file; a slice is read when it is asked for."""

    def __init__(self, shard: "_StoredShard", name: str) -> None:
        self._shard, self._name = shard, name

    def __getitem__(self, places: slice) -> NDArray[Any]:
        first, last, _ = places.indices(self._shard.types[self._name][1])
        return self._shard.read(self._name, first, max(first, last))


class _StoredShard(Mapping[str, Any]):
    """The arrays of a shard in a folder: borders are read whole when they are first needed, tokens in slices."""

    def __init__(self, root: Path, number: int, types: dict[str, tuple[str, int]]) -> None:
        self.root, self.number, self.types = root, number, types
        self._files: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for name, (dtype, size) in types.items():
            if dtype not in _DTYPES[name] or type(size) is not int or size < 1:
                raise ValueError(f"arrays.{name}")
            path = contained(root, array_name(name, number))
            status = path.stat()
            if status.st_size != size * np.dtype(dtype).itemsize:
                raise DataError(f"{path}: has {status.st_size:,} bytes, not {size:,} x {dtype}; pack the data again")
            self._files[name] = path, stamp(status)

    def read(self, name: str, first: int, last: int) -> NDArray[Any]:
        """Entries [first, last) of an array. Raises DataError where the file is another than when it was opened."""
        dtype = np.dtype(self.types[name][0])
        path, opened = self._files[name]
        result = np.empty(last - first, dtype)
        try:
            same = read_at(path, first * dtype.itemsize, result.view(np.uint8).data, opened)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        if not same:
            raise DataError(f"{path}: was changed while it was in use; restore it, or pack the data again")
        return result

    def __getitem__(self, name: str) -> Any:
        return _StoredArray(self, name) if name in _LONG else _borders(self, name)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __iter__(self) -> Any:
        return iter(self.types)

    def __len__(self) -> int:
        return len(self.types)


@lru_cache(maxsize=512)
def _borders(shard: _StoredShard, name: str) -> NDArray[Any]:
    return shard.read(name, 0, shard.types[name][1])


def _check_facts(info: Mapping[str, Any]) -> None:
    """Raises ValueError with the name of a field of rows.json that is not what `assemble` writes."""
    for name in ("length", "rows", "vocab", "end", "pad"):
        least = 0 if name in ("end", "pad") else 1
        if type(info[name]) is not int or not least <= info[name] < 2**48:
            raise ValueError(name)
    if info["length"] > MOST_LENGTH or info["kind"] not in ("documents", "chats"):
        raise ValueError("length" if info["length"] > MOST_LENGTH else "kind")
    if not all(isinstance(info[name], str) for name in ("digest", "tokenizer")):
        raise ValueError("digest")
    needed = {"tokens", "supervised"} | ({"bytes"} if info["kind"] == "documents" else set())
    if not needed <= set(info["counts"]) or not all(type(n) is int and 0 <= n < 2**60 for n in info["counts"].values()):
        raise ValueError("counts")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _size(shard: Mapping[str, NDArray[Any]], name: str) -> int:
    return shard.types[name][1] if isinstance(shard, _StoredShard) else len(shard[name])


def shuffled(places: NDArray[np.int64], count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where the rows at these places of an epoch's order are: a permutation of range(count), at any place for itself.

    A balanced Feistel network over the next power of four, walked until it lands inside (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002): under four steps on average.

    Args:
        places: In the epoch's order, each below `count`.
        count: Rows of an epoch.
        seed: Of the run.
        epoch: Each has an order of its own.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    digest = hashlib.sha256(f"lapis rows {seed} {epoch}".encode()).digest()
    keys = np.frombuffer(digest + hashlib.sha256(digest).digest(), np.uint64)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= count
    return values.astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele et al., 2014): every bit of the input moves every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
