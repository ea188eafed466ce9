"""The attention of every head, packed, and some heads with all that they compute with.

Every map is measured as `lapis.inside.attention_map` does; nothing is computed a second way. Leaves out: what heads add
to a word's logit (contributions.py).

Shapes: A places, L layers, H heads, D model dim, E head dim, C columns kept; T = A (A + 1) / 2.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lapis.errors import LapisError
from lapis.inside.attention_map import AttentionMap, maps_of
from lapis.inside.explain.explanation import AttentionViews, HeadDetail, Ranks
from lapis.inside.trace import Anatomy, Trace

PAIRS = 600_000  # weights that a page of five megabytes has room for
NUMBERS = 120_000  # and numbers of queries, keys and values
COLUMNS = 64  # of a state that are drawn


def measure_heads(
    parts: Anatomy, ids: list[int], tokens: list[str], trace: Trace, chosen: Sequence[tuple[int, int]], places: int,
    note: Callable[[str], None],
) -> tuple[AttentionViews, Tensor | None] | None:  # fmt: skip
    """Maps of all heads, and the share of what each layer's heads move that comes from each place, [L, T] where known.

    Args:
        parts: The model.
        ids: The text.
        tokens: Its tokens.
        trace: The stream at the last places.
        chosen: Heads (layer, head) that are kept with their vectors.
        places: How many of the last places are shown, where there is room for them.
        note: Is told what is left out.

    Returns:
        None where the model's attention cannot be looked into, which is noted.
    """
    if parts.states:
        listed = ", ".join(map(str, sorted(parts.states)))
        note(f"No attention maps: layers {listed} are delta nets; what the page calls attention is theirs in these.")
        return None
    if not parts.heads:
        note(f"No attention maps: how many heads {parts.name} has is not known.")
        return None
    room = next(A for A in range(places, 0, -1) if A == 1 or parts.layers * parts.heads * A * (A + 1) // 2 <= PAIRS)
    if room < places:
        note(f"Attention maps show the last {room} tokens, so that {parts.layers * parts.heads:,} heads have room.")
    try:
        keys = [(layer, head) for layer in range(parts.layers) for head in range(parts.heads)]
        maps = maps_of(parts, ids, tokens, keys, room)
    except LapisError as error:
        note(f"No attention maps: {error}.")
        return None
    shape, (rows, columns) = (parts.layers, parts.heads, -1), torch.tril_indices(room, room)
    weights_LHT = torch.stack([_visible(m)[rows, columns] for m in maps]).view(shape)
    moved_NAA = [m.moved_TS for m in maps if m.moved_TS is not None]
    taken_LT = None
    if len(moved_NAA) == len(maps):
        moved_LAA = torch.stack(moved_NAA).view(parts.layers, parts.heads, room, room).sum(1)
        taken_LT = (moved_LAA / moved_LAA.sum(2, keepdim=True).clamp(min=1e-30))[:, rows, columns]
    by_key = dict(zip(keys, maps, strict=True))
    details = [d for key in chosen if (d := _detail(by_key[key], trace))]
    most = max(1, NUMBERS // max(1, room * (3 * _width(details) + 2 * COLUMNS + 3 * room)))
    return AttentionViews(room, details[:most], weights_LHT), taken_LT


def _visible(head: AttentionMap) -> Tensor:
    """The weights, NaN where a mask hides a token."""
    return head.weights_TS.masked_fill(head.scores_TS == -torch.inf, torch.nan)


def _width(details: list[HeadDetail]) -> int:
    return details[0].queries_AE.shape[1] if details else 0


def _detail(head: AttentionMap, trace: Trace) -> HeadDetail | None:
    """What a head works with; None where the model does not show it."""
    if head.query_TE is None or head.key_SE is None or head.value_SE is None or head.moved_TS is None:
        return None
    A = len(head.tokens)
    before = trace.after_LPD[head.layer - 1] if head.layer else trace.embed_PD
    x_AD = before[-A:].double().cpu()
    gram_AA = x_AD @ x_AD.T
    cubic_AD = gram_AA @ x_AD
    q_AE, k_AE, v_AE = (array.double() for array in (head.query_TE, head.key_SE, head.value_SE))
    products_AA, seen_AA = q_AE @ k_AE.T, head.scores_TS > -torch.inf
    # what products are multiplied by, from the scores that were measured
    fit_N = products_AA[seen_AA]
    scale = float((fit_N * head.scores_TS[seen_AA]).sum() / fit_N.square().sum().clamp(min=1e-300))
    weights_AA = head.weights_TS.double()
    matrices = (x_AD, gram_AA, cubic_AD, q_AE, k_AE, v_AE, products_AA, weights_AA, weights_AA @ v_AE)
    ranks = Ranks(*(int(torch.linalg.matrix_rank(matrix)) for matrix in matrices))
    return HeadDetail(
        head.layer, head.head, scale, products_AA * scale, head.moved_TS, q_AE, k_AE, v_AE,
        x_AD[:, :COLUMNS], gram_AA, cubic_AD[:, :COLUMNS], ranks,
    )  # fmt: skip
