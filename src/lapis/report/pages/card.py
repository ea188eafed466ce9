"""The page of an adaptation: two languages side by side, what was won and what was lost in the same size.

Takes the object that `lapis card --json` prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lapis.report import plots
from lapis.report.markup import Column
from lapis.report.page import Page

FIGURES = {
    "bits_per_byte": "bits per byte", "tokens_per_byte": "tokens per byte",
    "characters_per_second": "characters per second", "response_nll": "response NLL", "stop_rate": "stop rate",
}  # fmt: skip
TITLES = {"target": "The language", "replay": "What it knew before"}


def card_page(card: Mapping[str, Any]) -> Page:
    """The page of one adaptation."""
    scores = card["scores"]
    first, last = next(iter(scores)), list(scores)[-1]
    page = Page(
        f"From {first} to {last}",
        "Counted for a byte of held-out text, with 95\u00a0% bootstrap intervals over documents.",
    )
    stats = [_stat("won", scores, "target", first, last)]
    if card["cost"] is not None:
        stats.append(_stat("lost", scores, "replay", first, last))
    page.stats(stats)
    page.section("Side by side", "The first row is what was started from.")
    languages = list(scores[first])
    for language in languages:
        _table(page, scores, language)
    rows = [
        {"model": name, "language": TITLES.get(language, language), "bits_per_byte": figures["bits_per_byte"]["value"]}
        for name, each in scores.items()
        for language, figures in each.items()
    ]
    title = f"{scores[last]['target']['bits_per_byte']['value']:.3f} bits for a byte of the language at the end"
    page.figure(plots.scores(rows, title, metric="bits_per_byte", format=".3f"))
    if card["replies"]:
        page.section("Replies", "To the same prompts, the most likely token each time.")
        page.replies(card["replies"])
    if card["how"]:
        page.section("How it was made")
        page.table([{"setting": key, "value": str(value)} for key, value in card["how"].items()], ["setting", "value"])
    return page


def _stat(label: str, scores: Mapping[str, Any], language: str, first: str, last: str) -> tuple[str, str, str]:
    """By how much bits per byte of a language fell (or rose), with both ends."""
    before, after = (scores[name][language]["bits_per_byte"] for name in (first, last))
    change = after["value"] / before["value"] - 1
    names = {"won": "bits per byte of the language", "lost": "bits per byte of what it knew"}
    note = f"{before['value']:.3f} → {after['value']:.3f}, {after['n']} documents"
    return names[label], f"{change:+.1%}".replace("-", "−"), note


def _table(page: Page, scores: Mapping[str, Any], language: str) -> None:
    rows = [
        {"model": name, **{key: _spelled(figure) for key, figure in each[language].items()}}
        for name, each in scores.items()
    ]
    known = [key for key in FIGURES if any(key in row for row in rows)]
    counts = {key: next(each[language][key]["n"] for each in scores.values() if key in each[language]) for key in known}
    behind = ", ".join(f"{FIGURES[key]}: {count}" for key, count in counts.items())
    page.table(
        rows, ["model", *(Column(key, FIGURES[key]) for key in known)], TITLES.get(language, language),
        caption=f"How many documents or chats stand behind a figure: {behind}.",
    )  # fmt: skip


def _spelled(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure['value']:.3g}\u00a0({low:.3g}\u2060–\u2060{high:.3g})"
