"""What one pass left at each place: lengths on the stream, what every state would say, the shares of a word's logit.

Shapes: P places, N states of a place (the embedding, then each layer), L layers, H heads, K tokens named, D model dim,
V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lapis.inside.explain.explanation import Build, Ending, LayerGrid, Stream, WordShares
from lapis.inside.lens.logit_lens import Seen
from lapis.inside.lens.table import LensTrace
from lapis.inside.trace import Anatomy
from lapis.model.size import measure
from lapis.model.transformer import Transformer

NUMBERS = 24  # of a vector that are shown
NAMED = 256  # tokens of the last place that have a name; those behind them are counted


def describe_build(parts: Anatomy) -> Build:
    """What a model is made of, from its config; of another library's model what its parts show."""
    V, D = parts.matrix.shape
    if isinstance(parts.model, Transformer):
        c = parts.model.config
        windows = [c.window if c.windowed(layer) else None for layer in range(c.layers)]
        return Build(
            c.family, c.layers, c.dim, c.vocab, c.context, c.heads, c.kv_heads, c.head_dim, c.ffn_dim, c.positions,
            c.tied, measure(c).total, windows,
        )  # fmt: skip
    config: Any = parts.model.config
    parameters = sum(p.numel() for p in parts.model.parameters())
    family, kv_heads = str(getattr(config, "model_type", "")), getattr(config, "num_key_value_heads", None)
    return Build(family, parts.layers, D, V, parts.context, parts.heads or None, kv_heads or parts.heads or None,
                 parameters=parameters)  # fmt: skip


def measure_stream(seen: Seen, taken_LT: Tensor | None) -> Stream:
    """Lengths of states and of what is added to them."""
    trace, embed = seen.trace, getattr(seen.parts.model, "embed", None)
    table = getattr(embed, "position", None)
    positions_P = None if table is None else table.weight[seen.positions].norm(dim=1)
    states = torch.stack([trace.embed_PD, *trace.after_LPD], 1)
    added = [torch.stack(a, 1).norm(dim=2) if trace.adds_up and a else None for a in _added(seen)]
    return Stream(trace.embed_PD[:, :NUMBERS], positions_P, states.norm(dim=2), added[0], added[1], taken_LT)


def _added(seen: Seen) -> tuple[list[Tensor], list[Tensor]]:
    return seen.trace.attention_LPD, seen.trace.mlp_LPD


def read_grid(trace: LensTrace) -> LayerGrid:
    """The readings of a lens as arrays, place by place."""
    by_place: dict[int, list[Any]] = {}
    for reading in trace.grid:
        by_place.setdefault(reading.position, []).append(reading)
    rows = [by_place[place] for place in sorted(by_place)]
    ranked = {word: [[r.ranks.get(word) for r in row] for row in rows] for word in trace.leading()}
    return LayerGrid(
        [[[i for _, i, _ in r.top] for r in row] for row in rows],
        torch.tensor([[[share for _, _, share in r.top] for r in row] for row in rows]),
        torch.tensor([[r.entropy for r in row] for row in rows]),
        torch.tensor([[r.kl_to_final for r in row] for row in rows]),
        {word: ranks for word, ranks in ranked.items() if all(None not in row for row in ranks)},
    )


def share_words(parts: Anatomy, trace: LensTrace, words: Sequence[str]) -> list[WordShares]:
    """Contributions as arrays; of words for which they were measured."""
    result = []
    for word in words:
        mine = [c for c in trace.contributions if c.word == word]
        if not mine:
            continue
        heads = 0 if parts.states else max((c.head + 1 for c in mine if c.head is not None), default=0)
        heads_LH = torch.zeros(parts.layers, heads, dtype=torch.float64)
        attention_L, mlp_L = torch.zeros(2, parts.layers, dtype=torch.float64)
        rest: dict[str, float] = {}
        for c in mine:
            if c.layer is None:
                rest[c.part] = c.logit
            elif c.part == "mlp":
                mlp_L[c.layer] = c.logit
            elif c.head is None or not heads:
                attention_L[c.layer] += c.logit
            else:
                heads_LH[c.layer, c.head] = c.logit
        total = sum(c.logit for c in mine)
        result.append(WordShares(word, mine[0].token, total, heads_LH, attention_L, mlp_L, rest))
    return result


def rank_ending(own_PV: Tensor, ids: Sequence[int]) -> Ending:
    """The last place's logits in order, and how expected each token of the text was.

    Args:
        own_PV: The model's logits at the last places.
        ids: The tokens at these places.
    """
    own_PV = own_PV.float().cpu()
    logits_V, order_V = own_PV[-1].sort(descending=True, stable=True)
    actual = []
    for row_V, index in zip(own_PV[:-1], ids[1:], strict=True):
        rank = 1 + int((row_V > row_V[index]).sum())
        actual.append((rank, float(row_V.double().log_softmax(0)[index].exp())))
    return Ending(logits_V, order_V[:NAMED].tolist(), actual)
