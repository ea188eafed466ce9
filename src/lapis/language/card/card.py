"""The card of an adaptation: what was won, what it cost, and how it was made, as a page and as the hub's README.md.

card = make_card({"start": ..., "adapted": ...}, {"target": HeldOutText(...), "replay": HeldOutText(...)})
write_card(folder, card)                           card.json, index.html, README.md
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lapis import __version__
from lapis.language.card.scores import HeldOutText, prompts_of, score_model
from lapis.report.pages.card import card_page
from lapis.text.tokenizer.folder import write_json

Report = Callable[[float, float | None, str], None]


def make_card(
    models: Mapping[str, str | Path],
    languages: Mapping[str, HeldOutText],
    *,
    how: Mapping[str, Any] | None = None,
    progress: Report = lambda done, total, label: None,
) -> dict[str, Any]:
    """Measures models side by side.

    Args:
        models: What each is called -> its folder, the first one that was started from, the last one the result.
        languages: "target", and "replay" where something should be kept -> what is measured on.
        how: How the result was made: settings, files with digests, seeds, for the card to say.
        progress: Called with what is done, what there is to do, and what it is.

    Returns:
        `steps`, `scores`, `gap_closed` (None: that takes a model that was tuned), `cost` (by how much the replay text's
        bits per byte rose, as a share; None without such a text), `won` (by how much the target's fell), `replies`,
        `how`.
    """
    scores, replies = {}, {}
    for name, folder in models.items():

        def relabel(done: float, total: float | None, label: str, name: str = name) -> None:
            progress(done, total, f"{name}: {label}")

        scores[name], replies[name] = score_model(folder, languages, relabel)
    first, last = next(iter(models)), list(models)[-1]
    shown = [
        {
            "language": language,
            "prompt": prompt,
            "replies": {name: given[language][i] for name, given in replies.items() if language in given},
        }
        for language, held in languages.items()
        for i, prompt in enumerate(prompts_of(held.chats))
    ]
    return {
        "lapis": __version__,
        "steps": {name: str(folder) for name, folder in models.items()},
        "scores": scores,
        "gap_closed": None,
        "won": _change(scores[first]["target"], scores[last]["target"]),
        "cost": -_change(scores[first]["replay"], scores[last]["replay"]) if "replay" in languages else None,
        "replies": [row for row in shown if row["replies"]],
        "how": dict(how or {}),
    }


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Writes card.json, index.html and README.md into a folder that is being written."""
    write_json(folder / "card.json", card)
    (folder / "index.html").write_text(card_page(card).render(), encoding="utf-8")
    (folder / "README.md").write_text(readme(card), encoding="utf-8")


def readme(card: Mapping[str, Any]) -> str:
    """The model card as hubs read it: YAML first, then what a person wants to know."""
    how, scores = card["how"], card["scores"]
    first, last = next(iter(scores)), list(scores)[-1]
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["lapis", "language-adaptation"]}
    if how.get("language"):
        head["language"] = [how["language"]]
    if how.get("base"):
        head["base_model"] = [how["base"]] + ([how["chat"]] if how.get("chat") else [])
    lines = ["---", yaml.safe_dump(head, allow_unicode=True, sort_keys=True).strip(), "---", ""]
    lines += [f"# {Path(card['steps'][last]).parent.name or last}", ""]
    lines += [f"Made by lapis {card['lapis']} from {first} to {last}.", ""]
    lines += ["| | " + " | ".join(_heads(scores)) + " |", "|---" * (1 + len(_heads(scores))) + "|"]
    for name, languages in scores.items():
        cells = [_cell(languages[language].get(key)) for language, key in _columns(scores)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "In brackets: 95 % bootstrap intervals over documents or chats.", ""]
    lines.append(f"**Won**: {card['won']:.1%} fewer bits per byte of the language.")
    if card["cost"] is not None:
        lines.append(f"**Lost**: {card['cost']:.1%} more bits per byte of the replay text.")
    lines += ["", "## How it was made", "", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | `{value}` |" for key, value in how.items() if not isinstance(value, Mapping)]
    for name, digest in (how.get("data") or {}).items():
        lines.append(f"| {name} (sha256) | `{digest}` |")
    return "\n".join([*lines, ""])


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """By which share bits per byte of `after` are below those of `before`."""
    return 1 - float(after["bits_per_byte"]["value"]) / float(before["bits_per_byte"]["value"])


def _columns(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    listed = {(language, key): None for each in scores.values() for language in each for key in each[language]}
    return list(listed)


def _heads(scores: Mapping[str, Any]) -> list[str]:
    return [f"{language}: {key.replace('_', ' ')}" for language, key in _columns(scores)]


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "–"
    low, high = figure["interval"]
    return f"{figure['value']:.3g} [{low:.3g}, {high:.3g}] n={figure['n']}"
