"""The page of training runs: every figure that a learning curve holds, held-out ones too, and replies before and after.

Rows of log.jsonl in, blocks of a page out. A metric needs no word here to be drawn; METRICS only names the known ones
as a reader would. Leaves out: reading files (folders.py), drawing one curve large (training.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lapis.report.figures.curves import METRICS, Runs, learning_curves, metric_panels, metric_points
from lapis.report.figures.matrix import matrix
from lapis.report.markup import Column
from lapis.report.page import Page
from lapis.report.theme import Row

if TYPE_CHECKING:
    pass

AXES_OF_A_RUN = ("lr", "grad_norm", "tokens_per_second")


def run_page(log: Sequence[Row], facts: Mapping[str, Any], name: str) -> Page:
    """The page of one run. log: the rows of log.jsonl; facts: training.json, or {}."""
    objective = str(facts.get("objective", "") or "")
    lead = f"How `{name}` was trained" + (f": objective `{objective}`." if objective else ".")
    page = Page(f"Training of {name}", lead)
    return add_runs(page, {name: log}, {name: facts})


def add_runs(page: Page, runs: Runs, facts: Mapping[str, Mapping[str, Any]]) -> Page:
    """The curves of some runs, on shared axes, with their settings and what else they hold."""
    curves = {name: rows for name, rows in runs.items() if any("loss" in row for row in rows)}
    page.section("Learning curves", "Each point is the mean over a few steps; held-out figures stand on top.")
    if len(curves) == 1:
        ((name, rows),) = curves.items()
        page.stats(_key_figures(rows, facts.get(name, {})))
    x = "tokens" if all(row.get("tokens") for rows in curves.values() for row in rows[-1:]) else "step"
    page.figure(learning_curves(_loss_rows(curves), _finding(curves), x=x))
    if any(row.get("bits_per_byte") is not None for rows in curves.values() for row in rows):
        rows = [{"run": name, **row} for name, mine in curves.items() for row in mine]
        page.figure(learning_curves(rows, "The same in bits per byte, which tokenizers share", x=x, y="bits_per_byte"))
    own = _names(curves, ("metrics", "held_out"))
    if own:
        page.section("What the objective measures", "Dots are held-out figures.")
        page.figure(metric_panels(curves, own, _moved(curves, own), x=x))
    page.section("How the run went", "What the optimizer did, step by step.")
    page.figure(metric_panels(curves, AXES_OF_A_RUN, "Learning rate, gradient, speed", x=x))
    for name, known in facts.items():
        _add_facts(page, name if len(facts) > 1 else "", known)
    return page


def _loss_rows(runs: Runs) -> list[Row]:
    """Rows of learning_curves: the loss, and a held-out loss where there is one."""
    rows: list[Row] = []
    for run, log in runs.items():
        rows += [{**row, "run": run} for row in log if row.get("loss") is not None]
        rows += [
            {**row, "run": run, "split": "held-out", "loss": row["held_out"]["loss"]}
            for row in log if (row.get("held_out") or {}).get("loss") is not None
        ]  # fmt: skip
    return rows


def _names(runs: Runs, keys: Sequence[str]) -> list[str]:
    """Metrics that any row holds, in their order, the loss apart."""
    found = {name for rows in runs.values() for row in rows for key in keys for name in row.get(key) or {}}
    order = [name for rows in runs.values() for row in rows for key in keys for name in row.get(key) or {}]
    return [name for name in dict.fromkeys(order) if name in found and name not in ("loss", "bits_per_byte")]


def _ends(rows: Sequence[Row]) -> tuple[float, float]:
    """Mean loss over the first and the last twentieth of a curve."""
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    few = max(1, len(losses) // 20)
    return sum(losses[:few]) / few, sum(losses[-few:]) / few


def _finding(runs: Runs) -> str:
    if not runs:
        return "No step was taken"
    if len(runs) > 1:
        ends = {name: _ends(rows)[1] for name, rows in runs.items()}
        best = min(ends, key=lambda name: ends[name])
        return f"The loss of {best} ends lowest, at {ends[best]:.3f}"
    first, last = _ends(next(iter(runs.values())))
    verb = "fell" if last < first else "rose" if last > first else "stayed"
    return f"The loss {verb} from {first:.3f} to {last:.3f}"


def _moved(runs: Runs, names: Sequence[str]) -> str:
    """The metric to look at first, from where to where."""
    for name in ("reward", "accuracy", "margin", *names):
        for rows in runs.values():
            points = metric_points(rows, name, "step")
            if name in names and len(points) > 1:
                few = max(1, len(points) // 20)
                first, last = (sum(v for _, v in part) / few for part in (points[:few], points[-few:]))
                known = METRICS.get(name, name.replace("_", " "))
                return f"{known[0].upper()}{known[1:]}: from {first:.3g} to {last:.3g}"
    return "What the objective measures"


def _key_figures(rows: Sequence[Row], facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    last = rows[-1]
    figures = [("loss at the end", f"{_ends(rows)[1]:.3f}", f"{_ends(rows)[0]:.3f} at the start"),
               ("steps", f"{last.get('step', len(rows)):,}", f"{last.get('tokens', 0):,} tokens")]  # fmt: skip
    if last.get("seconds"):
        pace = last.get("tokens", 0) / last["seconds"]
        figures.append(("time", _clock(last["seconds"]), f"{pace:,.0f} tokens per second" if pace else ""))
    held = facts.get("held_out") or last.get("held_out") or {}
    figures += [(f"held-out {name.replace('_', ' ')}", f"{value:.4g}", "")
                for name, value in list(held.items())[:2] if isinstance(value, int | float)]  # fmt: skip
    return figures


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    )


def _valued(row: Mapping[str, Any], key: str) -> str:
    """before, or where it is known: before, reward 0.25."""
    reward = row.get(f"{key}_reward")
    return f"{key}, reward {reward:.2f}" if isinstance(reward, int | float) else key


def _add_facts(page: Page, name: str, facts: Mapping[str, Any]) -> None:
    """Replies before and after, where a run kept some, and its settings."""
    replies = facts.get("replies")
    if isinstance(replies, list) and replies:
        page.section(f"Replies before and after{f', {name}' if name else ''}")
        page.replies([
            {"prompt": str(row.get("prompt", "")),
             "replies": {_valued(row, key): str(row[key]) for key in ("before", "after") if key in row}}
            for row in replies if isinstance(row, Mapping)
        ])  # fmt: skip
    add_confusion(page, facts)
    settings = {**(facts.get("config") or {}), **(facts.get("options") or {})}
    rows = [{"setting": key, "value": str(value)} for key, value in settings.items() if value not in (None, "", {})]
    if rows:
        page.table(rows, [Column("setting"), Column("value")], folded=f"Settings{f' of {name}' if name else ''}")


def add_confusion(page: Page, found: Mapping[str, Any]) -> None:
    """What a classifier took for what, wherever `confusion` and `classes` stand in an object of figures."""
    table, classes = found.get("confusion"), found.get("classes")
    if isinstance(table, list) and table and isinstance(classes, list) and len(classes) == len(table):
        right = sum(line[i] for i, line in enumerate(table))
        total = sum(map(sum, table)) or 1
        wrong = [(line[j], i, j) for i, line in enumerate(table) for j in range(len(line)) if i != j and line[j]]
        title = f"{right / total:.1%} are right"
        if wrong:
            _, i, j = max(wrong)
            title += f"; {classes[i]} is most often taken for {classes[j]}"
        names = [str(name) for name in classes]
        page.section("What is taken for what")
        page.figure(matrix(table, names, names, title, unit="texts", format=",.0f", x="said", y="true"))
    for value in found.values():
        if isinstance(value, Mapping):
            add_confusion(page, value)
