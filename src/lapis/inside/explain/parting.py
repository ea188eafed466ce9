"""Two models on one text: where they part, token by token and layer by layer.

Shapes: P places, N states of a place, D model dim, V tokens that both have.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lapis.inside.explain.explanation import LayerGrid, Parting
from lapis.inside.explain.stream import read_grid
from lapis.inside.lens.logit_lens import Seen, best_anywhere, look, see
from lapis.inside.prompt import Prompt, TrackedWord, as_tokenizer, encode
from lapis.inside.trace import Trace, anatomy


def compare(
    seen: Seen, grid: LayerGrid, text: Prompt, words: Sequence[TrackedWord],
    other: tuple[nn.Module, Any, str], named: int,
) -> Parting:  # fmt: skip
    """The other model on the same text, beside what was seen of the first.

    Args:
        seen: The first model at the last places.
        grid: What its states would say.
        text: The text, which the other reads with its own tokenizer.
        words: What is tracked in the first.
        other: The other model, its tokenizer, and its name.
        named: Tokens named for each state.
    """
    parts, tokenizer = anatomy(other[0], other[2]), as_tokenizer(other[1])
    ids = encode(tokenizer, text, len(parts.matrix), parts.name)
    same = ids == seen.ids
    there = see(parts, tokenizer, ids, list(words) if same else [], len(seen.positions) if same else 1)
    trace = look(there, list(words) if same else best_anywhere(there), True, top=named, halves=False)
    theirs = read_grid(trace)
    texts = {index: token for reading in trace.grid for token, index, _ in reading.top}
    if not same:
        return Parting(parts.name, False, theirs, texts, None, 0, [], None)
    everything = slice(0, len(seen.positions))
    one_PV, other_PV = seen.trace.own(everything).double().cpu(), there.trace.own(everything).double().cpu()
    V = min(one_PV.shape[1], other_PV.shape[1])
    one_PV, other_PV = one_PV[:, :V].log_softmax(1), other_PV[:, :V].log_softmax(1)
    kl_P = (one_PV.exp() * (one_PV - other_PV)).sum(1).clamp(min=0)
    pairs = zip(grid.ids_PNK, theirs.ids_PNK, strict=True)
    parted = [_parted([best[0] for best in a], [best[0] for best in b]) for a, b in pairs]
    return Parting(parts.name, True, theirs, texts, kl_P, V, parted, _distance(seen.trace, there.trace))


def _parted(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first state from which on the best tokens differ, up to the end."""
    first = None
    if len(one) == len(other):
        for row in range(len(one) - 1, -1, -1):
            if one[row] == other[row]:
                break
            first = row
    return first


def _distance(one: Trace, other: Trace) -> Tensor | None:
    """| other - one | / | one |, [P, N]."""
    if len(one.after_LPD) != len(other.after_LPD) or one.embed_PD.shape != other.embed_PD.shape:
        return None
    a_PND, b_PND = (torch.stack([t.embed_PD, *t.after_LPD], 1).double().cpu() for t in (one, other))
    distance_PN: Tensor = (b_PND - a_PND).norm(dim=2) / a_PND.norm(dim=2).clamp(min=1e-30)
    return distance_PN
