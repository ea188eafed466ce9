"""What an explanation holds: one tree of plain records and arrays, which is also the JSON and the data of the page.

An array is written as {"shape", "type", "data"}: base64 of little-endian numbers, `f32`, or `u16` for shares from 0 to
1 in 65,534 steps, where 65,535 stands for what a mask hides. Leaves out: how things are measured (explain.py).

Shapes: P places (the last tokens of the text), A those of the attention maps, N states of a place (the embedding, then
each layer), L layers, H heads, K tokens named, E head dim, C columns, V vocabulary; T = A (A + 1) / 2, the pairs of a
place and one that is not behind it, row by row.
"""

import base64
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lapis.inside.explain.pages import make_page
from lapis.inside.lens.table import LensTrace
from lapis.inside.prompt import show
from lapis.model.size import Mixer
from lapis.report.page import Page

STEPS, HIDDEN = 65_534, 65_535


SHARES = {"type": "u16"}  # of a field whose numbers are shares, or NaN where a mask hides something


@dataclass(frozen=True)
class ShownToken:
    """A token of the text: its place from 0, its text, its id, and whether it is a special one."""

    place: int
    text: str
    id: int
    special: bool


@dataclass(frozen=True)
class Build:
    """What a model is made of; None where that is not known of a model of another library.

    windows: Of each layer, how many tokens back a token sees, itself included; None sees all.
    """

    family: str
    layers: int
    dim: int
    vocab: int
    context: int
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    positions: str | None = None
    tied: bool | None = None
    parameters: int | None = None
    windows: list[int | None] = field(default_factory=list)


@dataclass(frozen=True)
class Stream:
    """Lengths of the vectors on the way of each token.

    Attributes:
        start_PC: The first numbers of what enters the first block.
        positions_P: Of the vectors of learned positions; None where positions turn queries and keys.
        states_PN: Of the residual stream.
        attention_PL, mlp_PL: Of what the halves of each block add; None where they are not plain sums.
        taken_LT: Which share of what all heads of a layer move comes from which place; None without attention maps.
    """

    start_PC: Tensor
    positions_P: Tensor | None
    states_PN: Tensor
    attention_PL: Tensor | None
    mlp_PL: Tensor | None
    taken_LT: Tensor | None = field(metadata=SHARES)


@dataclass(frozen=True)
class Ranks:
    """Measured ranks of matrices with a row for each place of a head's map, in float64 (numpy's tolerance).

    states: X, what enters the layer. gram: X X^T. cubic: X X^T X. queries, keys, values: of the head. scores: Q K^T.
    weights: softmax of the masked scores. mixed: weights times values.
    """

    states: int
    gram: int
    cubic: int
    queries: int
    keys: int
    values: int
    scores: int
    weights: int
    mixed: int


@dataclass(frozen=True)
class HeadDetail:
    """One head with the vectors that it works with.

    scale: What products of queries and keys are multiplied by to be scores. scores_AA: Before the mask. moved_AA:
    Lengths of what is added to the stream.
    states_AC: The first columns of X; gram_AA: X X^T; cubic_AC: the same columns of X X^T X.
    """

    layer: int
    head: int
    scale: float
    scores_AA: Tensor
    moved_AA: Tensor
    queries_AE: Tensor
    keys_AE: Tensor
    values_AE: Tensor
    states_AC: Tensor
    gram_AA: Tensor
    cubic_AC: Tensor
    ranks: Ranks


@dataclass(frozen=True)
class AttentionViews:
    """Where all heads look, on the last A places; some heads in detail."""

    places: int
    heads: list[HeadDetail]
    weights_LHT: Tensor = field(metadata=SHARES)


@dataclass(frozen=True)
class WordShares:
    """What each part adds to the logit of a word at the last place.

    rest: Of what is no head and no MLP: the embedding, biases, rounding.
    """

    word: str
    token: int
    logit: float
    heads_LH: Tensor
    attention_L: Tensor
    mlp_L: Tensor
    rest: dict[str, float]


@dataclass(frozen=True)
class LayerGrid:
    """What each state would say. kl_PN: from the last layer, in nats; ranks: of tracked words, 1 = said next."""

    ids_PNK: list[list[list[int]]]
    shares_PNK: Tensor
    entropy_PN: Tensor
    kl_PN: Tensor
    ranks: dict[str, list[list[int]]]


@dataclass(frozen=True)
class Ending:
    """The logits of the last place, largest first (of equal ones the lower id first), and the tokens of the first.

    actual: Of each place but the last, rank and probability of the token that stands behind it in the text.
    """

    logits_V: Tensor
    ids: list[int]
    actual: list[tuple[int, float]]


@dataclass(frozen=True)
class Cost:
    """What ways to mix cost: for 512 x 768 numbers, and for this text; and this model at several lengths."""

    example: list[Mixer]
    own: list[Mixer]
    tokens: int
    lengths: list[dict[str, int]]


@dataclass(frozen=True)
class Parting:
    """Two models on one text.

    Attributes:
        name: Of the other model.
        same: Whether both cut the text into the same tokens; without that only their ends can be compared.
        grid: What each state of the other would say: at the same places, or at its last one.
        texts: Of the tokens that the other would say.
        kl_P: KL(first || other) of the next token at each place, in nats, over the tokens that both have.
        vocab: How many these are.
        parted: At each place the first state from which on the best tokens differ up to the end; None where they agree.
        distance_PN: | other - first | / | first | of the states; None where the models are of different shapes.
    """

    name: str
    same: bool
    grid: LayerGrid
    texts: dict[int, str]
    kl_P: Tensor | None
    vocab: int
    parted: list[int | None]
    distance_PN: Tensor | None

    @property
    def most(self) -> int | None:
        """The place at which the two differ most."""
        return None if self.kl_P is None else int(self.kl_P.argmax())


@dataclass(frozen=True)
class Explanation:
    """What `lapis.explain` returns: one model on one text.

    Attributes:
        model: Its name.
        total: Tokens of the text; the last of them are `tokens`.
        texts: Of every id that is named anywhere, as a reader can see it.
        labels: Of the tracked words, as pages name them.
        notes: What is not shown, and why.
        trace: The lens at the last place, with all that it has read.
    """

    model: str
    build: Build
    total: int
    tokens: list[ShownToken]
    stream: Stream
    attention: AttentionViews | None
    words: list[WordShares]
    grid: LayerGrid
    ending: Ending
    cost: Cost
    against: Parting | None
    texts: dict[int, str]
    labels: dict[str, str]
    notes: list[str]
    trace: LensTrace = field(repr=False, metadata={"type": "none"})

    def to_json(self) -> dict[str, Any]:
        """The object that `lapis explain --json` prints and that the page shows."""
        token, index, share = self.trace.readings[-1].top[0]
        tree: dict[str, Any] = as_tree(self)
        if self.against is not None:
            tree["against"]["finding"] = self.parting_finding()
        following = {"token": token, "id": index, "probability": share}
        return {**tree, "finding": self.finding(), "decided": self.trace.decided, "next": following}

    def finding(self) -> str:
        """One sentence: what is said next; of two models a second one."""
        return self.trace.finding() + (f". {self.parting_finding()}" if self.against else "")

    def parting_finding(self) -> str:
        """Where two models part; "" of one."""
        if self.against is None:
            return ""
        one, other = self.model, self.against.name
        most = self.against.most
        if most is None or self.against.kl_P is None:
            return f"{one} and {other} cut the text into other tokens, so only what they say at its end is compared."
        row = self.against.parted[most]
        place = "the embedding" if row == 0 else f"layer {(row or 0) - 1}"
        where = "agree on the best token there" if row is None else f"part in {place}: from there on best tokens differ"
        token, nats = show(self.tokens[most].text), float(self.against.kl_P[most])
        return (
            f"{one} and {other} differ most behind “{token}”, by {nats:.3f} nats (KL of the next token), and {where}."
        )

    def weights(self, layer: int, head: int) -> Tensor:
        """[A, A]: the attention weights of a head; NaN where a mask hides a token."""
        assert self.attention is not None, "this model has no attention maps"
        A = self.attention.places
        weights_AA = torch.full((A, A), torch.nan)
        weights_AA[tuple(torch.tril_indices(A, A))] = self.attention.weights_LHT[layer, head]
        return weights_AA

    def page(self) -> Page:
        """The page; `.render()` is its HTML."""
        return make_page(self.to_json())

    def __str__(self) -> str:
        return "\n".join([self.finding(), *self.notes])


def as_tree(value: Any, kind: str = "f32") -> Any:
    """Records as dicts and arrays as base64."""
    if isinstance(value, Tensor):
        return _pack(value, kind)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kinds = {f.name: f.metadata.get("type", "f32") for f in dataclasses.fields(value)}
        # the letters of a shape are for readers of the code
        return {
            name.rsplit("_", 1)[0] if name.rsplit("_", 1)[-1].isupper() else name: as_tree(getattr(value, name), kind)
            for name, kind in kinds.items() if kind != "none"
        }  # fmt: skip
    if isinstance(value, dict):
        return {str(key): as_tree(item) for key, item in value.items()}
    return [as_tree(item) for item in value] if isinstance(value, (list, tuple)) else value


def _pack(array: Tensor, kind: str) -> dict[str, Any]:
    numbers = array.float()
    if kind == "u16":
        steps = (numbers.clamp(0, 1) * STEPS).round().nan_to_num(nan=HIDDEN)
        data = steps.to(torch.int32).numpy().astype("<u2").tobytes()
    else:
        data = numbers.contiguous().numpy().astype("<f4").tobytes()
    return {"shape": list(array.shape), "type": kind, "data": base64.b64encode(data).decode()}
