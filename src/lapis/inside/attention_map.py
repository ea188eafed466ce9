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
from lapis.model.blocks.attention import AttentionCore
from lapis.model.reading.eager import Attended, record_attention

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go


@dataclass(frozen=True)
class AttentionMap:
    """One head on one prompt. All [T, S], float32; what the mask hides has score -inf and weight 0.

    scores_TS: q . k / sqrt(E), the look-up; of a model of transformers that does more to them the logs of the weights,
    which differ from what it does by a constant of each row. weights_TS: their softmax over the keys. moved_TS: the
    length of what each key adds to the residual stream, | weight x value through the output map |; None where the model
    shows no values.
    """

    layer: int
    head: int
    tokens: list[str]
    scores_TS: Tensor
    weights_TS: Tensor
    moved_TS: Tensor | None

    @property
    def label(self) -> str:
        return f"{self.layer}.{self.head}"

    def lookup(self, position: int = -1) -> list[dict[str, Any]]:
        """What the token at `position` finds: per token that it sees its score, weight, and how far that moves it."""
        t = range(len(self.tokens))[position]
        return [
            {"token": self.tokens[s], "position": s, "score": self.scores_TS[t, s].item(),
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
def maps_of(parts: Anatomy, ids: list[int], tokens: list[str], heads: list[tuple[int, int]]) -> list[AttentionMap]:
    """`attention_maps` for a prompt that is encoded."""
    check_length(ids, 0, parts.context, parts.name)
    for layer, head in heads:
        if not (0 <= layer < parts.layers and 0 <= head < parts.heads):
            raise ConfigError(f"lens: there is no head {layer}.{head}; {parts.layers} layers have {parts.heads} each")
    ids_BT = torch.tensor([ids], device=parts.matrix.device)
    if not parts.own:
        attended = record_attention(parts.model, ids_BT)
        return [_foreign(parts, tokens, key, attended) for key in heads]
    maps: dict[tuple[int, int], AttentionMap] = {}

    def watch(layer: int, of_layer: list[int]) -> Any:
        def hook(core: nn.Module, args: tuple[Any, ...], _out: Tensor) -> None:
            q_BHTE, k_BKSE, v_BKSE, mask, causal = args
            for head in of_layer:
                maps[layer, head] = _one(parts, tokens, (layer, head), core, q_BHTE, k_BKSE, v_BKSE, mask, causal)

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
    layer, head = key
    assert isinstance(core, AttentionCore)
    kv = head * k_BKSE.shape[1] // q_BHTE.shape[1]
    q_11TE, k_11SE = q_BHTE[:1, head : head + 1], k_BKSE[:1, kv : kv + 1]
    weights_TS = core.weights(q_11TE, k_11SE, mask, causal)[0, 0]
    scores_TS = core.scores(q_11TE, k_11SE)[0, 0]
    hidden_TS = torch.ones_like(scores_TS, dtype=torch.bool).triu(1) if causal else scores_TS.isnan()
    if mask is not None:
        hidden_TS = hidden_TS | (mask[0, 0] < torch.finfo(mask.dtype).min / 2)
    moved_TS = weights_TS * _lengths(parts, key, v_BKSE[0, kv])
    return AttentionMap(
        layer, head, tokens, scores_TS.masked_fill(hidden_TS, -torch.inf).cpu(), weights_TS.cpu(), moved_TS.cpu()
    )


def _lengths(parts: Anatomy, key: tuple[int, int], v_SE: Tensor) -> Tensor:
    """How long each value of a head is once the output map has put it onto the stream, [S] float32."""
    (layer, head), (S, E) = key, v_SE.shape
    mixer, alone_SI = parts.mixers[layer], v_SE.new_zeros(S, parts.heads * E)
    alone_SI[:, head * E : (head + 1) * E] = v_SE
    added_SD: Tensor = mixer(alone_SI) - mixer(alone_SI[:1] * 0)
    return added_SD.float().norm(dim=1)


def _foreign(
    parts: Anatomy, tokens: list[str], key: tuple[int, int], attended: Mapping[int, Attended]
) -> AttentionMap:  # fmt: skip
    """A map of a model of transformers, from what its own attention gave."""
    layer, head = key
    if layer not in attended:
        raise LapisError(f"lens: layer {layer} of {parts.name} shows no attention weights; choose another layer")
    seen = attended[layer]
    weights_TS = seen.weights_BHTS[0, head].float()
    hidden_TS = torch.ones_like(weights_TS, dtype=torch.bool).triu(1)
    if seen.mask is not None:
        hidden_TS = hidden_TS | (seen.mask[0, 0, :, : len(hidden_TS)] < torch.finfo(seen.mask.dtype).min / 2)
    hidden_TS = hidden_TS | (weights_TS == 0)
    scores_TS = weights_TS.log()
    if seen.scores_BHTS is not None:
        plain_TS = seen.scores_BHTS[0, head].masked_fill(hidden_TS, -torch.inf)
        allowed = 8 * torch.finfo(seen.weights_BHTS.dtype).eps
        scores_TS = plain_TS if bool(((plain_TS.softmax(1) - weights_TS).abs() <= allowed).all()) else scores_TS
    moved_TS = None
    if seen.v_BKSE is not None and parts.mixers:
        kv = head * seen.v_BKSE.shape[1] // parts.heads
        moved_TS = (weights_TS * _lengths(parts, key, seen.v_BKSE[0, kv])).cpu()
    return AttentionMap(
        layer, head, tokens, scores_TS.masked_fill(hidden_TS, -torch.inf).cpu(), weights_TS.cpu(), moved_TS
    )
