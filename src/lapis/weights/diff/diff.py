"""What changed between two models, in direction and magnitude: per tensor, layer, component, and embedding row.

Both models are read once, tile by tile, and nothing is built. Leaves out: which tensors are compared and their sums
(pairs.py), several processes (ranks.py), pictures (report/), spectra (measures.py) and lineage (lineage.py).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lapis.errors import CheckpointError
from lapis.text.tokenizer.vocabulary import Vocabulary, open_vocabulary
from lapis.weights.checks import compare_configs, family_notes, missing_tensors, quantization_notes
from lapis.weights.diff.directions import directions as read_directions
from lapis.weights.diff.measures import direction, mantissa, ratio
from lapis.weights.diff.pairs import Comparison, TensorPair, pair_up
from lapis.weights.diff.ranks import compare_together
from lapis.weights.diff.table import DiffTable, Line
from lapis.weights.matching import Model, counterparts, format_problems, open_models
from lapis.wording import format_count


def diff(
    a: Model,
    b: Model,
    rows: bool = False,
    spectra: bool = False,
    directions: bool = False,
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
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
        out: A new folder for the table, as diff.json; several processes that compare the same two models divide the
            work between them there, and a killed run goes on where it stopped.
        overwrite: Replace a folder that is there.
        progress: Called with (done, total) in tiles.

    Raises:
        CheckpointError: Where tensors of the blocks differ in shape, naming all, and for NaN or Inf; with `out` also
            where no tensor points the same way in both, so that there is no difference worth keeping.
        OutputError: Where `out` cannot be written.
    """
    models = open_models({"a": a, "b": b}, "diff")
    one, two = models.values()
    if problems := missing_tensors(models):
        raise CheckpointError(format_problems("diff", problems))
    words = (open_vocabulary(one), open_vocabulary(two))
    names = counterparts(one, two)
    notes = [f"{role}: {note}" for role, model in (("a", one), ("b", two)) for note in model.notes]
    notes += family_notes(one) + quantization_notes((one, two))
    decisive, others = compare_configs("a", one, "b", two)
    notes += [f"{line}: the same weights compute something else" for line in decisive + others]
    pairs, mismatched = pair_up(one, two, names, words, rows, notes)
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
    given = [(pair.name, pair.part, pair.a, pair.b) for pair in pairs]
    comparison = Comparison(
        models, words, pairs, spectra,
        lambda: read_directions(one, two, given, words[1], progress) if directions else ([], []), progress,
    )  # fmt: skip
    if rows and words[0] and words[1] and (gone := len(words[0].ids.keys() - words[1].ids.keys())):
        notes.append(f"{format_count(gone, 'token is', 'tokens are')} only in a")

    def made() -> DiffTable:
        table = DiffTable(
            [Line(pair.name, pair.part, pair.sums, tuple(pair.a.shape), pair.extra) for pair in pairs],
            directions=comparison.directions,
            new_rows=[row for pair in pairs for row in pair.new],
            rows=[line for pair in pairs if pair.tokens is not None for line in _row_lines(pair, words)],
            same_shape=not mismatched,
            only_in_a=sorted(set(one.names) - set(names)),
            only_in_b=sorted(set(two.names) - set(names.values())),
            mismatched=list(mismatched.values()),
            notes=notes + comparison.notes,
            bytes_read=comparison.bytes_read,
        )
        if table.rows:
            table.notes.append(table.rows_finding())
        if table.unrelated():
            table.notes.append("cosine 0.00 in every layer: these are not parent and child")
        return table

    if out is None:
        comparison.measure_all()
        return made()
    settings = {"rows": rows, "spectra": spectra, "directions": directions}
    return compare_together(comparison, settings, made, Path(os.path.abspath(out)), overwrite=overwrite)


def _row_lines(pair: TensorPair, words: tuple[Vocabulary | None, Vocabulary | None]) -> list[dict[str, Any]]:
    """One line per row: its token, its figures, and a robust z-score of how far it moved."""
    relative = np.array([ratio(dd, aa) for aa, _, dd in pair.rows])
    usual = np.median(relative) if len(relative) else 0.0
    spread = 1.4826 * np.median(np.abs(relative - usual)) if len(relative) else 0.0
    if not spread and len(relative):  # most rows did the same: the mean instead (Iglewicz and Hoaglin 1993)
        spread = 1.2533 * np.mean(np.abs(relative[np.isfinite(relative)] - usual))
    floor = 2.0 ** -mantissa(pair.b.dtype) if mantissa(pair.b.dtype) < mantissa(pair.a.dtype) else 0.0  # rounding alone
    known = [vocabulary for vocabulary in words if vocabulary]
    special = frozenset().union(*(vocabulary.special for vocabulary in known)) if known else frozenset()
    lines = []
    assert pair.tokens is not None
    for i, (token, (aa, bb, dd)) in enumerate(zip(pair.tokens, pair.rows, strict=True)):
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
