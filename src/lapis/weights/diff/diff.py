"""What changed between two models, in direction and magnitude: per tensor, layer, component, and embedding row.

Both models are read once, tile by tile, and nothing is built. Rows of embedding and head are matched by the token's
string where the vocabularies differ. Leaves out: pictures (report/), spectra (measures.py) and lineage (lineage.py).
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError
from lapis.families.base import Part
from lapis.text.tokenizer.vocabulary import Vocabulary, open_vocabulary, relation
from lapis.weights.checks import compare_configs, family_notes, missing_tensors
from lapis.weights.diff import measures
from lapis.weights.diff.directions import directions as read_directions
from lapis.weights.diff.measures import Sums, direction, mantissa, measure, measure_rows, ratio
from lapis.weights.diff.table import DiffTable, Line
from lapis.weights.engine.ahead import Reads
from lapis.weights.engine.fp8 import is_number
from lapis.weights.engine.sources import RowsOf, Source, Stored, read_rows
from lapis.weights.engine.tiles import Reader, each, spans
from lapis.weights.matching import (
    Model,
    counterparts,
    embedding_rows,
    format_problems,
    is_vocabulary,
    open_models,
)

NEIGHBORS, _BLOCK = 256, 4096  # new tokens whose neighbor is looked for; rows that are read at a time
UNRELATED = 0.05  # a fine-tune's tensors have cosines near 1 with its parent's; unrelated ones near 0


@dataclass
class _Pair:
    """Two tensors on their way: where they are read and what was seen so far."""

    name: str
    part: Part
    a: Source
    b: Source
    tokens: list[str | None] | None = None  # of each row, where rows are asked for
    ids: Sequence[int] = ()
    partial: list[Sums] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tiles = spans(self.a.shape, rows=self.tokens is not None)
        self.partial, self.rows = [Sums()] * len(self.tiles), [None] * len(self.tiles)


def diff(
    a: Model,
    b: Model,
    rows: bool = False,
    spectra: bool = False,
    directions: bool = False,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> DiffTable:
    """The differences b - a of every tensor that both models have, as a table.

    Args:
        a: A folder, a model of the hub, or one that was opened; base, where the two are base and fine-tune.
        b: The other.
        rows: Also row by row for embedding and head, with the token of each.
        spectra: Also stable rank, the rank that holds 90 % of the energy, and SNR, for the matrices of the blocks;
            takes far longer.
        directions: Also the first singular directions of what changed in these matrices, as tokens; takes longer, too.
        progress: Called with (done, total) in tiles.

    Raises:
        CheckpointError: Where tensors of the blocks differ in shape, naming all, and for NaN or Inf.
    """
    models = open_models({"a": a, "b": b}, "diff")
    one, two = models.values()
    if problems := missing_tensors(models):
        raise CheckpointError(format_problems("diff", problems))
    words = (open_vocabulary(one), open_vocabulary(two))
    names = counterparts(one, two)
    notes = [f"{role}: {note}" for role, model in (("a", one), ("b", two)) for note in model.notes]
    notes += family_notes(one)
    decisive, others = compare_configs("a", one, "b", two)
    notes += [f"{line}: the same weights compute something else" for line in decisive + others]
    pairs, mismatched = _pair_up(one, two, names, words, rows, notes)
    in_blocks = [text for name, text in mismatched.items() if one.part(name).layer is not None]
    if in_blocks or not pairs:
        problems = list(mismatched.values()) or ["no tensor of one has its like in the other"]
        raise CheckpointError(format_problems("diff", problems) + "; these are not versions of one model")
    coarser = {pair.a.dtype for pair in pairs if mantissa(pair.a.dtype) < mantissa(pair.b.dtype)}
    for dtype in sorted(coarser, key=str):
        notes.append(
            f"a is stored in {str(dtype).removeprefix('torch.')}, more coarsely than b: if it is a rounded copy of "
            f"what b was made from, about {0.4 * 2.0 ** -mantissa(dtype):.1e} of the length is that rounding"
        )
    lock = threading.Lock()

    def work(reader: Reader, task: tuple[_Pair, int]) -> None:
        pair, number = task
        first, last = pair.tiles[number]
        tile = reader.read(pair.name, (pair.a, pair.b), first, last, pair.a.shape)
        by_row = measure_rows(tile) if pair.tokens is not None else None
        sums = measure(tile, mantissa(pair.b.dtype))
        if not np.isfinite(sums.aa + sums.bb):
            role, source = ("a", pair.a) if not np.isfinite(sums.aa) else ("b", pair.b)
            model = one if role == "a" else two
            raise CheckpointError(f"{model.source}: {source.name} holds NaN or Inf; a difference would mean nothing")
        with lock:
            pair.partial[number], pair.rows[number] = sums, by_row

    def reads(task: tuple[_Pair, int]) -> Reads:
        pair, number = task
        return [(source, *pair.tiles[number]) for source in (pair.a, pair.b)]

    read = each([(pair, i) for pair in pairs for i in range(len(pair.tiles))], work, progress, reads)
    lines = []
    for done, pair in enumerate(pairs):
        decompose = spectra and pair.part.layer is not None and len(pair.a.shape) == 2
        extra = measures.spectra(pair.a, pair.b) if decompose else {}
        lines.append(Line(pair.name, pair.part, sum(pair.partial, Sums()), tuple(pair.a.shape), extra))
        if progress and spectra:
            progress(done + 1, len(pairs))
    if rows and words[0] and words[1] and (gone := len(words[0].ids.keys() - words[1].ids.keys())):
        notes.append(f"{gone:,} tokens are only in a")
    leading: list[dict[str, Any]] = []
    if directions:
        leading, unclear = read_directions(one, two, [(p.name, p.part, p.a, p.b) for p in pairs], words[1], progress)
        notes += unclear
    table = DiffTable(
        lines,
        directions=leading,
        new_rows=[row for pair in pairs if pair.tokens is not None for row in _new_rows(two, pair, words)],
        rows=[line for pair in pairs if pair.tokens is not None for line in _row_lines(pair, words)],
        same_shape=not mismatched,
        only_in_a=sorted(set(one.names) - set(names)),
        only_in_b=sorted(set(two.names) - set(names.values())),
        mismatched=list(mismatched.values()),
        notes=notes,
        bytes_read=read,
    )
    if table.rows:
        notes.append(table.rows_finding())
    if unrelated(table):
        notes.append("cosine 0.00 in every layer: these are not parent and child")
    return table


def unrelated(table: DiffTable) -> bool:
    """Whether no matrix of any block points the same way in both models."""
    cosines = [abs(x["cosine"]) for x in table.tensors if x["layer"] is not None and len(x["shape"]) > 1]
    return bool(cosines) and max(cosines) < UNRELATED


def _pair_up(
    one: Checkpoint,
    two: Checkpoint,
    names: dict[str, str],
    words: tuple[Vocabulary | None, Vocabulary | None],
    rows: bool,
    notes: list[str],
) -> tuple[list[_Pair], dict[str, str]]:
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
            pairs.append(_Pair(name, part, Stored("a", one, name), Stored("b", two, other), tokens, ids))
    if odd:
        notes.append(f"not compared, for they hold no floating point numbers: {', '.join(odd[:4])}")
    return pairs, mismatched


def _by_token(
    one: Checkpoint,
    two: Checkpoint,
    name: str,
    other: str,
    words: tuple[Vocabulary | None, Vocabulary | None],
    rows: bool,
) -> _Pair | None:
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
    return _Pair(name, one.part(name), a, b, [row[2] for row in shared] if rows else None, [row[0] for row in shared])


def _new_rows(two: Checkpoint, pair: _Pair, words: tuple[Vocabulary | None, Vocabulary | None]) -> list[dict[str, Any]]:
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


def _row_lines(pair: _Pair, words: tuple[Vocabulary | None, Vocabulary | None]) -> list[dict[str, Any]]:
    """One line per row: its token, its figures, and a robust z-score of how far it moved."""
    squares = np.concatenate([part for part in pair.rows if part is not None] or [np.zeros((0, 3))])
    relative = np.array([ratio(dd, aa) for aa, _, dd in squares])
    usual = np.median(relative) if len(relative) else 0.0
    spread = 1.4826 * np.median(np.abs(relative - usual)) if len(relative) else 0.0
    if not spread and len(relative):  # most rows did the same: the mean instead (Iglewicz and Hoaglin 1993)
        spread = 1.2533 * np.mean(np.abs(relative[np.isfinite(relative)] - usual))
    floor = 2.0 ** -mantissa(pair.b.dtype) if mantissa(pair.b.dtype) < mantissa(pair.a.dtype) else 0.0  # rounding alone
    known = [vocabulary for vocabulary in words if vocabulary]
    special = frozenset().union(*(vocabulary.special for vocabulary in known)) if known else frozenset()
    lines = []
    assert pair.tokens is not None
    for i, (token, (aa, bb, dd)) in enumerate(zip(pair.tokens, squares.tolist(), strict=True)):
        text = "" if token is None else known[0].text(token)
        line = {
            "tensor": pair.name,
            "token": text,
            "id": int(pair.ids[i]),
            "special": token in special,
            "kind": "padding" if token is None else known[0].kind(token),
            "relative_norm": float(relative[i]),
            "moved": bool(relative[i] > floor),
            "cosine": direction(aa, bb, dd)[0],
            "norm_a": aa**0.5,
            "z": float((relative[i] - usual) / spread) if spread else 0.0,
        }
        lines.append(line | {"squares": (aa, bb, dd)})
    return lines
