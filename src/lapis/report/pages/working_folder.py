"""All that a working folder holds, as one page: a table first, then each kind of thing once.

What is looked for in a folder and in its subfolders, two levels deep: `log.jsonl` with `training.json`, `times.json`
(lapis train), `lapis-merge.json` (graft, merge, fuse), pages written with --html, and, kept in a .json file, what
--json printed of `lapis diff`, `lens`, `plan`, `inspect` and `eval`, or a classifier's classes.json. Models and
everything else are left alone; links are not followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lapis.errors import DataError
from lapis.parsing import ParseError, parse_json
from lapis.report.evaluations import kinds_in
from lapis.report.markup import Column
from lapis.report.page import Page
from lapis.report.pages import sections
from lapis.report.pages.certificate import certificate_title
from lapis.report.pages.joined import Joined, is_ours, read_page
from lapis.report.pages.plan import add_plan
from lapis.report.pages.training import UNITS, Run, add_confusion, add_runs, title_of
from lapis.wording import format_count

DEPTH = 2
JSON_LIMIT = 96_000_000
LINE_LIMIT = 16_000_000
OPEN_PAGES = 3  # so many pages of other commands stand open; more are folded
OF_MODELS = (
    "config.json",
    "tokenizer",
    "vocab",
    "special_tokens",
    "generation_config",
    "lapis-manifest",
    "preprocessor",
)

Json = dict[str, Any]


@dataclass
class Contents:
    """What folders hold, by the name of its folder or file."""

    logs: dict[str, list[Json]] = field(default_factory=dict)
    facts: dict[str, Json] = field(default_factory=dict)
    merges: dict[str, Json] = field(default_factory=dict)
    diffs: dict[str, Json] = field(default_factory=dict)
    lenses: dict[str, Json] = field(default_factory=dict)
    plans: dict[str, Json] = field(default_factory=dict)
    models: dict[str, Json] = field(default_factory=dict)
    scores: dict[str, Json] = field(default_factory=dict)
    pages: dict[str, Joined] = field(default_factory=dict)

    def runs(self) -> dict[str, list[Run]]:
        """The training runs, by objective: losses of different objectives are no quantities of one kind."""
        groups: dict[str, list[Run]] = {}
        for name, log in self.logs.items():
            run = Run.of(name, log, self.facts.get(name, {}))
            groups.setdefault(run.objective, []).append(run)
        return groups

    def drop_doubles(self) -> None:
        """Leaves each thing once: a page stands for the JSON of the same name, a log for the pages of its run."""
        runs = [name.rpartition("/")[2] for name in self.logs]
        titles = {title(name) for name in runs for title in (title_of, certificate_title)}
        self.pages = {name: page for name, page in self.pages.items() if page.title not in titles}
        for group in (self.diffs, self.lenses, self.plans, self.models):
            for name in [name for name in group if name in self.pages]:
                del group[name]


def report_of(folders: Sequence[Path | str]) -> Page:
    """The page of some folders.

    Args:
        folders: What lapis has written, or where its JSON and pages lie.

    Raises:
        DataError: A folder is not there, a file is damaged, or there is nothing that can be shown.
    """
    contents = Contents()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DataError(f"report: {folder}: there is no such folder; give folders that lapis has written")
        _look(folder, folder.resolve().name, contents, DEPTH)
    names = ", ".join(Path(folder).resolve().name for folder in folders)
    if not any(vars(contents).values()):
        raise DataError(f"report: {names}: nothing that lapis draws (log.jsonl, lapis-merge.json, .json, .html)")
    contents.drop_doubles()
    page = Page(f"Report on {names}", "What these folders hold, on one page.")
    with _drawing(names):
        entries = _entries(contents)
    if len(entries) > 1:
        page.table(entries, ["name", Column("kind", "what it is"), Column("figure", "in short")], "What is here")
    with _drawing(", ".join(contents.logs)):
        groups = contents.runs()
        for objective, runs in groups.items():
            add_runs(page, runs, objective if len(groups) > 1 else "")
    if contents.merges:
        with _drawing(", ".join(contents.merges)):
            sections.add_merges(page, contents.merges)
    for name, table in contents.diffs.items():
        with _drawing(name):
            sections.add_diff(page, name, table)
    for name, plan in contents.plans.items():
        with _drawing(name):
            add_plan(page, plan, f": {name}")
    for name, trace in contents.lenses.items():
        with _drawing(name):
            sections.add_lens(page, name, trace)
    if contents.models:
        with _drawing(", ".join(contents.models)):
            sections.add_models(page, contents.models)
    if contents.scores:
        with _drawing(", ".join(contents.scores)):
            sections.add_scores(page, contents.scores)
            for name, figures in contents.scores.items():
                add_confusion(page, figures, name if len(contents.scores) > 1 else "")
    folded = len(contents.pages) > OPEN_PAGES
    for joined in contents.pages.values():
        page.chapter(joined.title, joined.blocks, joined.figures, folded=folded)
    return page


@contextmanager
def _drawing(names: str) -> Iterator[None]:
    """Tells what a file that is not as lapis writes it does to what is drawn from it: values of other types, mostly."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"report: {names:.200}: is not as lapis writes it ({why:.120}); write it again") from None


def _entries(contents: Contents) -> list[dict[str, str]]:
    """A line for each thing: its name, its kind, and the one figure that says most."""
    rows: list[tuple[str, str, str]] = []
    for objective, runs in contents.runs().items():
        for run in runs:
            loss = "" if run.last_loss is None else f"loss {run.last_loss:.3f} {UNITS.get(objective, '')}".strip()
            loss += f", held-out {run.held_out[-1][1]:.3f}" if run.held_out else ""
            rows.append((run.name, f"training, {objective}" if objective else "training", loss))
    for name, account in contents.merges.items():
        merged = (account.get("counts") or {}).get("merged", 0)
        rows.append((name, str(account.get("command", "merge")), f"{format_count(merged, 'tensor')} merged"))
    for name, table in contents.diffs.items():
        size = table["total"].get("relative_norm")
        rows.append((name, "diff", f"changed by {size:.2%}" if isinstance(size, float) else ""))
    rows += [(name, "plan", str(plan.get("finding", ""))) for name, plan in contents.plans.items()]
    rows += [(name, "lens", sections.lens_finding(trace)) for name, trace in contents.lenses.items()]
    for name, model in contents.models.items():
        rows.append((name, "inspect", f"{model['parameters'].get('total', 0):,} parameters"))
    for name, figures in contents.scores.items():
        rows.append((name, f"scores of {figures.get('model', name)}", ", ".join(kinds_in(figures))))
    rows += [(name, "page", joined.title) for name, joined in contents.pages.items()]
    return [{"name": name, "kind": kind, "figure": figure} for name, kind, figure in rows]


def _look(folder: Path, name: str, contents: Contents, depth: int) -> None:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if depth:
                _look(path, f"{name}/{entry.name}", contents, depth - 1)
        elif entry.is_file(follow_symlinks=False):
            _take(path, name, contents)


def _take(path: Path, name: str, contents: Contents) -> None:
    """Sorts one file into the contents, if it is one of ours."""
    if path.name == "log.jsonl":
        contents.logs[name] = _rows(path)
    elif path.name == "training.json":
        contents.facts[name] = {**contents.facts.get(name, {}), **_object(path)}
    elif path.name == "times.json":
        contents.facts[name] = {**contents.facts.get(name, {}), "times": _object(path)}
    elif path.name == "replies.jsonl":
        contents.facts[name] = {**contents.facts.get(name, {}), "replies": _rows(path)}
    elif path.name == "lapis-merge.json":
        contents.merges[name] = _object(path)
    elif path.suffix == ".html" and is_ours(path):
        contents.pages[f"{name}/{path.stem}"] = read_page(path)
    elif path.suffix == ".json" and not path.name.startswith(OF_MODELS) and not path.name.endswith(".index.json"):
        try:
            value = _object(path)
        except DataError:
            return  # some other program's
        _take_json(value, f"{name}/{path.stem}", contents)


def _take_json(value: Json, label: str, contents: Contents) -> None:
    """Tells the objects that --json prints apart by the keys that other programs rely on."""
    if isinstance(value.get("tensors"), list) and isinstance(value.get("total"), dict):
        contents.diffs[label] = value
    elif isinstance(value.get("pieces"), list) and isinstance(value.get("tune"), list):
        contents.plans[label] = value
    elif isinstance(value.get("layers"), list) and isinstance(value.get("tokens"), list):
        contents.lenses[label] = value
    elif isinstance(value.get("parameters"), dict) and isinstance(value.get("layers"), list):
        contents.models[label] = value
    elif kinds_in(value):
        contents.scores[label] = value


def _object(path: Path) -> Json:
    if path.stat().st_size > JSON_LIMIT:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes of JSON; the limit is {JSON_LIMIT:,}")
    try:
        value = parse_json(path.read_bytes())
    except ParseError as error:
        raise DataError(f"{path}: {error}; write it again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def _rows(path: Path) -> list[Json]:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT), b""), 1):
            try:
                row = parse_json(line)
            except ParseError as error:
                raise DataError(f"{path}: line {number}: {error}; cut it off, or train again") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number} holds a {type(row).__name__}, not an object")
            rows.append(row)
    return rows


def run_of(folder: Path) -> Run:
    """The run of one folder that `lapis train` wrote, with replies and a classifier's confusion matrix.

    Raises:
        DataError: A file is damaged.
    """
    contents = Contents()
    for name in ("log.jsonl", "training.json", "times.json", "replies.jsonl"):
        if (folder / name).is_file():
            _take(folder / name, folder.name, contents)
    facts = contents.facts.get(folder.name, {})
    if (folder / "classes.json").is_file():
        facts = {**facts, "classes.json": _object(folder / "classes.json")}
    return Run.of(folder.name, contents.logs.get(folder.name, []), facts)
