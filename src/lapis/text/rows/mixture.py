"""Several sources of rows in one stream, each with its share: Mixture.

Which source the next row is of follows from how many rows each has given: after any number of rows no source is a
whole row ahead of its share or behind it. So the cursor is one count for each source, resuming costs nothing, and the
stream does not depend on batches or processes. Within a source rows come in its own shuffled order, epoch after epoch;
a small source with a large weight is simply read more often.
How rows come to be is in packing.py, weights as they stand in settings in data_sources.py.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lapis.errors import ConfigError, DataError
from lapis.parsing import quoted
from lapis.text.rows.rows import RowBatch, Rows, shuffled
from lapis.wording import format_count

if TYPE_CHECKING:
    import torch

_APART = 0x9E3779B1  # between the seeds of two sources, so that equally long ones are not shuffled alike


@dataclass(frozen=True)
class MixtureCursor:
    """How many rows of each source are behind, in the order that the seed gives."""

    taken: tuple[int, ...]
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"taken": list(self.taken), "seed": self.seed}


class Mixture:
    """Rows of several sources. name -> (rows, weight); a weight is a share of the rows drawn, as a proportion."""

    def __init__(self, sources: dict[str, tuple[Rows, float]]) -> None:
        self.names = list(sources)
        self.sources = [rows for rows, _ in sources.values()]
        self.shares = _whole([weight for _, weight in sources.values()])
        self.weights = [share / sum(self.shares) for share in self.shares]
        first = self.sources[0]
        for name, rows in zip(self.names, self.sources, strict=True):
            for what in ("kind", "length", "tokenizer"):
                if rows.info[what] != first.info[what]:
                    raise ConfigError(
                        f"{name}: {what} is {rows.info[what]!s:.12}, but {self.names[0]} has {first.info[what]!s:.12}; "
                        "sources that are mixed must agree in it"
                    )
        self.source = " + ".join(self.names)
        self.info = {name: first.info[name] for name in ("kind", "length", "vocab", "end", "pad", "tokenizer")}
        self.length, self.chats = first.length, first.chats
        self.count = sum(len(rows) for rows in self.sources)
        self.begins = np.cumsum([0, *(len(rows) for rows in self.sources)], dtype=np.int64)

    def __len__(self) -> int:
        return self.count

    @property
    def counts(self) -> dict[str, int]:
        """What was packed, over all sources."""
        names = {name: None for rows in self.sources for name in rows.counts}
        return {name: sum(rows.counts.get(name, 0) for rows in self.sources) for name in names}

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """Digest and weight of each source, by its name."""
        entries = zip(self.names, self.sources, self.weights, strict=True)
        return {name: {"digest": rows.digest, "weight": weight} for name, rows, weight in entries}

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token drawn (documents only)."""
        return sum(weight * rows.bytes_per_token for weight, rows in zip(self.weights, self.sources, strict=True))

    def start(self, seed: int) -> MixtureCursor:
        return MixtureCursor((0,) * len(self.sources), seed)

    def resumed(self, value: Any) -> MixtureCursor:
        """The cursor that to_json gave. Raises DataError for another."""
        taken = value.get("taken") if isinstance(value, dict) and set(value) == {"taken", "seed"} else None
        numbers = [*taken, value["seed"]] if isinstance(taken, list) else []
        good = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
        if not good or len(numbers) != len(self.sources) + 1:
            raise DataError(
                f"the data cursor is {quoted(value)}; expected rows taken of "
                f"{format_count(len(self.sources), 'source')}"
            )
        return MixtureCursor(tuple(numbers[:-1]), numbers[-1])

    def batch(self, cursor: MixtureCursor, size: int) -> tuple[RowBatch, MixtureCursor]:
        """The next `size` rows and the cursor after them."""
        rows, after = self.indices(cursor, size)
        return self.take(rows), after

    def indices(self, cursor: MixtureCursor, size: int) -> tuple[NDArray[np.int64], MixtureCursor]:
        """Which rows `batch` takes, numbered through the sources."""
        taken = list(cursor.taken)
        numbers = np.empty(size, np.int64)
        for i in range(size):
            at = draw(self.shares, taken)
            epoch, place = divmod(taken[at], len(self.sources[at]))
            row = shuffled(np.array([place]), len(self.sources[at]), cursor.seed + _APART * at, epoch)[0]
            numbers[i] = self.begins[at] + row
            taken[at] += 1
        return numbers, MixtureCursor(tuple(taken), cursor.seed)

    def take(self, rows: NDArray[np.int64]) -> RowBatch:
        """These rows, by number."""
        import torch

        return RowBatch(*(torch.from_numpy(array) for array in self.arrays(rows)))

    def arrays(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """These rows as ids, targets, segments and positions."""
        at = np.searchsorted(self.begins, rows, side="right") - 1
        shape = (len(rows), self.length)
        ids, targets, positions = (np.empty(shape, np.int64) for _ in range(3))
        arrays: tuple[NDArray[Any], ...] = (ids, targets, np.empty(shape, np.int32), positions)
        for source in np.unique(at):
            own = at == source
            for array, part in zip(arrays, self.sources[source].arrays(rows[own] - self.begins[source]), strict=True):
                array[own] = part
        return ids, targets, arrays[2], positions


def draw(shares: Sequence[int], taken: Sequence[int]) -> int:
    """The source of the next row: of those that are due, the one that must come first.

    After n draws source i has given n * share_i rows, to within 1 - 1/(2k - 2) of a row, for k sources. That is the
    least that can be promised (Tijdeman, "The chairman assignment problem", 1980). All in whole numbers.

    Args:
        shares: Of each source, whole numbers.
        taken: Rows that each has given.
    """
    if len(shares) == 1:
        return 0
    total, n, d = sum(shares), sum(taken) + 1, 2 * len(shares) - 2
    best, slack = -1, Fraction(0)
    for i, share in enumerate(shares):
        owed = d * (n * share - taken[i] * total)  # rows, in parts of d * total
        if owed >= total:
            room = Fraction((d - 1) * total - owed, share)
            if best < 0 or room < slack:
                best, slack = i, room
    return best


def _whole(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of the weights, as they are written."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    shared = math.gcd(*whole)
    return [number // shared for number in whole]


Data = Rows | Mixture


@dataclass(frozen=True)
class Draw:
    """A batch that is not made yet: who computes it asks for it; other processes pass it by at no cost."""

    data: Data
    rows: NDArray[np.int64]

    def to(self, device: "str | torch.device") -> RowBatch:
        return self.data.take(self.rows).to(device)


def draws(data: Data, size: int, seed: int, cursor: dict[str, Any] | None) -> Iterator[tuple[Draw, dict[str, Any]]]:
    """Batches of `size` rows from the saved cursor on, without end, each with the cursor behind it."""
    place: Any = data.start(seed) if cursor is None else data.resumed(cursor)
    while True:
        rows, place = data.indices(place, size)
        yield Draw(data, rows), place.to_json()
