"""A trace, or two side by side, as one page: lens grid, ranks over the layers, who wrote the word, where heads look.

Leaves out: writing it to disk (cli/lens.py).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

from lapis.inside.attention_map import AttentionMap
from lapis.inside.lens.table import LensTrace
from lapis.inside.prompt import show
from lapis.report import plots
from lapis.report.markup import Column
from lapis.report.page import Page

TOKENS = 20  # of the prompt that an attention map shows, the last ones
HEADS = 6
COMPARED = 3  # words whose ranks stand side by side in the table of two models


def strongest_heads(trace: LensTrace, count: int = HEADS) -> list[tuple[int, int]]:
    """The heads (layer, head) that add most to the logit of the word that leads; by size, for it or against it."""
    words = trace.leading(1)
    rows = [row for row in trace.contribution_rows(words[0]) if row["part"] == "head"] if words else []
    rows.sort(key=lambda row: -abs(row["logit"]))
    return [(row["layer"], row["head"]) for row in rows[:count]]


def make_page(traces: Sequence[LensTrace], maps: Sequence[AttentionMap] = ()) -> Page:
    """The page of one trace, or of two on the same prompt.

    Args:
        traces: One or two.
        maps: Of the first, for the heads that `strongest_heads` names.
    """
    first, several = traces[0], len(traces) > 1
    names = " and ".join(f"`{short(trace)}`" for trace in traces)
    page = Page(
        "Layer by layer to the next token", f"What each layer of {names} would say next, if the model ended there."
    )
    page.samples(list(dict.fromkeys("".join(trace.tokens) for trace in traces)), "The prompt")
    page.stats([figure for trace in traces for figure in _key_figures(trace, several)])
    page.section("How the words rank", _tracked(first))
    tracked = _shared(traces) if several else first.leading()
    rows = [row for trace in traces for row in trace.rank_rows(short(trace) if several else "", tracked)]
    page.figure(plots.rank_trajectories(rows, first.ranks_finding()), "Rank 1 is the word that would be said next.")
    page.section("What each layer would say", _how(first))
    if several:
        page.table(
            _compared(traces, tracked), _compared_columns(traces, tracked), "Side by side, at the last token"
        )  # fmt: skip
    for trace in traces:
        page.figure(trace.plot("grid"), f"{short(trace)}. Hover for the best tokens of a cell.")
        page.table(
            _layers(trace), _columns(trace), folded=f"Each layer of {short(trace)} in numbers, at the last token"
        )
    _add_contributions(page, traces)
    if maps:
        _add_maps(page, first, maps)
    for note in dict.fromkeys(note for trace in traces for note in trace.notes):
        page.text(f"Note: {note}")
    page.text(f'The whole way of the text, with every head: `lapis explain {first.model} "TEXT" --html FILE`.')
    return page


def short(trace: LensTrace) -> str:
    """A model's name without the folders that lead to it."""
    return PurePath(trace.model).name or trace.model


def _key_figures(trace: LensTrace, several: bool) -> list[tuple[str, str, str]]:
    """What is said next, and how sure the model is; of one model also its depth."""
    end, start = trace.readings[-1], trace.readings[0]
    figures = [
        (f"{short(trace)} says", f"“{show(trace.next_token)}”", f"with {end.top[0][2]:.0%}"),
        ("entropy at the end", f"{end.entropy:.2f}", f"nats; {start.entropy:.2f} at the embedding"),
    ]
    if not several:
        figures.append(("layers", str(len(trace.layers)), f"counted from 0 to {len(trace.layers) - 1}"))
        figures += [
            (f"rank of “{trace.label(name)}”", f"{end.ranks[name]:,}", "at the end; 1 is said next")
            for name in trace.leading(2) if trace.given
        ]  # fmt: skip
    return figures


def _how(trace: LensTrace) -> str:
    through = "its own final norm and head" if trace.head == "own" else f"the final norm and head of {trace.head}"
    tuned = f", after the maps of {trace.tuned}" if trace.tuned else ""
    return (
        f"The state after each layer goes through {through}{tuned}. Color is the probability of the token in the cell; "
        "␣ is a space."
    )


def _tracked(trace: LensTrace) -> str:
    if not trace.given:
        return "No word was given, so these are tokens that are the best of some layer."
    text = "A word is followed by its own token, with or without a space before it."
    if any(word.pieces for word in trace.words):
        text += " A word that has no token of its own is followed by its first piece, which its name says."
    return text


def _place(layer: int | None) -> str:
    return "embed" if layer is None else str(layer)


def _layers(trace: LensTrace) -> list[dict[str, Any]]:
    names = trace.leading()
    return [
        {"layer": _place(r.layer), "after": r.after, "says": show(r.top[0][0]), "p": r.top[0][2],
         "entropy": r.entropy, "kl": r.kl_to_final, **{f"rank {n}": r.ranks[n] for n in names},
         **{f"log {n}": r.logprobs[n] for n in names}}
        for r in trace.readings
    ]  # fmt: skip


def _columns(trace: LensTrace) -> list[Column]:
    names = trace.leading()
    labels = {name: trace.label(name) for name in names}
    return [
        Column("layer"), Column("says", "would say"), Column("p", "probability", ".1%"),
        *(Column(f"rank {n}", labels[n], ",", group="rank") for n in names), Column("after"),
        Column("entropy", "entropy", ".3f", unit="nats"), Column("kl", "KL to the end", ".3f", unit="nats"),
        *(Column(f"log {n}", labels[n], ".2f", group="log-probability") for n in names),
    ]  # fmt: skip


def _compared(traces: Sequence[LensTrace], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row per layer that both models have, with what each would say and its ranks."""
    ends = [{r.layer: r for r in (trace.readings[0], *trace.layers)} for trace in traces]
    rows = []
    for layer in [layer for layer in ends[0] if layer in ends[1]]:
        row: dict[str, Any] = {"layer": _place(layer)}
        for number, readings in enumerate(ends):
            reading = readings[layer]
            row |= {f"says {number}": show(reading.top[0][0]), f"p {number}": reading.top[0][2]}
            row |= {f"{number} {name}": reading.ranks[name] for name in names[:COMPARED]}
        rows.append(row)
    return rows


def _compared_columns(traces: Sequence[LensTrace], names: Sequence[str]) -> list[Column]:
    columns = [Column("layer")]
    for number, trace in enumerate(traces):
        columns += [Column(f"says {number}", "would say", group=short(trace)),
                    Column(f"p {number}", "p", ".0%", group=short(trace))]  # fmt: skip
    for number, trace in enumerate(traces):
        columns += [
            Column(f"{number} {name}", show(name), ",", group=f"rank, {short(trace)}") for name in names[:COMPARED]
        ]
    return columns


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
    several = len(traces) > 1
    words = [(trace, word) for trace in traces for word in trace.leading(1 if several else 3)]
    page.beside(*(partial(_add_word, page, trace, word, several) for trace, word in words))


def _add_word(page: Page, trace: LensTrace, word: str, several: bool) -> None:
    """Who wrote a word in one model."""
    rows = sorted(trace.contribution_rows(word), key=lambda row: -abs(row["logit"]))
    whose = f"{short(trace)}: " if several else ""
    page.figure(
        plots.contributions(rows, whose + trace.contributions_finding([word])),
        rows=[{"part": row["label"], "logit": row["logit"]} for row in rows[:40]],
        columns=["part", Column("logit", "added to the logit", "+.4f")],
    )


def _add_maps(page: Page, trace: LensTrace, maps: Sequence[AttentionMap]) -> None:
    page.section(
        "Where heads look",
        "Attention looks keys up by a query, and adds a weighted sum of the values it finds. A large weight on a small"
        " value moves nothing, so both are shown: the weights, and each token's share of what is moved.",
    )
    word = trace.leading(1)[0]
    tokens = [show(token) for token in maps[0].tokens[-TOKENS:]]
    cut = f" The last {TOKENS} tokens of {len(maps[0].tokens)}." if len(maps[0].tokens) > TOKENS else ""
    title = f'Where the {len(maps)} heads look that weigh most for "{show(word)}"'
    page.figure(plots.attention_map([m.rows("weights", TOKENS) for m in maps], tokens, title), "Weights." + cut)
    if all(m.moved_TS is not None for m in maps):
        title, rows = "What the same heads take from there", [m.rows("values", TOKENS) for m in maps]
        page.figure(plots.attention_map(rows, tokens, title), "Shares of values." + cut)
    rows = sorted(maps[0].lookup(), key=lambda row: -row["weight"])[:20]
    rows = [{**row, "token": show(row["token"])} for row in rows]
    columns = [
        Column("token"), Column("position"), Column("score", "query · key", ".2f"), Column("weight", "weight", ".1%"),
        Column("moves", "length of what it adds", ".3f"),
    ]  # fmt: skip
    page.table(rows, columns, f"Head {maps[0].label}, as the last token looks things up", sortable=True)
