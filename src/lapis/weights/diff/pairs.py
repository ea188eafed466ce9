"""Which tensors of two models are compared, and their sums: read once, tile by tile, in any order.

Rows of embedding and head are matched by the token's string where the vocabularies differ. What was seen of a pair is
plain numbers, which another process may have found. Leaves out: what the sums say (diff.py, table.py).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import torch

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError
from lapis.families.base import Part
from lapis.text.tokenizer.vocabulary import Vocabulary, relation
from lapis.weights.diff import measures
from lapis.weights.diff.measures import Sums, mantissa, measure, measure_rows
from lapis.weights.engine.ahead import Reads
from lapis.weights.engine.fp8 import is_number
from lapis.weights.engine.sources import RowsOf, Source, Stored, read_rows
from lapis.weights.engine.tiles import Reader, each, spans
from lapis.weights.matching import embedding_rows, is_vocabulary

NEIGHBORS, _BLOCK = 256, 4096  # new tokens whose neighbor is looked for; rows that are read at a time

Words = tuple[Vocabulary | None, Vocabulary | None]


@dataclass
class TensorPair:
    """Two tensors on their way: where they are read and what was seen of them.

    Attributes:
        tokens: Of each row, where rows are asked for.
        ids: Of each row in a.
        sums: Over all elements.
        rows: Sums of squares of a, b and b - a for each row.
        extra: Figures of the spectrum.
        new: Lines of the tokens that only b has.
    """

    name: str
    part: Part
    a: Source
    b: Source
    tokens: list[str | None] | None = None
    ids: Sequence[int] = ()
    sums: Sums = field(default_factory=Sums)
    rows: list[tuple[float, float, float]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    new: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tiles(self) -> list[tuple[int, int]]:
        return spans(self.a.shape, rows=self.tokens is not None)

    def to_json(self) -> list[Any]:
        """What was seen."""
        return [astuple(self.sums), self.rows, self.extra, self.new]

    def read_json(self, seen: Sequence[Any]) -> None:
        """Takes up what another process has seen."""
        sums, self.rows, self.extra, self.new = seen
        self.sums = Sums(*sums)


@dataclass
class Comparison:
    """Two models, the pairs of their tensors, and what was seen of them.

    Attributes:
        models: a and b.
        words: Their vocabularies.
        pairs: In the order of the table.
        spectra: Whether matrices of blocks are decomposed.
        turn: Reads the directions of the change; and lines about what was left out.
        progress: Called with (done, total) in tiles.
        directions, notes: What `turn` gave.
        bytes_read: By this process, from files.
    """

    models: Mapping[str, Checkpoint]
    words: Words
    pairs: Sequence[TensorPair]
    spectra: bool
    turn: Callable[[], tuple[list[dict[str, Any]], list[str]]]
    progress: Callable[[int, int], None] | None
    directions: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bytes_read: int = 0

    def measure_all(self) -> None:
        """Everything by this process."""
        self.measure(self.pairs)
        self.directions, self.notes = self.turn()

    def measure(self, pairs: Sequence[TensorPair]) -> None:
        """Reads some of the pairs, and fills in what is seen of each.

        Raises:
            CheckpointError: For NaN and Inf.
        """
        partial = [[Sums()] * len(pair.tiles) for pair in pairs]
        by_row: list[list[Any]] = [[None] * len(pair.tiles) for pair in pairs]
        tiles = [(at, number, span) for at, pair in enumerate(pairs) for number, span in enumerate(pair.tiles)]
        lock = threading.Lock()

        def work(reader: Reader, task: tuple[int, int, tuple[int, int]]) -> None:
            at, number, (first, last) = task
            pair = pairs[at]
            tile = reader.read(pair.name, (pair.a, pair.b), first, last, pair.a.shape)
            squares = measure_rows(tile) if pair.tokens is not None else None
            sums = measure(tile, mantissa(pair.b.dtype))
            if not np.isfinite(sums.aa + sums.bb):
                role, source = ("a", pair.a) if not np.isfinite(sums.aa) else ("b", pair.b)
                where = f"{self.models[role].source}: {source.name}"
                raise CheckpointError(f"{where} holds NaN or Inf; a difference would mean nothing")
            with lock:
                partial[at][number], by_row[at][number] = sums, squares

        def reads(task: tuple[int, int, tuple[int, int]]) -> Reads:
            at, _, span = task
            return [(source, *span) for source in (pairs[at].a, pairs[at].b)]

        self.bytes_read += each(tiles, work, self.progress, reads)
        for done, pair in enumerate(pairs):
            pair.sums = sum(partial[done], Sums())
            if pair.tokens is not None:
                pair.rows = np.concatenate([np.zeros((0, 3)), *by_row[done]]).tolist()
                pair.new = _new_rows(self.models["b"], pair, self.words)
            if self.spectra and pair.part.layer is not None and len(pair.a.shape) == 2:
                pair.extra = measures.spectra(pair.a, pair.b)
            if self.progress and self.spectra:
                self.progress(done + 1, len(pairs))


def pair_up(
    one: Checkpoint,
    two: Checkpoint,
    names: dict[str, str],
    words: Words,
    rows: bool,
    notes: list[str],
) -> tuple[list[TensorPair], dict[str, str]]:
    """What is compared, and a line for each pair of tensors whose shapes differ."""
    pairs, mismatched, odd = [], {}, []
    table = embedding_rows(one)
    for name, other in names.items():
        here, there, part = one.info(name), two.info(other), one.part(name)
        if not (is_number(one, name) and is_number(two, other)):
            odd.append(name)
            continue
        of_tokens = is_vocabulary(part) and bool(here.shape) and here.shape[0] == table
        pair = (
            _by_token(one, two, name, other, words, rows) if of_tokens and here.shape[1:] == there.shape[1:] else None
        )
        if pair is not None:
            pairs.append(pair)
        elif here.shape != there.shape:
            shapes = ["x".join(map(str, info.shape)) or "a scalar" for info in (here, there)]
            mismatched[name] = f"{name} is {shapes[0]} in {one.source} and {shapes[1]} in {two.source}"
        else:
            by_row = rows and of_tokens and len(here.shape) > 1
            tokens: list[str | None] | None = [None] * here.shape[0] if by_row else None
            if tokens is not None and (known := words[0] or words[1]):
                for token, i in known.ids.items():
                    if i < len(tokens):
                        tokens[i] = token
            ids = range(here.shape[0]) if by_row else ()
            pairs.append(TensorPair(name, part, Stored("a", one, name), Stored("b", two, other), tokens, ids))
    if odd:
        notes.append(f"not compared, for they hold no floating point numbers: {', '.join(odd[:4])}")
    return pairs, mismatched


def _by_token(
    one: Checkpoint,
    two: Checkpoint,
    name: str,
    other: str,
    words: Words,
    rows: bool,
) -> TensorPair | None:
    """Embedding or head by token string, where the two vocabularies are known and differ; else None."""
    left, right = words
    if left is None or right is None or relation(left, right) == "equal":
        return None
    limit_a, limit_b = one.info(name).shape[0], two.info(other).shape[0]
    shared = sorted(
        (i, right.ids[token], token)
        for token, i in left.ids.items()
        if token in right.ids and i < limit_a and right.ids[token] < limit_b
    )
    a = RowsOf(Stored("a", one, name), [row[0] for row in shared])
    b = RowsOf(Stored("b", two, other), [row[1] for row in shared])
    return TensorPair(
        name, one.part(name), a, b, [row[2] for row in shared] if rows else None, [row[0] for row in shared]
    )


def _new_rows(two: Checkpoint, pair: TensorPair, words: Words) -> list[dict[str, Any]]:
    """One line for each token that only b has: the norm of its row, and the nearest token that both have.

    Neighbors by cosine, of the first NEIGHBORS new tokens; the table is read once more, in blocks.
    """
    left, right = words
    if left is None or right is None:
        return []
    count = two.info(pair.b.name).shape[0]
    new = sorted((i, token) for token, i in right.ids.items() if token not in left.ids and i < count)
    if not new:
        return []
    shared = {i: token for token, i in right.ids.items() if token in left.ids and i < count}
    source = Stored("b", two, pair.b.name)
    values = read_rows(source, [i for i, _ in new]).float()
    units = torch.nn.functional.normalize(values[:NEIGHBORS], dim=1)
    best = torch.full((len(units),), -2.0)
    nearest = torch.full((len(units),), -1)
    for first in range(0, count, _BLOCK):
        ids = [i for i in range(first, min(first + _BLOCK, count)) if i in shared]
        if ids:
            block = torch.nn.functional.normalize(read_rows(source, ids).float(), dim=1)
            cosine, place = (units @ block.T).max(1)
            nearest = torch.where(cosine > best, torch.tensor(ids)[place], nearest)
            best = torch.maximum(best, cosine)
    return [
        {
            "tensor": pair.name,
            "token": right.text(token),
            "id": i,
            "special": token in right.special,
            "kind": right.kind(token),
            "norm": float(values[n].norm()),
            "nearest": right.text(shared[int(nearest[n])]) if n < len(units) and int(nearest[n]) >= 0 else None,
            "nearest_cosine": float(best[n]) if n < len(units) and int(nearest[n]) >= 0 else None,
        }
        for n, (i, token) in enumerate(new)
    ]
