"""The cheap signals, from the tensors alone: how far, in which direction, how many directions, how much above noise.

Leaves out: anything that needs a model (causal.py, gradient.py).
"""

from collections.abc import Callable
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError
from lapis.planning.pieces import Piece
from lapis.weights.diff.diff import diff, unrelated
from lapis.weights.diff.measures import Sums
from lapis.weights.diff.table import DiffTable


def differences(
    base: Checkpoint, chat: Checkpoint, spectra: bool, progress: Callable[[int, int], None] | None = None
) -> DiffTable:
    """The table of differences. Raises CheckpointError where the two are not parent and child, or are the same."""
    table = diff(base, chat, spectra=spectra, progress=progress)
    if unrelated(table):
        raise CheckpointError(
            f"plan: {base.source} and {chat.source}: cosine 0.00 in every layer: these are not parent and child"
        )
    if not any(line.sums.dd for line in table.lines if line.part.layer is not None):
        raise CheckpointError(f"plan: {base.source} and {chat.source} are the same in every layer; there is no choice")
    return table


def tensor_signals(table: DiffTable, piece: Piece) -> dict[str, Any]:
    """Figures of a piece's difference as one vector.

    relative_norm, cosine; energy: its share of the squared length of all blocks' differences; with spectra
    stable_rank, rank_90, snr (of the difference) and weight_snr (of base's matrices, what Spectrum ranks by), as means
    over its matrices.
    """
    mine = [line for line in table.lines if line.name in piece.names]
    sums = sum((line.sums for line in mine), Sums())
    figures = sums.figures()
    total = sum(line.sums.dd for line in table.lines if line.part.layer is not None)
    found = {"relative_norm": figures["relative_norm"], "cosine": figures["cosine"], "energy": sums.dd / total}
    for key in ("stable_rank", "rank_90", "snr", "weight_snr"):
        values = [line.extra[key] for line in mine if line.extra.get(key) is not None]
        if values:
            found[key] = sum(values) / len(values)
    return found
