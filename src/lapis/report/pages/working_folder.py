"""All that a run left behind, as one page: learning curves, what a merge did, and the pages and JSON of other commands.

What is looked for in a folder and in its subfolders, two levels deep: `log.jsonl` with `training.json` (lapis train),
`lapis-merge.json` (graft, merge), pages written with --html, and, kept in a .json file, what --json printed of
`lapis diff`, `lens` and `eval`, or a classifier's classes.json. Leaves out: everything else, models among it; links
are not followed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lapis.errors import DataError
from lapis.report import plots
from lapis.report.markup import Column
from lapis.report.page import Page
from lapis.report.pages.joined import Joined, is_ours, read_page
from lapis.report.pages.training import add_confusion, add_runs

DEPTH = 2
JSON_LIMIT = 256_000_000
OF_MODELS = (
    "config.json",
    "tokenizer",
    "vocab",
    "special_tokens",
    "generation_config",
    "lapis-manifest",
    "preprocessor",
)

SCORED = ("text", "chats", "choices", "classes")  # what `lapis eval --json` tells of

Found = dict[str, Any]


@dataclass
class Kept:
    """What was found, by the name of its folder or file."""

    logs: dict[str, list[Found]] = field(default_factory=dict)
    facts: dict[str, Found] = field(default_factory=dict)
    merges: dict[str, Found] = field(default_factory=dict)
    diffs: dict[str, Found] = field(default_factory=dict)
    lenses: dict[str, Found] = field(default_factory=dict)
    scores: dict[str, Found] = field(default_factory=dict)
    pages: list[Joined] = field(default_factory=list)


def report_of(folders: Sequence[Path | str]) -> Page:
    """The page of some folders. Raises DataError for one that is not there, for a damaged file, and for nothing."""
    kept = Kept()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DataError(f"report: {folder}: there is no such folder; give folders that lapis has written")
        _look(folder, folder.resolve().name, kept, DEPTH)
    names = ", ".join(Path(folder).resolve().name for folder in folders)
    page = Page(f"Report on {names}", "What these folders hold, on one page.")
    if kept.logs:
        add_runs(page, kept.logs, kept.facts)
    for name, account in kept.merges.items():
        _add_merge(page, name, account)
    for name, table in kept.diffs.items():
        _add_diff(page, name, table)
    for name, trace in kept.lenses.items():
        _add_lens(page, name, trace)
    if kept.scores:
        _add_scores(page, kept.scores)
    for joined in kept.pages:
        page.chapter(joined.title, joined.blocks, joined.figures)
    if not any(vars(kept).values()):
        raise DataError(f"report: {names}: nothing that lapis draws (log.jsonl, lapis-merge.json, .json, .html)")
    return page


def _look(folder: Path, name: str, kept: Kept, depth: int) -> None:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if depth:
                _look(path, f"{name}/{entry.name}", kept, depth - 1)
        elif entry.is_file(follow_symlinks=False):
            _take(path, name, kept)


def _take(path: Path, name: str, kept: Kept) -> None:
    """Sorts one file into what is kept, if it is one of ours."""
    if path.name == "log.jsonl":
        kept.logs[name] = _rows(path)
    elif path.name == "training.json":
        kept.facts[name] = {**kept.facts.get(name, {}), **_object(path)}
    elif path.name == "replies.jsonl":
        kept.facts[name] = {**kept.facts.get(name, {}), "replies": _rows(path)}
    elif path.name == "lapis-merge.json":
        kept.merges[name] = _object(path)
    elif path.suffix == ".html" and is_ours(path):
        kept.pages.append(read_page(path))
    elif path.suffix == ".json" and not path.name.startswith(OF_MODELS) and not path.name.endswith(".index.json"):
        try:
            found = _object(path)
        except DataError:
            return  # some other program's
        label = f"{name}/{path.stem}"
        if isinstance(found.get("tensors"), list) and isinstance(found.get("total"), dict):
            kept.diffs[label] = found
        elif isinstance(found.get("layers"), list) and isinstance(found.get("tokens"), list):
            kept.lenses[label] = found
        elif isinstance(found.get("confusion"), list) or any(isinstance(found.get(part), dict) for part in SCORED):
            kept.scores[label] = found


def _object(path: Path) -> Found:
    if path.stat().st_size > JSON_LIMIT:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes of JSON; the limit is {JSON_LIMIT:,}")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}; write it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__}, not an object")
    return found


def _rows(path: Path) -> list[Found]:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"{path}: line {number} is not JSON; cut it off, or train again") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number} holds a {type(row).__name__}, not an object")
            rows.append(row)
    return rows


def _add_merge(page: Page, name: str, account: Mapping[str, Any]) -> None:
    counts, lost = account.get("counts") or {}, account.get("lost_to_rounding")
    page.section(f"What was merged: {name}", f"By `lapis {account.get('command', 'merge')}`.")
    page.stats([
        ("tensors merged", f"{counts.get('merged', 0):,}", f"{counts.get('copied', 0):,} copied as they are"),
        ("skipped", f"{counts.get('skipped', 0):,}", "each with a reason"),
        *([("lost to rounding", f"{lost:.2%}", "of the difference, by norm")] if isinstance(lost, int | float) else []),
    ])  # fmt: skip
    inputs = [
        {"input": role, "source": entry.get("source", ""), "GB": entry.get("bytes", 0) / 1e9}
        for role, entry in (account.get("inputs") or {}).items() if isinstance(entry, Mapping)
    ]  # fmt: skip
    page.table(inputs, ["input", "source", Column("GB", "size", ",.2f", unit="GB")], "Inputs")
    for note in account.get("notes") or []:
        page.text(f"Note: {note}")
    skipped = [row for row in account.get("skipped") or [] if isinstance(row, Mapping)]
    if skipped:
        page.table(skipped, ["role", "name", "reason"], folded="What was skipped, and why")


def _add_diff(page: Page, name: str, table: Mapping[str, Any]) -> None:
    page.section(f"What changed: {name}", "Each cell is one component of one layer.")
    rows = [row for row in table["tensors"] if isinstance(row, Mapping) and row.get("kind", "weight") == "weight"]
    rows = [row for row in rows if isinstance(row.get("relative_norm"), int | float) and "component" in row]
    if rows:
        most = max(rows, key=lambda row: row["relative_norm"])
        page.figure(
            plots.layer_heatmap(rows, f"{most['name']} changed most, by {most['relative_norm']:.2%} of its length")
        )
    moved = [row for row in table.get("rows") or [] if isinstance(row, Mapping)]
    if moved:
        first = [row for row in moved if row.get("tensor") == moved[0].get("tensor")]
        named = ", ".join(str(r["token"]) for r in sorted(first, key=lambda r: -r["relative_norm"])[:3])
        page.figure(plots.embedding_rows(first, f"{named} moved most"))


def _add_lens(page: Page, name: str, trace: Mapping[str, Any]) -> None:
    layers = [row for row in trace["layers"] if isinstance(row, Mapping) and row.get("top")]
    page.section(f"Layer by layer: {name}", "What each layer would say next, if the model ended there.")
    page.samples(["".join(map(str, trace["tokens"]))], "The prompt")
    ranks = [
        {"word": word, "layer": row["layer"], "rank": rank}
        for row in layers for word, rank in list((row.get("ranks") or {}).items())[:6]
    ]  # fmt: skip
    cells = [
        {"layer": -1 if cell.get("layer") is None else cell["layer"], "position": cell["position"],
         "token": trace["tokens"][cell["position"]], "top": [(t["token"], t["probability"]) for t in cell["top"]]}
        for cell in trace.get("grid") or [] if isinstance(cell, Mapping) and cell.get("top")
    ]  # fmt: skip
    if len({cell["position"] for cell in cells}) > 1:
        page.figure(plots.lens_grid(cells, f"The last layer says “{layers[-1]['top'][0]['token']}”"))
    if ranks:
        page.figure(plots.rank_trajectories(ranks, "How the tracked words rank"))


def _add_scores(page: Page, scores: Mapping[str, Mapping[str, Any]]) -> None:
    rows = [
        {"model": str(found.get("model", name)), **{
            f"{part} {key}".replace("_", " ").strip(): value
            for part, figures in (("", found), *((part, found.get(part)) for part in SCORED))
            if isinstance(figures, Mapping)
            for key, value in figures.items() if isinstance(value, int | float)
        }} for name, found in scores.items()
    ]  # fmt: skip
    page.section("Scores")
    page.table(rows, list(dict.fromkeys(key for row in rows for key in row)))
    for found in scores.values():
        add_confusion(page, found)
