"""Attention, head by head, in its two readings: a look-up of keys by a query, and a weighted sum of value vectors.

The model keeps no weights; they are computed again from the queries and keys that a hook on AttentionCore sees, so what
is shown is what every family does, with its masks and windows. A large weight on a small value moves nothing, which is
why both are shown (Kobayashi et al. 2020, arXiv:2004.10102). A model of transformers is asked for its own weights.

Shapes: T queries, S keys, H heads, K key heads, E head dim, D model dim.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lapis.errors import ConfigError, LapisError, MissingExtra
from lapis.inside.prompt import Prompt, as_tokenizer, check_length, encode, show, token_text
from lapis.inside.trace import Anatomy, anatomy
from lapis.model.blocks.attention import AttentionCore, softmax_beside
from lapis.model.reading.eager import Attended, record_attention
from lapis.wording import format_count

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go


@dataclass(frozen=True)
class AttentionMap:
    """One head on one prompt, or on its last tokens. All float32; what the mask hides has score -inf and weight 0.

    Attributes:
        tokens: Those that are shown; the first of them stands at the place `first` of the prompt.
        scores_TS: q . k / sqrt(E), the look-up; of a model of transformers that does more to them the logs of the
            weights, which differ from what it does by a constant of each row.
        weights_TS: Their softmax over all keys of the prompt, also those that are not shown.
        moved_TS: The length of what each key adds to the residual stream, | weight x value through the output map |;
            None where the model shows no values.
        query_TE, key_SE, value_SE: What scores and sum are made of; None where the model shows it not, or does more to
            its scores. Heads of one group share keys and values.
    """

    layer: int
    head: int
    tokens: list[str]
    scores_TS: Tensor
    weights_TS: Tensor
    moved_TS: Tensor | None
    query_TE: Tensor | None = None
    key_SE: Tensor | None = None
    value_SE: Tensor | None = None
    first: int = 0

    @property
    def label(self) -> str:
        return f"{self.layer}.{self.head}"

    def lookup(self, position: int = -1) -> list[dict[str, Any]]:
        """What the token at `position` finds: per token that it sees its score, weight, and how far that moves it."""
        t = range(len(self.tokens))[position]
        return [
            {"token": self.tokens[s], "position": self.first + s, "score": self.scores_TS[t, s].item(),
             "weight": self.weights_TS[t, s].item(),
             "moves": None if self.moved_TS is None else self.moved_TS[t, s].item()}
            for s in range(t + 1) if self.scores_TS[t, s] > -torch.inf
        ]  # fmt: skip

    def rows(self, what: str = "weights", last: int = 0) -> dict[str, Any]:
        """A row for report's attention_map, of the last tokens only where `last` is given.

        what: "weights", or "values": each key's share of all that is moved.
        """
        shown_TS = self.weights_TS
        if what != "weights":
            if self.moved_TS is None:
                raise LapisError(f"lens: head {self.label}: this model shows no values; draw its weights")
            shown_TS = self.moved_TS / self.moved_TS.sum(1, keepdim=True)
        seen_TS = self.scores_TS > -torch.inf
        lines = [
            [weight if seen else None for weight, seen in zip(line, sees, strict=True)]
            for line, sees in zip(shown_TS[-last:, -last:].tolist(), seen_TS[-last:, -last:].tolist(), strict=True)
        ]
        return {"head": f"head {self.label}", "weights": lines}

    def plot(self, what: str = "weights") -> "go.Figure":
        """Where each token looks, or with "values" what it takes from there."""
        from lapis.report import plots

        says = "looks" if what == "weights" else "takes from"
        title = f"Head {self.label}: where each token {says}"
        return plots.attention_map([self.rows(what)], [show(token) for token in self.tokens], title)

    def to_pandas(self) -> "pandas.DataFrame":
        """A row per pair of a token and one that it sees."""
        try:
            import pandas
        except ImportError:
            raise MissingExtra("pandas", "data") from None
        return pandas.DataFrame([{"query": t, **row} for t in range(len(self.tokens)) for row in self.lookup(t)])


def attention_maps(
    model: nn.Module, tokenizer: Any, prompt: Prompt, heads: Iterable[tuple[int, int]]
) -> list[AttentionMap]:  # fmt: skip
    """The maps of some heads on one prompt.

    Args:
        model: lapis' own, or a causal one of transformers.
        tokenizer: The model's.
        prompt: A text, a chat, or token ids.
        heads: As (layer, head).

    Raises:
        ConfigError: The model lacks a head.
        LapisError: A layer has no attention, or shows none.
    """
    parts, words = anatomy(model), as_tokenizer(tokenizer)
    ids = encode(words, prompt, len(parts.matrix), parts.name)
    return maps_of(parts, ids, [token_text(i, words) for i in ids], list(heads))


@torch.no_grad()
def maps_of(
    parts: Anatomy, ids: list[int], tokens: list[str], heads: list[tuple[int, int]], last: int = 0
) -> list[AttentionMap]:  # fmt: skip
    """`attention_maps` for a prompt that is encoded; with `last`, maps of that many last tokens, in little memory."""
    check_length(ids, 0, parts.context, parts.name)
    for layer, head in heads:
        if not (0 <= layer < parts.layers and 0 <= head < parts.heads):
            raise ConfigError(
                f"lens: there is no head {layer}.{head}; "
                f"{format_count(parts.layers, 'layer has', 'layers have')} {parts.heads} each"
            )
        if layer in parts.states:
            others = ", ".join(str(i) for i in range(parts.layers) if i not in parts.states)
            raise LapisError(
                f"lens: layer {layer} of {parts.name} is a delta net, which has a state and no attention; choose "
                f"one of {others}"
            )
    ids_BT = torch.tensor([ids], device=parts.matrix.device)
    if not parts.own:
        attended = record_attention(parts.model, ids_BT, last)
        return [_foreign(parts, tokens[-last:], key, attended) for key in heads]
    maps: dict[tuple[int, int], AttentionMap] = {}

    def watch(layer: int, of_layer: list[int]) -> Any:
        def hook(core: nn.Module, args: tuple[Any, ...], _out: Tensor) -> None:
            q_BHTE, k_BKSE, v_BKSE, mask, causal = args
            for head in of_layer:
                key = layer, head
                maps[key] = _one(parts, tokens[-last:], key, core, q_BHTE, k_BKSE, v_BKSE, mask, causal)

        return parts.blocks[layer].attn.core.register_forward_hook(hook)  # type: ignore[union-attr]

    layers = sorted({layer for layer, _ in heads})
    handles = [watch(layer, sorted({h for at, h in heads if at == layer})) for layer in layers]
    try:
        parts.run(ids_BT, None, None, (ids_BT[0, :1] * 0, ids_BT[0, :1] * 0))
    finally:
        for handle in handles:
            handle.remove()
    return [maps[key] for key in heads]


def _one(
    parts: Anatomy, tokens: list[str], key: tuple[int, int], core: nn.Module, q_BHTE: Tensor, k_BKSE: Tensor,
    v_BKSE: Tensor, mask: Tensor | None, causal: bool,
) -> AttentionMap:  # fmt: skip
    _, head = key
    assert isinstance(core, AttentionCore)
    T, S = len(tokens), k_BKSE.shape[2]
    kv, shown = head * k_BKSE.shape[1] // q_BHTE.shape[1], slice(S - T, S)
    q_11TE, k_11SE = q_BHTE[:1, head : head + 1, shown], k_BKSE[:1, kv : kv + 1]
    scores_TS = core.scores(q_11TE, k_11SE)[0, 0]
    hidden_TS = torch.ones_like(scores_TS, dtype=torch.bool).triu(1 + S - T) if causal else scores_TS.isnan()
    if mask is not None:
        rows_TS = mask[0, 0].expand(S, S)[shown]
        hidden_TS = hidden_TS | (rows_TS < torch.finfo(mask.dtype).min / 2)
    scores_TS = scores_TS.masked_fill(hidden_TS, -torch.inf)
    sinks = None if core.sinks is None else core.sinks[head : head + 1]
    weights_TS, v_SE = softmax_beside(scores_TS[None, None], sinks)[0, 0][:, shown], v_BKSE[0, kv, shown]
    gated = getattr(parts.attention[key[0]], "gate", None) is not None  # behind which no head's length is told
    moved_TS = None if gated else weights_TS * _lengths(parts, key, v_SE)
    made_of = (
        (None, None) if core.cap else (q_11TE[0, 0], k_11SE[0, 0, shown])
    )  # capped scores are no products of these
    return _small(key, tokens, S, scores_TS[:, shown], weights_TS, moved_TS, *made_of, v_SE)


def _small(key: tuple[int, int], tokens: list[str], length: int, *arrays: Tensor | None) -> AttentionMap:
    """A map of copies, so that none of its arrays keeps a large one alive."""
    scores_TS, weights_TS, *others = (a if a is None else a.to("cpu", torch.float32, copy=True) for a in arrays)
    assert scores_TS is not None and weights_TS is not None
    moved_TS, query_TE, key_SE, value_SE = others
    first = length - len(tokens)
    return AttentionMap(*key, tokens, scores_TS, weights_TS, moved_TS, query_TE, key_SE, value_SE, first)


def _lengths(parts: Anatomy, key: tuple[int, int], v_SE: Tensor) -> Tensor:
    """How long each value of a head is once the output map has put it onto the stream, [S] float32."""
    (layer, head), (S, E) = key, v_SE.shape
    mixer, alone_SI = parts.mixers[layer], v_SE.new_zeros(S, parts.heads * E)
    alone_SI[:, head * E : (head + 1) * E] = v_SE
    added_SD: Tensor = mixer(alone_SI) - mixer(alone_SI[:1] * 0)
    lengths_S: Tensor = added_SD.float().norm(dim=1)
    return lengths_S


def _foreign(
    parts: Anatomy, tokens: list[str], key: tuple[int, int], attended: Mapping[int, Attended]
) -> AttentionMap:  # fmt: skip
    """A map of a model of transformers, from what its own attention gave."""
    layer, head = key
    if layer not in attended:
        raise LapisError(f"lens: layer {layer} of {parts.name} shows no attention weights; choose another layer")
    seen = attended[layer]
    weights_TS = seen.weights_BHTS[0, head].float()
    T, S = weights_TS.shape
    shown = slice(S - T, S)
    hidden_TS = torch.ones_like(weights_TS, dtype=torch.bool).triu(1 + S - T)
    if seen.mask is not None:
        hidden_TS = hidden_TS | (seen.mask[0, 0, :, :S] < torch.finfo(seen.mask.dtype).min / 2)
    hidden_TS = hidden_TS | (weights_TS == 0)
    scores_TS, q_TE, k_SE, v_SE, moved_TS = weights_TS.log(), None, None, None, None
    if seen.q_BHTE is not None and seen.k_BKSE is not None:
        kv = head * seen.k_BKSE.shape[1] // parts.heads
        q_TE, k_SE = seen.q_BHTE[0, head], seen.k_BKSE[0, kv]
        plain_TS = ((q_TE @ k_SE.T).float() * seen.scale).masked_fill(hidden_TS, -torch.inf)
        allowed = 8 * torch.finfo(seen.weights_BHTS.dtype).eps
        if bool(((plain_TS.softmax(1) - weights_TS).abs() <= allowed).all()):
            scores_TS, k_SE = plain_TS, k_SE[shown]
        else:
            q_TE, k_SE = None, None
    if seen.v_BKSE is not None and parts.mixers:
        v_SE = seen.v_BKSE[0, head * seen.v_BKSE.shape[1] // parts.heads, shown]
        moved_TS = weights_TS[:, shown] * _lengths(parts, key, v_SE)
    scores_TS = scores_TS.masked_fill(hidden_TS, -torch.inf)
    return _small(key, tokens, S, scores_TS[:, shown], weights_TS[:, shown], moved_TS, q_TE, k_SE, v_SE)
