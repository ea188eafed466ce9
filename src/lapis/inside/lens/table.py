"""What a lens saw: a reading per state, as JSON, pandas, text or a picture. Leaves out: how it is read (logit_lens.py).

`print(trace)`, `trace.plot()`, `trace.plot("grid")`, `trace.plot("contributions")` and `trace.to_pandas()` show it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lapis.errors import ConfigError, MissingExtra
from lapis.inside.contributions import Contribution
from lapis.inside.prompt import TrackedWord, show

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

HALVES = ("attention", "delta net")
SHOWN = 6  # words in a picture or a table; JSON and pandas have them all
Picture = Literal["ranks", "grid", "contributions"]


@dataclass(frozen=True)
class Reading:
    """What one state would say next.

    Attributes:
        layer: 0-based, None for the embedding.
        after: "embedding", "attention", "delta net" (in its place) or "mlp" (the end of a layer).
        top: (token, id, probability), best first.
        entropy, kl_to_final: In nats; kl_to_final is KL(final || this).
        ranks: Of each tracked word the best rank of its single-token spellings, 1 = said next; of a word without one
            the best rank of a first piece, which the word's label names.
        logprobs: Of the whole word, its spellings added up; None where it was not measured.
        spellings: Rank of the first token, and logprob, of each.
    """

    layer: int | None
    after: str
    position: int
    top: tuple[tuple[str, int, float], ...]
    entropy: float
    kl_to_final: float
    ranks: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, float | None] = field(default_factory=dict)
    spellings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        top = [{"token": token, "id": index, "probability": share} for token, index, share in self.top]
        return {
            "layer": self.layer, "top": top, "entropy": self.entropy, "kl_to_final": self.kl_to_final,
            "ranks": self.ranks, "logprobs": self.logprobs, "spellings": self.spellings,
        }  # fmt: skip


@dataclass
class LensTrace:
    """What `lapis.lens` returns: how one model comes to its next token.

    Attributes:
        tokens, ids: The prompt's.
        words: What is tracked.
        given: By the caller; else they are the words that are best in some layer.
        readings: At the last token, from the embedding through both halves of every layer.
        grid: At the end of every layer, for the last tokens of the prompt.
        contributions: What each part adds to the logits of the words.
        head: Whose norm and head read the states: "own", or a model's name.
        tuned: The folder of the tuned lens, or "".
    """

    model: str
    tokens: list[str]
    ids: list[int]
    words: list[TrackedWord]
    given: bool
    readings: list[Reading]
    grid: list[Reading]
    contributions: list[Contribution]
    head: str = "own"
    tuned: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[Reading]:
        """The readings at the end of each layer, first to last."""
        return [reading for reading in self.readings if reading.after == "mlp"]

    @property
    def next_token(self) -> str:
        """The token that the model says next."""
        return self.readings[-1].top[0][0]

    @property
    def decided(self) -> int:
        """The layer from which on the token that the model says next is the best one, without a break to the end."""
        final = self.readings[-1].top[0][1]
        others = [reading.layer for reading in self.layers if reading.top[0][1] != final]
        return 0 if not others else 1 + (others[-1] or 0)

    def label(self, name: str) -> str:
        """A tracked word as pages and tables name it: with the piece that is followed, where it has no token."""
        return next((word.label for word in self.words if word.text == name), name)

    def leading(self, count: int = SHOWN) -> list[str]:
        """The tracked words that end best, best first; those that the caller gave in the caller's order."""
        last = self.readings[-1].ranks
        names = [word.text for word in self.words]
        return (names if self.given else sorted(names, key=lambda name: last[name]))[:count]

    def to_json(self) -> dict[str, Any]:
        """The object that `lapis lens --json` prints. Layers count from 0; the embedding stands apart."""
        halves = {reading.layer: reading.to_json() for reading in self.readings if reading.after in HALVES}
        return {
            "model": self.model,
            "head": self.head,
            "tuned": self.tuned or None,
            "tokens": self.tokens,
            "ids": self.ids,
            "decided": self.decided,
            "words": [
                {"word": word.text, "label": word.label, "given": self.given, "spellings": [
                    {"text": spelling.text, "ids": list(spelling.ids), "followed": spelling in word.followed}
                    for spelling in word.spellings
                ]} for word in self.words
            ],
            "embedding": self.readings[0].to_json(),
            "layers": [{**layer.to_json(), "after_attention": halves.get(layer.layer)} for layer in self.layers],
            "grid": [{"position": reading.position, **reading.to_json()} for reading in self.grid],
            "contributions": [
                {"word": c.word, "token": c.token, "part": c.part, "layer": c.layer, "head": c.head, "logit": c.logit}
                for c in self.contributions
            ],
            "notes": self.notes,
        }  # fmt: skip

    def to_pandas(self, what: Literal["ranks", "grid", "contributions"] = "ranks") -> "pandas.DataFrame":
        """A row per state and tracked word, per cell of the grid, or per contributor and word."""
        try:
            import pandas
        except ImportError:
            raise MissingExtra("pandas", "data") from None
        if what == "contributions":
            return pandas.DataFrame([{**vars(c), "label": c.label} for c in self.contributions])
        if what == "grid":
            return pandas.DataFrame(
                [
                    {"layer": r.layer, "position": r.position, "token": self.tokens[r.position], "top": r.top[0][0],
                     "probability": r.top[0][2], "entropy": r.entropy, "kl_to_final": r.kl_to_final}
                    for r in self.grid
                ]
            )  # fmt: skip
        return pandas.DataFrame(
            [
                {"layer": r.layer, "after": r.after, "word": word, "rank": rank, "logprob": r.logprobs[word],
                 "entropy": r.entropy, "kl_to_final": r.kl_to_final}
                for r in self.readings for word, rank in r.ranks.items()
            ]
        )  # fmt: skip

    def finding(self) -> str:
        """One sentence: what is said, and from which layer on it leads."""
        final = self.readings[-1].top[0]
        return (
            f'"{show(final[0])}" is said next ({final[2]:.0%}); it leads from layer {self.decided} on, '
            f"of layers 0 to {len(self.layers) - 1}"
        )

    def grid_rows(self) -> list[dict[str, Any]]:
        """Rows for report's lens_grid; the embedding is layer -1."""
        return [
            {"layer": -1 if r.layer is None else r.layer, "position": r.position,
             "token": show(self.tokens[r.position]), "top": [(show(token), share) for token, _, share in r.top]}
            for r in self.grid
        ]  # fmt: skip

    def rank_rows(self, model: str = "", words: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Rows for report's rank_trajectories: the words that lead, at the end of each layer."""
        names = list(words) or self.leading()
        more = {"model": model} if model else {}
        return [
            {"word": self.label(name), "layer": layer.layer, "rank": layer.ranks[name], **more}
            for name in names for layer in self.layers
        ]  # fmt: skip

    def plot(self, what: Picture = "ranks") -> "go.Figure":
        """A picture: the ranks of the tracked words over the layers, the lens grid, or who wrote the first word."""
        from lapis.report import plots

        if what == "grid":
            return plots.lens_grid(self.grid_rows(), self.finding())
        if what == "ranks":
            return plots.rank_trajectories(self.rank_rows(), self.ranks_finding())
        if what != "contributions":
            raise ConfigError(f'lens: cannot plot "{what}"; give ranks, grid or contributions')
        word = self.leading(1)
        return plots.contributions(self.contribution_rows(word[0] if word else ""), self.contributions_finding(word))

    def contribution_rows(self, word: str) -> list[dict[str, Any]]:
        """Rows for report's contributions: every part that added to the word's logit."""
        return [
            {"label": c.label, "part": c.part, "layer": c.layer, "head": c.head, "logit": c.logit}
            for c in self.contributions if c.word == word
        ]  # fmt: skip

    def contributions_finding(self, word: Sequence[str]) -> str:
        rows = self.contribution_rows(word[0]) if word else []
        if not rows:
            return "Contributions were not measured"
        most = max(rows, key=lambda row: row["logit"])
        token = next(c.token for c in self.contributions if c.word == word[0])
        known = {s.ids[0]: s for w in self.words if w.text == word[0] for s in w.spellings}
        writes = "begin" if len(known[token].ids) > 1 else "write"
        return (
            f'{most["label"]} did most to {writes} "{show(word[0])}": it added {most["logit"]:+.2f} to the logit, '
            f"all parts together {sum_of(rows):+.2f}"
        )

    def ranks_finding(self) -> str:
        """One sentence: how the word that ends best got there."""
        names = self.leading()
        if not names or not self.layers:
            return "No word was tracked"
        name = min(names, key=lambda n: self.layers[-1].ranks[n])
        ranks = [layer.ranks[name] for layer in self.layers]
        worst = max(range(len(ranks)), key=lambda i: ranks[i])
        return (
            f'"{self.label(name)}" ends at rank {ranks[-1]:,}; it stood at {ranks[0]:,} after the first layer'
            + (f" and at {ranks[worst]:,} after layer {worst}" if ranks[worst] > max(ranks[0], ranks[-1]) else "")
        )  # fmt: skip

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook shows: the finding, and a row per layer."""
        from lapis.report.markup import Column, notebook

        names = self.leading()
        rows = [
            {"layer": "embedding" if r.layer is None else str(r.layer), "says": show(r.top[0][0]), "p": r.top[0][2],
             "entropy": r.entropy, "kl": r.kl_to_final, **{f"rank {n}": r.ranks[n] for n in names}}
            for r in (self.readings[0], *self.layers)
        ]  # fmt: skip
        columns = [
            Column("layer"), Column("says", "would say"), Column("p", "probability", ".1%"),
            Column("entropy", "entropy", ".3f", unit="nats"), Column("kl", "KL to the end", ".3f", unit="nats"),
            *(Column(f"rank {n}", self.label(n), ",", group="rank") for n in names),
        ]  # fmt: skip
        return notebook(str(self), self.finding(), rows, columns, "`.plot()` draws it, `.to_pandas()` gives the rows")

    def __str__(self) -> str:
        names = self.leading()
        labels = [self.label(name) for name in names]
        width = max([12, *(len(label) + 1 for label in labels)])
        head = f"{'layer':>6}  {'would say':<18} {'p':>6} {'entropy':>8} {'KL':>8}"
        lines = [head + "".join(f"{label:>{width}}" for label in labels)]
        for reading in [self.readings[0], *self.layers]:
            token, _, share = reading.top[0]
            label = "embed" if reading.layer is None else str(reading.layer)
            lines.append(
                f"{label:>6}  {quoted(token):<18} {share:>6.1%} {reading.entropy:>8.3f} {reading.kl_to_final:>8.3f}"
                + "".join(f"{reading.ranks[name]:>{width},}" for name in names)
            )
        return "\n".join([*lines, self.finding(), *self.notes])


def quoted(token: str, width: int = 16) -> str:
    """A token with its spaces to be seen, cut where it is long."""
    text = show(token)
    return f'"{text}"' if len(text) <= width else f'"{text[: width - 1]}…"'


def sum_of(rows: Iterable[dict[str, Any]]) -> float:
    total: float = sum(row["logit"] for row in rows)
    return total
