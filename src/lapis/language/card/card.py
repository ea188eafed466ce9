"""The card of an adaptation: what was won, what it cost, and how it was made, as a page and as the hub's README.md.

card = make_card({"base": ..., "adapted": ...}, {"target": HeldOutText(...), "replay": HeldOutText(...)})
write_card(folder, card)                           card.json, index.html, README.md
"""

import math
import platform
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lapis import __version__
from lapis.errors import ConfigError
from lapis.generation.ready import choose_device
from lapis.language.card.bootstrap import Counts, Figure, change, difference, ratio, share_of_way
from lapis.language.card.folder import TUNED
from lapis.language.card.naming import SURE, Languages, name_languages
from lapis.language.card.readme import readme
from lapis.language.card.scores import PROMPTS, HeldOutText, Measured, score_model, time_models
from lapis.model.threads import settle_threads
from lapis.report.pages.card import SHARES, card_page
from lapis.text.tokenizer.folder import read_templates, write_json

Report = Callable[[float, float | None, str], None]


def make_card(
    models: Mapping[str, str | Path],
    languages: Mapping[str, HeldOutText],
    *,
    tuned: str | Path | None = None,
    gap_from: str | None = None,
    how: Mapping[str, Any] | None = None,
    notes: Mapping[str, list[str]] | None = None,
    progress: Report = lambda done, total, label: None,
) -> dict[str, Any]:
    """Measures models side by side.

    Args:
        models: What each is called -> its folder, the first one that was started from, the last one the result.
        languages: "target", and "replay" where something should be kept -> what is measured on.
        tuned: A model that was tuned on chats of the language: the yardstick of `gap_closed`.
        gap_from: What `models` calls the model that was adapted and cannot chat yet, where the gap begins; "" where
            there is none. By default the last but one.
        how: How the result was made: settings, files with digests, seeds, for the card to say.
        notes: What else the card is to say, by what it is about.
        progress: Called with what is done, what there is to do, and what it is.

    Returns:
        `steps`, `languages` (name -> code), `scores` (model -> language -> score -> figure), `changes` (the same, from
        the first model on), `won` and `cost` (the shares by which bits per byte of the target fell and of the replay
        text rose), `gap_closed` (of the way from `gap_from` to `tuned`, by bits per byte of the replies that were
        given), `gaps` (the same of every model, with intervals), `reasons` (why one of these is None), `replies`,
        `notes`, `how`.
    """
    if tuned is not None and TUNED in models:
        raise ConfigError(f"card: a model is called {TUNED}, as the yardstick is; give it another name")
    listed = {**models, **({TUNED: tuned} if tuned is not None else {})}
    template = next((own for name in reversed(listed) if (own := _templates(listed[name]))), None)
    named = name_languages(languages)
    settle_threads(choose_device(None))  # once: models on other numbers of threads do not compare
    measured: dict[str, Measured] = {}
    for name, folder in listed.items():
        measured[name] = score_model(folder, languages, template, partial(_relabel, progress, name))
        for language, replies in measured[name].replies.items():
            code = named.codes[language]
            marks = [float(reply is not None and named.detect(reply)[code] >= SURE) for reply in replies]
            given = [float(reply is not None) for reply in replies]
            measured[name].counts[language]["in_language"] = Counts(marks, given)
    time_models(listed, languages, measured, progress)
    first, last = next(iter(models)), list(models)[-1]
    counts = {name: one.counts for name, one in measured.items()}
    changes = {name: _changes(counts[first], counts[name]) for name in listed if name != first}
    begin = gap_from if gap_from is not None or len(models) < 2 else list(models)[-2]
    gaps, why = _gaps_closed(counts, begin, last)
    gap = gaps.get(last)
    cost = changes.get(last, {}).get("replay", {}).get("bits_per_byte")
    reasons = {"gap_closed": why} if gap is None else {}
    if cost is None:
        reasons["cost"] = "no replay text was given, so nobody knows what was lost"
    won = changes.get(last, {}).get("target", {}).get("bits_per_byte")
    if won is None:
        reasons["won"] = "there is one model only"
    scores = {name: _figures(of_model, languages) for name, of_model in counts.items()}
    return {
        "lapis": __version__,
        "machine": f"{platform.machine()}, {platform.system()}",
        "steps": {name: str(folder) for name, folder in listed.items()},
        "result": last,
        "languages": dict(named.codes),
        "scores": scores,
        "changes": changes,
        "gap_closed": None if gap is None else gap["value"],
        "gap": gap,
        "gap_from": begin or None,
        "gaps": gaps,
        "won": None if won is None else -won["value"],
        "cost": None if cost is None else cost["value"],
        "reasons": reasons,
        "replies": _shown(languages, measured, named),
        "notes": {**(notes or {}), **{name: one.notes for name, one in measured.items() if one.notes}},
        "how": dict(how or {}),
    }


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Writes card.json, index.html and README.md into a folder that is being written."""
    write_json(folder / "card.json", card)
    (folder / "index.html").write_text(card_page(card).render(), encoding="utf-8")
    (folder / "README.md").write_text(readme(card), encoding="utf-8")


def _relabel(progress: Report, name: str, done: float, total: float | None, label: str) -> None:
    progress(done, total, f"{name}: {label}")


def _templates(folder: str | Path) -> dict[str, str]:
    """The chat templates of a model's folder; none for a model of the hub that was not fetched yet."""
    return dict(read_templates(Path(folder))) if Path(folder).is_dir() else {}


def _figures(
    counts: Mapping[str, Mapping[str, Counts]], languages: Mapping[str, HeldOutText]
) -> dict[str, dict[str, Figure]]:
    """Language -> score -> figure; beside the share of right answers, what guessing gives."""
    figures = {
        language: {key: ratio(value) for key, value in each.items() if value.n} for language, each in counts.items()
    }
    for language, each in figures.items():
        if "choices" in each and (chance := languages[language].chance()) is not None:
            each["choices"]["chance"] = chance
    return figures


def _changes(before: Mapping[str, Mapping[str, Counts]], after: Mapping[str, Mapping[str, Counts]]) -> dict[str, Any]:
    """Language -> score -> how much it changed, where both models have it."""
    changes: dict[str, Any] = {}
    for language, each in after.items():
        figures = {
            key: (difference if key in SHARES else change)(before[language][key], counts)
            for key, counts in each.items()
            if key in before[language] and counts.n and before[language][key].n
        }
        changes[language] = {key: figure for key, figure in figures.items() if math.isfinite(figure["value"])}
    return changes


def _gaps_closed(
    counts: Mapping[str, Mapping[str, Mapping[str, Counts]]], begin: str | None, last: str
) -> tuple[dict[str, Figure], str]:
    """How much of the way from one model to the tuned one each of the others went; why nobody knows it of the last."""
    if TUNED not in counts:
        return {}, "no model tuned on chats of the language was given (lapis card --tuned), so there is no yardstick"
    if begin == "":
        return {}, (
            "it begins at a model that was adapted without chat, and there is none among these; name the folder of an "
            "adaptation with onto: base, too"
        )
    if begin in (None, last):
        return {}, "there is no step after the adaptation whose way could be measured"
    key = "response_bits_per_byte"
    of = {name: each["target"][key] for name, each in counts.items() if key in each["target"]}
    if not {begin, last, TUNED} <= of.keys() or not all(of[name].n for name in (begin, last, TUNED)):
        return {}, "there are no chats of the language to measure replies on"
    ways = {name: share_of_way(of[begin], one, of[TUNED]) for name, one in of.items() if name not in (begin, TUNED)}
    if not ways[last]["n"]:
        return {}, f"no chat of the language fits into the contexts of {begin}, {last} and {TUNED} alike"
    known = {name: way for name, way in ways.items() if math.isfinite(way["value"])}
    if last not in known:
        return known, f"{TUNED} finds the replies no likelier than {begin} does, so there is no gap to close"
    return known, ""


def _shown(
    languages: Mapping[str, HeldOutText], measured: Mapping[str, Measured], named: Languages
) -> list[dict[str, Any]]:
    """The first prompts of each language, with every model's reply and the language that it is in."""
    rows = []
    for language, held in languages.items():
        for number, prompt in enumerate(held.prompts()[:PROMPTS]):
            given = {
                name: reply
                for name, one in measured.items()
                if (reply := next(islice(one.replies.get(language, ()), number, None), None)) is not None
            }
            if given:
                spoken = {name: named.of(reply) for name, reply in given.items()}
                rows.append({"language": language, "prompt": prompt, "replies": given, "spoken": spoken})
    return rows
