"""The page of a search of a recipe's scales: what was won, beside random settings and a grid.

Takes the object that `lapis plan --merge --json` prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lapis.report import plots
from lapis.report.markup import Column
from lapis.report.page import Page
from lapis.report.pages.sections import short

WAYS = {"start": "the recipe as it was", "search": "search", "random": "random", "grid": "grid"}


def search_page(result: Mapping[str, Any]) -> Page:
    """The page of one search."""
    page = Page("Scales of a recipe", f"`{short(result['recipe'])}`, {result['evaluations']} evaluations.")
    page.section("What was won", f"**{result['finding'][0].upper()}{result['finding'][1:]}.**")
    rows = [_row(result, way, row) for way, row in result["confirmed"].items()]
    page.table(
        rows, _columns(result), "The best of each, on chats and texts that were not searched on", mark=["search"]
    )
    ways = [way for way in WAYS if way != "start"]
    runs = {WAYS[way]: _best_so_far(result, way) for way in ways}
    page.figure(
        plots.metric_panels(runs, ["best so far"], "The best so far, by evaluations", x="evaluation"),
        "The mean logarithm of response NLL and bits per byte, beside the recipe as it was: 0 is no change, less is "
        "better.",
    )
    page.section("Every setting", "On the chats and texts that were searched on.")
    page.table([_row(result, row["by"], row) for row in result["tried"]], _columns(result), sortable=True)
    for note in result["notes"]:
        page.text(f"Note: {note}")
    return page


def _best_so_far(result: Mapping[str, Any], way: str) -> list[dict[str, Any]]:
    best, rows = float("inf"), list[dict[str, Any]]()
    for row in result["tried"]:
        if row["by"] == way or (way == "search" and row["by"] == "start"):
            best = min(best, row["score"])
            rows.append({"evaluation": len(rows) + 1, "best so far": best})
    return rows


def _row(result: Mapping[str, Any], way: str, row: Mapping[str, Any]) -> dict[str, Any]:
    values = {knob["name"]: value for knob, value in zip(result["knobs"], row["values"], strict=True)}
    return {"by": WAYS[way], **values, **{key: row[key] for key in row if key not in ("by", "values")}}


def _columns(result: Mapping[str, Any]) -> list[str | Column]:
    knobs = [Column(knob["name"], knob["name"], ".3f", group="scales") for knob in result["knobs"]]
    figures = (
        Column("response_nll", "response NLL", ".4f", unit="nats"),
        Column("bits_per_byte", "bits per byte", ".4f"),
        Column("score", "beside the recipe", "+.4f"),
    )
    return [Column("by", ""), *knobs, *(column for column in figures if column.key in result["tried"][0])]
