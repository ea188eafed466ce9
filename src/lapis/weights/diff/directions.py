"""The directions of a change, read as tokens: singular vectors of b - a, matrix by matrix, through head and embedding.

A matrix that writes to the residual stream (the output of attention and MLP) writes along its left singular vectors,
which the head reads; one that reads from it listens to its right ones, which are compared with the embedding (Millidge
and Black 2022, "The singular value decompositions of transformer weight matrices are highly interpretable"). A
singular vector has no sign, so the tokens at both ends are shown. Norms are left out: rows of head and embedding are
read as they are.

Shapes: O outputs, I inputs, K directions, R directions of all matrices, D model dim, v rows of a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError
from lapis.families.base import Part
from lapis.text.tokenizer.vocabulary import Vocabulary
from lapis.weights.delta.codes.factors import low_rank
from lapis.weights.diff.measures import tiles_of
from lapis.weights.engine.sources import Source, Stored
from lapis.weights.matching import is_vocabulary

DIRECTIONS = 2  # of each matrix
TOP = 6  # tokens at each end
BLOCK = 4096  # rows of a token table that are read at a time


@dataclass(frozen=True)
class Direction:
    """One singular direction of a matrix's change. vector_D: of length 1, in the residual stream.

    side: "writes" (a left singular vector, read by the head) or "reads" (a right one, beside the embedding). share: its
    part of the squared length of the change.
    """

    name: str
    part: Part
    side: str
    number: int
    share: float
    vector_D: Tensor


def directions(
    one: Checkpoint,
    two: Checkpoint,
    pairs: Sequence[tuple[str, Part, Source, Source]],
    words: Vocabulary | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The first directions of every matrix of the blocks as rows for tables and JSON, and notes.

    A row: name, layer, component, side, number (from 0), share, and at either end of the direction, `one_end` and
    `other_end`, the tokens: (token, id, product with the vector).

    Args:
        one: The model to start from.
        two: The other, whose head, embedding and tokens read the directions.
        pairs: Tensors that both have: name, part, and both sources.
        words: The second model's.
        progress: Called with (matrices done, matrices in all).

    Raises:
        CheckpointError: The second model has no table of tokens.
    """
    tables = _tables(two)
    width = tables["reads"].shape[1]
    chosen: list[tuple[str, Part, Source, Source, str, bool]] = []
    unclear = []
    for name, part, a, b in pairs:
        if part.layer is None or part.kind != "weight" or len(a.shape) != 2:
            continue
        known = _side(one, name, part, tuple(a.shape), width)
        if known is None:
            unclear.append(part.component)
        else:
            chosen.append((name, part, a, b, *known))
    rows: list[Direction] = []
    for done, (name, part, a, b, side, turned) in enumerate(chosen, 1):
        rows += _of_matrix(name, part, a, b, side, turned)
        if progress:
            progress(done, len(chosen))
    lines = []
    for side, table in tables.items():
        lines += _read(two, table, [row for row in rows if row.side == side], words)
    order = {name: place for place, (name, *_) in enumerate(chosen)}
    lines.sort(key=lambda line: (line["layer"], order[line["name"]], line["number"]))
    notes = []
    if unclear:
        names = ", ".join(list(dict.fromkeys(unclear))[:4])
        notes.append(f"no directions of {names}: which side of them is the residual stream is not known")
    return lines, notes


def _tables(model: Checkpoint) -> dict[str, Stored]:
    """The token tables that read what is written, and that is beside what is read: the head and the embedding."""
    of = {part.component: name for name in model.names if is_vocabulary(part := model.part(name))
          and part.kind == "weight" and len(model.info(name).shape) == 2}  # fmt: skip
    if "embed" not in of:
        raise CheckpointError(f"diff: {model.source} has no embedding that directions could be read by")
    return {"writes": Stored("b", model, of.get("head", of["embed"])), "reads": Stored("b", model, of["embed"])}


def _side(model: Checkpoint, name: str, part: Part, shape: tuple[int, ...], width: int) -> tuple[str, bool] | None:
    """Whether a matrix writes or reads, and whether it lies with its inputs first; None where that is not known."""
    matched = model.family.match(name) if model.family else None
    if matched is not None:
        turned = matched[0].transform.transposed
        outputs, inputs = shape[::-1] if turned else shape
        side = "writes" if part.component.endswith(("attn.o", ".down")) else "reads"
        return (side, turned) if (outputs if side == "writes" else inputs) == width else None
    if (shape[0] == width) == (shape[1] == width):
        return None
    return ("writes" if shape[0] == width else "reads"), False


def _of_matrix(name: str, part: Part, a: Source, b: Source, side: str, turned: bool) -> list[Direction]:
    delta = torch.empty(*a.shape)
    for first, last, one, two in tiles_of(a, b):
        delta.view(-1)[first:last] = two.sub_(one)
    energy = float(delta.double().square().sum())
    if not energy:
        return []
    left_OK, right_KI = low_rank(delta.T.contiguous() if turned else delta, DIRECTIONS, name)
    squares_K = left_OK.double().norm(dim=0).square() * right_KI.double().norm(dim=1).square()
    vectors_KD = torch.nn.functional.normalize(left_OK.T if side == "writes" else right_KI, dim=1)
    return [
        Direction(name, part, side, k, float(squares_K[k]) / energy, vectors_KD[k])
        for k in range(len(vectors_KD)) if squares_K[k]
    ]  # fmt: skip


def _read(
    model: Checkpoint, table: Stored, rows: Sequence[Direction], words: Vocabulary | None
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one side with the tokens at both ends; the table is read once for all of them."""
    if not rows:
        return []
    vectors_RD = torch.stack([row.vector_D for row in rows])
    best: list[tuple[Tensor, Tensor]] = [(torch.empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.long))] * 2
    count, width = table.shape
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        block_vD = torch.empty(last - first, width, dtype=table.dtype)
        table.read(first * width, last * width, block_vD.view(-1).view(torch.uint8).numpy().data)
        scores_Rv = vectors_RD @ block_vD.float().T
        ids_Rv = torch.arange(first, last).expand(len(rows), -1)
        for end, sign in enumerate((1, -1)):
            scores = torch.cat((best[end][0], sign * scores_Rv), 1)
            ids = torch.cat((best[end][1], ids_Rv), 1)
            values, places = scores.topk(min(TOP, scores.shape[1]))
            best[end] = values, ids.gather(1, places)
    names = {} if words is None else {index: words.text(token) for token, index in words.ids.items()}

    def tokens(end: int, row: int) -> list[dict[str, Any]]:
        values, ids = (x[row].tolist() for x in best[end])
        return [{"token": names.get(i, f"<row {i}>"), "id": i, "product": v} for v, i in zip(values, ids, strict=True)]

    return [
        {"name": row.name, "layer": row.part.layer, "component": row.part.component, "side": row.side,
         "number": row.number, "share": row.share, "one_end": tokens(0, i), "other_end": tokens(1, i)}
        for i, row in enumerate(rows)
    ]  # fmt: skip
