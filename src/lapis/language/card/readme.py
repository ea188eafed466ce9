"""The model card as hubs read it: the object of `lapis card --json` in, README.md out, YAML first.

Nothing of this machine's folders is in it: models of the hub by their ids, all else by the last part of its name.
What models wrote stands in fences, so that no reply can be read as part of the page.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import yaml

from lapis.report.pages.card import (
    CODE,
    FIGURES,
    TOKEN_BOUND,
    UNEVEN,
    counted,
    gap_line,
    gap_row,
    spelled,
    spelled_change,
    title_of,
)
from lapis.wording import HUB_ID, without_folders

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this folder, or its name on the hub
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
```"""


def readme(card: Mapping[str, Any]) -> str:
    """README.md of a card.

    Args:
        card: What `make_card` returns; of its `how` the keys `language`, `license`, `base_models`, `title`, `settings`,
            `data`, `models` are read.
    """
    how, scores = card["how"], card["scores"]
    first, last = next(iter(scores)), card["result"]
    lines = ["---", yaml.safe_dump(metadata(card), allow_unicode=True, sort_keys=True).strip(), "---", ""]
    title = how.get("title") or PurePath(card["steps"][last]).parent.name or last
    way = f", from {_plain(first)} to {_plain(last)}" if first != last else ""
    lines += [f"# {_plain(title)}", "", f"Made by lapis {card['lapis']}{way}.", ""]
    lines += ["## What was won, and what was lost", "", *_changes(card, first, last), ""]
    lines += ["## Scores", "", "In brackets: 95 % bootstrap intervals over what was measured on."]
    for language in scores[first]:
        lines += ["", f"### {title_of(card, language)}", "", *_scores(card, language)]
    notes = [f"- {_plain(name)}: {_plain(note)}" for name, many in card["notes"].items() for note in many]
    lines += ["", *notes, *([""] if notes else []), f"Characters per second: on {_plain(card['machine'])}."]
    if card["replies"]:
        lines += ["", "## Replies", "", "The likeliest token each time; the same prompts for every model.", ""]
        lines += ["<details><summary>Show them</summary>", "", *_replies(card, (first, last)), "</details>"]
    lines += ["", "## How it was made", "", "| | |", "|---|---|"]
    settings, named = how.get("settings") or {}, {**(how.get("data") or {})}
    for role, files in (how.get("models") or {}).items():
        named |= {f"{role}: {name}": digest for name, digest in files.items()}
    lines += [f"| {_plain(key)} | {_plain(without_folders(value))} |" for key, value in settings.items()]
    lines += [f"| {_plain(without_folders(name))} (sha256) | `{digest}` |" for name, digest in named.items()]
    lines += ["", "## Licence", ""]
    licence = how.get("license")
    lines.append(
        f"{_plain(licence)}; that of the model it was made from, and of the texts, hold as well."
        if licence
        else "No licence is stated here. That of the model it was made from, and of the texts, hold."
    )
    lines += ["", "## Use", "", USE, ""]
    return "\n".join(lines)


def metadata(card: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML head, in the hub's fields."""
    how = card["how"]
    spoken = [
        how.get("language"),
        *(card["languages"][name] for name in ("target", "replay") if name in card["languages"]),
    ]
    codes = list(dict.fromkeys(code for code in spoken if code and CODE.fullmatch(code)))
    tags = ["lapis", "language-adaptation"]
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if codes:
        head["language"] = codes
    if how.get("license"):
        head["license"] = how["license"]
    parents = [name for name in how.get("base_models") or () if HUB_ID.fullmatch(name)]
    if parents:
        head["base_model"] = parents
        head["base_model_relation"] = "merge" if len(parents) > 1 else "finetune"
    return head


def _changes(card: Mapping[str, Any], first: str, last: str) -> list[str]:
    changes = card["changes"].get(last, {})
    heads = [title_of(card, language) for language in changes]
    lines = [_line([f"from {_plain(first)} to {_plain(last)}", *heads]), "|---" * (1 + len(changes)) + "|"]
    lines = lines if changes else []
    for key, (label, _, better) in FIGURES.items():
        if key in TOKEN_BOUND or not any(key in each for each in changes.values()):
            continue
        cells = []
        for each in changes.values():
            value, interval = spelled_change(key, each[key]) if key in each else ("–", "")
            cells.append(f"{value} ({interval}; {counted(key, each[key]['n'])})" if interval else value)
        lines.append(_line([f"{label} ({better} is better)", *cells]))
    if card["gap"]:
        lines += ["", _plain(" ".join(gap_line(card)))]
    for key, why in card["reasons"].items():
        lines += ["", f"{key.replace('_', ' ').capitalize()}: not known; {why}."]
    return lines


def _scores(card: Mapping[str, Any], language: str) -> list[str]:
    scores = card["scores"]
    lines = [_line(["", *map(_plain, scores), "measured on"]), "|---" * (2 + len(scores)) + "|"]
    uneven = False
    for key, (label, _, better) in FIGURES.items():
        known = [each[language][key] for each in scores.values() if key in each[language]]
        if known:
            cells = [spelled(key, each[language][key]) if key in each[language] else "–" for each in scores.values()]
            counts = [figure["n"] for figure in known]
            lines.append(_line([f"{label} ({better} is better)", *cells, counted(key, min(counts), max(counts))]))
            uneven |= min(counts) < max(counts)
    gaps, chats = gap_row(card) if language == "target" else ({}, "")
    if gaps:
        lines.append(_line(["gap closed (more is better)", *(gaps.get(name, "–") for name in scores), chats]))
    return [*lines, *(["", UNEVEN] if uneven else [])]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _replies(card: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    lines = []
    for row in card["replies"]:
        lines += _fenced("prompt", row["prompt"])
        for name in dict.fromkeys(names):
            if name in row["replies"]:
                lines += _fenced(name, row["replies"][name])
        lines.append("---")
        lines.append("")
    return lines[:-2]


def _fenced(label: str, text: str) -> list[str]:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{_plain(label)}:", "", f"{fence}text", text.strip(), fence, ""]


def _plain(value: object) -> str:
    """Text in a line of Markdown: no line ends, and nothing that is markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))
