"""The page of an adaptation: two languages side by side, what was won and what was lost in the same size.

Takes the object that `lapis card --json` prints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lapis.report import plots
from lapis.report.markup import Column
from lapis.report.page import Page
from lapis.wording import format_count, without_folders

# score -> what it is called, how it is written, and which way is better
FIGURES = {
    "bits_per_byte": ("bits per byte", ".3f", "less"),
    "tokens_per_byte": ("tokens per byte", ".3f", "less"),
    "characters_per_second": ("characters per second", ".3g", "more"),
    "response_bits_per_byte": ("given replies: bits per byte", ".3f", "less"),
    "response_nll": ("given replies: nats per token", ".3f", "less"),
    "stop_rate": ("own replies that end", ".0%", "more"),
    "in_language": ("own replies in the language", ".0%", "more"),
    "choices": ("questions answered right", ".1%", "more"),
}
COUNTED = {
    "stop_rate": ("reply", "replies"), "in_language": ("reply", "replies"), "choices": ("question", "questions"),
    "response_bits_per_byte": ("chat", "chats"), "response_nll": ("chat", "chats"),
    "characters_per_second": ("text", "texts"),
}  # fmt: skip
NO_INTERVAL = "no interval"  # of one document, or one chat: nobody knows how much another would differ
SHARES = ("stop_rate", "in_language", "choices")  # changes of these are points
TOKEN_BOUND = ("response_nll",)  # not to be compared where tokenizers differ
UNEVEN = (
    "Where models were measured on different numbers, their scores do not compare; changes are those of what both were "
    "measured on."
)
TITLES = {"target": "The language", "replay": "What it knew before"}
CODE = re.compile(r"[a-z]{2,3}")


def card_page(card: Mapping[str, Any]) -> Page:
    """The page of one adaptation."""
    scores, last = card["scores"], card["result"]
    first = next(iter(scores))
    title = card["how"].get("title")
    way = f"from {first} to {last}" if first != last else first
    page = Page(
        f"{title}: {way}" if title else f"{way[:1].upper()}{way[1:]}",
        "Two languages, measured alike on text that nothing was learned from. Counted for a byte of text, so that "
        "models with different tokenizers compare. In brackets: 95\u00a0% bootstrap intervals.",
    )
    _won_and_lost(page, card, first, last)
    page.section("Side by side", "The first model is what was started from.")
    for language in scores[first]:
        _table(page, card, language)
    rows = [
        {"model": name, "language": title_of(card, language), "bits_per_byte": figures["bits_per_byte"]["value"]}
        for name, each in scores.items()
        for language, figures in each.items()
    ]
    page.figure(plots.scores(rows, "Bits per byte of held-out text", metric="bits_per_byte", format=".3f"))
    for name, many in card["notes"].items():
        for note in many:
            page.text(f"Note: {name} {note}.")
    if card["replies"]:
        page.section(
            "Replies", "To the same prompts, the likeliest token each time; beside a name the language of the reply."
        )
        for language in scores[first]:
            if rows := [_reply(card, row) for row in card["replies"] if row["language"] == language]:
                page.text(f"**{title_of(card, language)}**")
                page.replies(rows)
    _how(page, card["how"])
    return page


def title_of(card: Mapping[str, Any], language: str) -> str:
    """What a language is called, with its code where that is known."""
    code = card["languages"].get(language, "")
    title = TITLES.get(language, language)
    return f"{title} ({code})" if CODE.fullmatch(code) else title


def spelled(key: str, figure: Mapping[str, Any]) -> str:
    """A score with its interval."""
    low, high = (written(key, end) for end in figure["interval"])
    interval = f"{low}\u2060–\u2060{high}" if figure["n"] > 1 else NO_INTERVAL
    return f"{written(key, figure['value'])} ({interval})"


def written(key: str, value: float) -> str:
    """A score as people read it."""
    return f"{value:,.0f}" if value >= 1000 else format(value, FIGURES[key][1])


def counted(key: str, least: int, most: int | None = None) -> str:
    """What a score is measured on: "1 document", or "2–3 documents" where models differ."""
    one, many = COUNTED.get(key, ("document", "documents"))
    if most is None or most == least:
        return format_count(least, one, many)
    return f"{least:,}–{format_count(most, one, many)}"


def spelled_change(key: str, figure: Mapping[str, Any]) -> tuple[str, str]:
    """A change and its interval: percent, or points where the score itself is a share."""
    values = [100 * value for value in (figure["value"], *figure["interval"])]
    digits = 0 if max(map(abs, values)) >= 20 else 1
    value, low, high = (
        f"{number:+.{digits}f}".replace("-", "−") if round(number, digits) else "0" for number in values
    )
    interval = f"{low} to {high}" if figure["n"] > 1 else NO_INTERVAL
    return f"{value}\u00a0{'points' if key in SHARES else '%'}", interval


def spelled_gap(gap: Mapping[str, Any]) -> tuple[str, str]:
    """How much of the gap was closed, and its interval."""
    value, low, high = (f"{round(100 * share):,}%".replace("-", "−") for share in (gap["value"], *gap["interval"]))
    return value, f"{low} to {high}" if gap["n"] > 1 else NO_INTERVAL


def way_of(card: Mapping[str, Any]) -> str:
    """Of which way the gap is: it begins at one model for all that are compared."""
    return (
        f"of the way from {card['gap_from']} to the model that was tuned on chats of the language, by bits per byte of "
        "the replies that were given"
    )


def gap_line(card: Mapping[str, Any]) -> tuple[str, str]:
    """How much of the gap the result closed, and what else is to be said of that."""
    value, interval = spelled_gap(card["gap"])
    return f"Gap closed: {value}", f"({interval}; {format_count(card['gap']['n'], 'chat')}) {way_of(card)}."


def gap_row(card: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Of each model how much of the gap it closed, and on how many chats; nothing where nobody knows."""
    counts = [gap["n"] for gap in card["gaps"].values()]
    cells = {name: "{} ({})".format(*spelled_gap(gap)) for name, gap in card["gaps"].items()}
    return cells, counted("response_bits_per_byte", min(counts), max(counts)) if counts else ""


def _won_and_lost(page: Page, card: Mapping[str, Any], first: str, last: str) -> None:
    """A column for each language with the same figures in the same size."""
    changes = card["changes"].get(last, {})
    page.section("What was won, and what was lost", f"What changed from {first} to {last}." if changes else "")

    def column(language: str) -> None:
        page.text(f"**{title_of(card, language)}**")
        figures = changes[language]
        page.stats([_stat(key, figures[key]) for key in FIGURES if key in figures and key not in TOKEN_BOUND])

    page.beside(*((lambda name=name: column(name)) for name in changes))
    if card["gap"]:
        page.text("**{}** {}".format(*gap_line(card)))
    for key, why in card["reasons"].items():
        page.text(f"{key.replace('_', ' ').capitalize()}: not known. {why[:1].upper()}{why[1:]}.")


def _stat(key: str, figure: Mapping[str, Any]) -> tuple[str, str, str]:
    label, _, better = FIGURES[key]
    before, after = (written(key, figure[side]) for side in ("before", "after"))
    value, interval = spelled_change(key, figure)
    number, _, unit = value.partition("\u00a0")
    interval = interval if interval == NO_INTERVAL else f"{interval} {unit}"
    note = f"{before} → {after}; {interval}; {counted(key, figure['n'])}"
    return f"{label} ({better} is better)", value if unit == "%" else number, note


def _table(page: Page, card: Mapping[str, Any], language: str) -> None:
    """A row for each score, a column for each model."""
    rows, uneven = [], False
    scores = {name: each[language] for name, each in card["scores"].items()}
    for key, (label, _, better) in FIGURES.items():
        known = {name: figures[key] for name, figures in scores.items() if key in figures}
        if known:
            counts = [figure["n"] for figure in known.values()]
            row = {"score": f"{label}\N{NO-BREAK SPACE}{'↓' if better == 'less' else '↑'}"}
            row |= {name: spelled(key, figure) for name, figure in known.items()}
            row["n"] = counted(key, min(counts), max(counts))
            rows.append(row)
            uneven |= min(counts) < max(counts)
    cells, chats = gap_row(card) if language == "target" else ({}, "")
    if cells:
        rows.append({"score": "gap closed\N{NO-BREAK SPACE}↑", **cells, "n": chats})
    chance = next((f["choices"]["chance"] for f in scores.values() if "chance" in f.get("choices", {})), None)
    caption = "↓ less is better, ↑ more is better. Nats per token compare only where tokens per byte are equal."
    if uneven:
        caption += f" {UNEVEN}"
    if cells:
        caption += f" Gap closed: {way_of(card)}."
    if chance is not None:
        caption += f" Guessing answers {chance:.0%} of the questions right."
    if any("characters_per_second" in figures for figures in scores.values()):
        caption += f" Characters per second: generated on this machine ({card['machine']})."
    columns = [Column("score", " "), *(Column(name) for name in scores), Column("n", "measured on")]
    page.table(rows, columns, title_of(card, language), caption=caption)


def _reply(card: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of replies as the page takes it; the language of a reply beside the model's name."""
    code = card["languages"].get(row["language"], "")
    spoken = row["spoken"]
    named = {f"{name}, {spoken.get(name) or '?'}": text for name, text in row["replies"].items()}
    return {"prompt": row["prompt"], "replies": named, **({"language": code} if CODE.fullmatch(code) else {})}


def _how(page: Page, how: Mapping[str, Any]) -> None:
    settings = {**({"licence": how["license"]} if how.get("license") else {}), **(how.get("settings") or {})}
    named = {**(how.get("data") or {})}
    for role, files in (how.get("models") or {}).items():
        named |= {f"{role}: {name}": digest for name, digest in files.items()}
    digests = [{"file": without_folders(name), "sha256": digest} for name, digest in named.items()]
    if settings or digests:
        page.section("How it was made")
    if settings:
        rows = [{"setting": key, "value": str(without_folders(value))} for key, value in settings.items()]
        page.table(rows, ["setting", "value"])
    if digests:
        page.table(digests, ["file", "sha256"], folded="Digests of the files that were read")
