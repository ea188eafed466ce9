"""The picture of a plan: each piece by what it does for replies and to text.

Rows in, plotly figure out; the shape of a row stands in each docstring. Reached through plots.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lapis.report import theme
from lapis.report.theme import Row, color, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go


NAMED = 16  # points of a scatter that all have their names beside them


def plan_scatter(rows: Iterable[Row], title: str) -> go.Figure:
    """Each layer or piece by what it does for replies and to text; the chosen ones stand out.

    Row: `layer`, `style`, `knowledge` (effects of `lapis plan`, shares), `chosen` (bool), optionally `control` (bool:
    in the random choice of equal size). Of many only those farthest out are named; all are on hovering.
    """
    kept = list(rows)
    if not kept:
        return theme.nothing(title)
    figure = theme.new_figure(title, height=460)
    far = sorted(kept, key=lambda row: -max(rank(kept, row, "style"), rank(kept, row, "knowledge")))
    named = {row["layer"] for row in (kept if len(kept) <= NAMED else far[: NAMED // 2])}
    looks = (
        ("chosen", "chosen", "lapis", "circle", [row for row in kept if row.get("chosen")]),
        ("control", "random control", "orange", "diamond-open", [row for row in kept if row.get("control")]),
        ("rest", "not chosen", "quiet", "circle-open",
         [row for row in kept if not row.get("chosen") and not row.get("control")]),
    )  # fmt: skip
    for key, name, role, symbol, points in looks:
        shown = named - {row["layer"] for row in points if key == "control" and row.get("chosen")}
        if points:
            figure.add_scatter(
                x=[row["knowledge"] for row in points],
                y=[row["style"] for row in points],
                text=[plain(row["layer"]) if row["layer"] in shown else "" for row in points],
                customdata=[plain(row["layer"]) for row in points],
                name=name,
                mode="markers+text",
                textposition="top center",
                textfont={"size": 11, "color": color("quiet")},
                marker={"color": color(role), "symbol": symbol, "size": 16 if key == "control" else 10,
                        "line": {"width": 1.5, "color": color(role)}},
                hovertemplate="%{customdata}<br>replies %{y:.1%}<br>text %{x:+.2%} harder<extra></extra>",
                cliponaxis=False,
            )  # fmt: skip
    theme.axis_title(figure, "how much harder text becomes", "share of the replies' gain")
    figure.update_xaxes(tickformat="+.1~%")
    figure.update_yaxes(tickformat=".0%")
    theme.adapt(figure, height=400, xaxis__nticks=5)
    return figure


def rank(rows: Sequence[Row], row: Row, key: str) -> float:
    """How far out a row lies, as a share of the largest value."""
    return float(row[key]) / (max(abs(other[key]) for other in rows) or 1.0)
