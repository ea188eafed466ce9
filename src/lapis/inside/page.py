"""A trace, or two side by side, as one page: lens grid, ranks over the layers, who wrote the word, where heads look.

Leaves out: writing it to disk (cli/lens.py).
"""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from lapis.inside.attention_map import AttentionMap
from lapis.inside.lens.table import LensTrace
from lapis.report import plots
from lapis.report.markup import Column
from lapis.report.page import Page

TOKENS = 32  # of the prompt that an attention map shows, the last ones
HEADS = 8


def strongest_heads(trace: LensTrace, count: int = HEADS) -> list[tuple[int, int]]:
    """The heads (layer, head) that add most to the logit of the word that leads; by size, for it or against it."""
    words = trace.leading(1)
    rows = [row for row in trace.contribution_rows(words[0]) if row["part"] == "head"] if words else []
    rows.sort(key=lambda row: -abs(row["logit"]))
    return [(row["layer"], row["head"]) for row in rows[:count]]


def make_page(traces: Sequence[LensTrace], maps: Sequence[AttentionMap] = ()) -> Page:
    """The page of one trace, or of two on the same prompt. maps: of the first, as `strongest_heads` names them."""
    first, several = traces[0], len(traces) > 1
    names = " and ".join(f"`{short(trace)}`" for trace in traces)
    page = Page(
        "Layer by layer to the next token", f"What each layer of {names} would say next, if the model ended there."
    )
    page.samples(list(dict.fromkeys("".join(trace.tokens) for trace in traces)), "The prompt")
    page.section("What each layer would say", _how(first))
    for trace in traces:
        end, start = trace.readings[-1], trace.readings[0]
        page.stats(
            [
                (f"{short(trace)} says", f"“{trace.said}”", f"with {end.top[0][2]:.0%}"),
                ("entropy at the end", f"{end.entropy:.2f}", f"nats; {start.entropy:.2f} at the embedding"),
            ]
        )
        page.figure(trace.plot("grid"), f"{short(trace)}. Hover for the best tokens of a cell.")
        page.table(
            _layers(trace), _columns(trace), f"{short(trace)}, at the last token", folded="Each layer in numbers"
        )
    page.section("How the words rank", _tracked(first))
    tracked = _shared(traces) if several else first.leading()
    rows = [row for trace in traces for row in trace.rank_rows(short(trace) if several else "", tracked)]
    page.figure(plots.rank_trajectories(rows, first.ranks_finding()), "Rank 1 is the word that would be said next.")
    _add_contributions(page, traces)
    if maps:
        _add_maps(page, first, maps)
    for note in dict.fromkeys(note for trace in traces for note in trace.notes):
        page.text(f"Note: {note}")
    return page


def short(trace: LensTrace) -> str:
    """A model's name without the folders that lead to it."""
    return PurePath(trace.model).name or trace.model


def _how(trace: LensTrace) -> str:
    through = "its own final norm and head" if trace.head == "own" else f"the final norm and head of {trace.head}"
    tuned = f", after the maps of {trace.tuned}" if trace.tuned else ""
    return (
        f"The state after each layer goes through {through}{tuned}. Color is the probability of the token in the cell."
    )


def _tracked(trace: LensTrace) -> str:
    if trace.given:
        return "A word's rank is the best that the first token of one of its spellings has, with or without a space."
    return "No word was given, so these are tokens that are the best of some layer."


def _layers(trace: LensTrace) -> list[dict[str, Any]]:
    names = trace.leading()
    return [
        {"layer": "embedding" if r.layer is None else str(r.layer), "after": r.after, "says": r.top[0][0],
         "p": r.top[0][2], "entropy": r.entropy, "kl": r.kl_to_final, **{f"rank {n}": r.ranks[n] for n in names},
         **{f"log {n}": r.logprobs[n] for n in names}}
        for r in trace.readings
    ]  # fmt: skip


def _columns(trace: LensTrace) -> list[Column]:
    names = trace.leading()
    return [
        Column("layer"), Column("after"), Column("says", "would say"), Column("p", "probability", ".1%"),
        Column("entropy", "entropy", ".3f", unit="nats"), Column("kl", "KL to the end", ".3f", unit="nats"),
        *(Column(f"rank {n}", n, ",", group="rank") for n in names),
        *(Column(f"log {n}", n, ".2f", group="log-probability") for n in names),
    ]  # fmt: skip


def _shared(traces: Sequence[LensTrace]) -> list[str]:
    """The words that lead in either of two traces, three from each, as far as both have them."""
    both = [name for trace in traces for name in trace.leading(3)]
    return [n for n in dict.fromkeys(both) if all(n in trace.readings[-1].ranks for trace in traces)]


def _add_contributions(page: Page, traces: Sequence[LensTrace]) -> None:
    if not traces[0].contributions:
        return
    page.section(
        "Who wrote the word",
        "Each head and MLP adds a vector to the residual stream. With the final norm's scale frozen, the word's logit"
        " is the sum of what all of them add to it directly; what they do to later layers is not in it.",
    )
    for trace in traces:
        for word in trace.leading(3 if len(traces) == 1 else 1):
            rows = sorted(trace.contribution_rows(word), key=lambda row: -abs(row["logit"]))
            whose = f"{short(trace)}: " if len(traces) > 1 else ""
            page.figure(
                plots.contributions(rows, whose + trace.contributions_finding([word])),
                rows=[{"part": r["label"], "logit": r["logit"]} for r in rows[:40]],
                columns=["part", Column("logit", "added to the logit", "+.4f")],
            )


def _add_maps(page: Page, trace: LensTrace, maps: Sequence[AttentionMap]) -> None:
    page.section(
        "Where heads look",
        "Attention looks keys up by a query, and adds a weighted sum of the values it finds. A large weight on a small"
        " value moves nothing, so both are shown: the weights, and each token's share of what is moved.",
    )
    word = trace.leading(1)[0]
    tokens = maps[0].tokens[-TOKENS:]
    cut = f" The last {TOKENS} tokens of {len(maps[0].tokens)}." if len(maps[0].tokens) > TOKENS else ""
    title = f'Where the {len(maps)} heads look that weigh most for "{word}"'
    page.figure(plots.attention_map([m.rows("weights", TOKENS) for m in maps], tokens, title), "Weights." + cut)
    title = "What the same heads take from there"
    page.figure(plots.attention_map([m.rows("values", TOKENS) for m in maps], tokens, title), "Shares of values." + cut)
    rows = sorted(maps[0].lookup(), key=lambda row: -row["weight"])[:20]
    columns = [
        Column("token"), Column("position"), Column("score", "query · key", ".2f"), Column("weight", "weight", ".1%"),
        Column("moves", "length of what it adds", ".3f"),
    ]  # fmt: skip
    page.table(rows, columns, f"Head {maps[0].label}, as the last token looks things up", sortable=True)
