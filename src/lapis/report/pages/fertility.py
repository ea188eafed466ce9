"""The page of `lapis fertility`: what a language costs a model, and what more tokens would change.

Takes the object that `lapis fertility --json` prints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lapis.report import plots
from lapis.report.figures.scores import short as in_short
from lapis.report.markup import Column
from lapis.report.page import Page
from lapis.report.pages.sections import short
from lapis.wording import format_count

LANGUAGES = (
    ("name", "text"), ("documents", "documents"), ("bytes", "bytes"), ("tokens_per_byte", "tokens per byte"),
    ("tokens_per_character", "tokens per character"), ("tokens_per_word", "tokens per word"),
    ("single_byte_share", "single bytes"), ("vocabulary_share", "vocabulary used"),
    ("bits_per_byte", "bits per byte"), ("characters_per_second", "characters per second"),
)  # fmt: skip
CURVE = (
    ("added", "tokens added"), ("tokens_per_byte", "tokens per byte"), ("saved", "saved"),
    ("replay_tokens_per_byte", "replay: tokens per byte"), ("rarest", "rarest occurs"), ("parameters", "parameters"),
    ("flops_per_byte", "FLOPs per byte"), ("kv_bytes_per_byte", "KV cache per byte"),
    ("characters_per_second", "characters per second"),
)  # fmt: skip
FORMATS: Mapping[str, str | Callable[[Any], str]] = {
    "documents": ",", "bytes": ",", "added": ",", "rarest": ",", "parameters": ",", "single_byte_share": ".1%",
    "vocabulary_share": ".1%", "saved": ".1%", "flops_per_byte": in_short, "kv_bytes_per_byte": ",.0f",
    "characters_per_second": ".3g",
}  # fmt: skip


def language_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of each text, of a second model too."""
    rows = [{"name": name, **figures} for name, figures in result["languages"].items()]
    if other := result.get("against"):
        rows += [
            {"name": f"{name}, {short(other['model'])}", **figures} for name, figures in other["languages"].items()
        ]
    return rows


def fertility_page(result: Mapping[str, Any]) -> Page:
    """The page of one measurement."""
    chosen = result["recommendation"]
    page = Page(
        f"What this language costs {short(result['model'])}",
        "Counted for a byte of held-out text, so that tokenizers can be compared.",
    )
    target, replay = result["languages"]["target"], result["languages"].get("replay")
    stats = [("tokens per byte", f"{target['tokens_per_byte']:.3f}", _beside(target, replay, "tokens_per_byte", ".3f"))]
    if target.get("bits_per_byte") is not None:
        note = _beside(target, replay, "bits_per_byte", ".3f")
        stats.append(("bits per byte", f"{target['bits_per_byte']:.3f}", note))
    stats.append(("single bytes", f"{target['single_byte_share']:.0%}", "of the tokens"))
    stats.append(("tokens to add", f"{chosen['add']:,}" if chosen["add"] else "none", "the recommendation"))
    page.stats(stats)
    page.text(f"**{chosen['reason'][:1].upper()}{chosen['reason'][1:]}.**")
    page.section("The texts", "Held out: nothing was learned from them.")
    page.table(language_rows(result), _columns(LANGUAGES, language_rows(result)))
    if curve := result.get("curve"):
        page.section("With more tokens", "Merges are learned on the rest of the text, and appended to the tokenizer's.")
        named = chosen["add"] or max(row["added"] for row in curve)
        row = min(curve, key=lambda row: abs(row["added"] - named))
        title = f"{row['added']:,} more tokens would save {row['saved']:.0%} of this language's tokens"
        caption = f"The curve bends at about {format_count(result['knee'], 'token')}." if result.get("knee") else ""
        page.figure(plots.fertility_curve(curve, title, mark=chosen["add"]), caption)
        page.table(curve, _columns(CURVE, curve), "The curve in numbers", mark=[str(chosen["add"])])
    for note in result.get("notes") or ():
        page.text(f"Note: {note}")
    return page


def _beside(target: Mapping[str, Any], replay: Mapping[str, Any] | None, key: str, form: str) -> str:
    return "" if replay is None else f"{format(replay[key], form)} of the replay text"


def _columns(names: tuple[tuple[str, str], ...], rows: list[dict[str, Any]]) -> list[Column]:
    shown = [(key, label) for key, label in names if any(row.get(key) is not None for row in rows)]
    return [Column(key, label, FORMATS.get(key, ".3f") if key != "name" else "") for key, label in shown]
