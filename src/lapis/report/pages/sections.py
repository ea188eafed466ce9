"""Sections of a report that are made from the JSON of other commands: merges, diffs, lenses, models and scores.

The objects come from files, so each value is looked at before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal

from lapis.report import plots
from lapis.report.evaluations import Metric, scores
from lapis.report.markup import Column
from lapis.report.page import Page

Objects = Mapping[str, Mapping[str, Any]]


def add_merges(page: Page, accounts: Objects) -> None:
    """What was merged: one table of all, and the inputs and reasons of each behind it."""
    one = len(accounts) == 1
    name = next(iter(accounts))
    page.section(f"What was merged: {name}" if one else "What was merged")
    rows = []
    for name, account in accounts.items():
        counts = account.get("counts") or {}
        inputs = {role: entry for role, entry in (account.get("inputs") or {}).items() if isinstance(entry, Mapping)}
        rows.append({
            "name": name, "by": f"lapis {account.get('command', 'merge')}",
            "inputs": ", ".join(f"{role} = {entry.get('source', '')}" for role, entry in inputs.items()),
            **{key: counts.get(key) for key in ("merged", "copied", "skipped")},
            "lost": account.get("lost_to_rounding"),
        })  # fmt: skip
    page.table(rows, [
        "name", "by", Column("merged", group="tensors"), Column("copied", group="tensors"),
        Column("skipped", group="tensors"), Column("lost", "lost to rounding", ".2%"), "inputs",
    ])  # fmt: skip
    for name, account in accounts.items():
        for note in account.get("notes") or []:
            page.text(f"Note: {note}" if one else f"Note on {name}: {note}")
        skipped = [row for row in account.get("skipped") or [] if isinstance(row, Mapping)]
        if skipped:
            of = "" if one else f" of {name}"
            page.table(skipped, ["role", "name", "reason"], folded=f"What was skipped{of}, and why")


def add_diff(page: Page, name: str, table: Mapping[str, Any]) -> None:
    """What changed between two models, from what `lapis diff --json` prints."""
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
        apart = [row for row in sorted(first, key=lambda row: -row["relative_norm"])[:3] if row["relative_norm"] > 0]
        named = ", ".join(str(row["token"]) for row in apart)
        page.figure(plots.embedding_rows(first, f"{named} moved most" if apart else "No row moved"))


def add_lens(page: Page, name: str, trace: Mapping[str, Any]) -> None:
    """What each layer would say, from what `lapis lens --json` prints."""
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
        page.figure(plots.lens_grid(cells, lens_finding(trace)))
    if ranks:
        page.figure(plots.rank_trajectories(ranks, "How the tracked words rank"))


def lens_finding(trace: Mapping[str, Any]) -> str:
    """What the last layer says."""
    layers = [row for row in trace["layers"] if isinstance(row, Mapping) and row.get("top")]
    return f"The last layer says “{layers[-1]['top'][0]['token']}”" if layers else ""


def add_models(page: Page, models: Objects) -> None:
    """Models in numbers, from what `lapis inspect --json` prints."""
    page.section("Models in numbers", "Counted from their shapes.")
    rows = []
    for name, model in models.items():
        memory, flops = model.get("memory") or {}, model.get("flops") or {}
        rows.append({
            "model": short(str(model.get("model", name))), "family": model.get("family"),
            "layers": len(model["layers"]),
            "parameters": model["parameters"].get("total"), "embedding": model["parameters"].get("embedding"),
            "weights": _scaled(memory.get("weights_bytes"), 1e9), "cache": _scaled(memory.get("kv_cache_bytes"), 1e9),
            "flops": _scaled(flops.get("per_token"), 1e9),
        })  # fmt: skip
    columns = [
        Column("model"), Column("family"), Column("layers"), Column("parameters", format=","),
        Column("embedding", "of them embedding", ","),
        Column("weights", format=".3g", unit="GB"), Column("cache", "KV cache", ".3g", unit="GB"),
        Column("flops", "FLOPs per token", ".3g", unit="G"),
    ]  # fmt: skip
    page.table(
        rows, [column for column in columns if any(row[column.key] is not None for row in rows)], sortable=len(rows) > 1
    )


def _scaled(value: Any, unit: float) -> float | None:
    return value / unit if isinstance(value, int | float) else None


def add_scores(page: Page, results: Objects) -> None:
    """A table for each kind of evaluation or task, a row for each model; of one model the last that was read."""
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    metrics: dict[str, dict[str, Metric]] = {}
    for name, value in results.items():
        model = short(str(value.get("model", name)))
        rows: dict[str, dict[str, Any]] = {}
        for score in scores(value):
            if isinstance(score.value, int | float) and not isinstance(score.value, bool):
                rows.setdefault(score.subject, {})[score.metric.key] = score.value
                metrics.setdefault(score.subject, {})[score.metric.key] = score.metric
        for subject, row in rows.items():
            tables.setdefault(subject, {})[model] = row
    page.section("Scores")
    for subject, of_models in tables.items():
        columns = [
            Column(metric.key, metric.label, unit="" if metric.unit == "share" else metric.unit,
                   best=_BEST[metric.better] if len(of_models) > 1 else "")
            for metric in metrics[subject].values()
        ]  # fmt: skip
        rows_of_table = [{"model": model, **row} for model, row in of_models.items()]
        page.table(rows_of_table, ["model", *columns], f"On {subject}")


_BEST: dict[str, Literal["", "min", "max"]] = {"higher": "max", "lower": "min", "neither": ""}


def short(source: str) -> str:
    """A model's name without the folders that lead to it; a hub id whole."""
    return source if source.count("/") == 1 and not source.startswith((".", "/")) else PurePath(source).name or source
