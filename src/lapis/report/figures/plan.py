"""Pictures of a plan: the choice in the stack, and each piece by what it does for replies and to text.

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
    everything = list(rows)
    if not everything:
        return theme.nothing(title)
    figure = theme.new_figure(title, height=460)
    far = sorted(everything, key=lambda row: -max(rank(everything, row, "style"), rank(everything, row, "knowledge")))
    named = {row["layer"] for row in (everything if len(everything) <= NAMED else far[: NAMED // 2])}
    looks = (
        ("chosen", "chosen", "lapis", "circle", [row for row in everything if row.get("chosen")]),
        ("control", "random control", "orange", "diamond-open", [row for row in everything if row.get("control")]),
        ("rest", "not chosen", "quiet", "circle-open",
         [row for row in everything if not row.get("chosen") and not row.get("control")]),
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
    figure.update_xaxes(tickformat=theme.percent((row["knowledge"] for row in everything), "+"))
    figure.update_yaxes(tickformat=theme.percent(row["style"] for row in everything))
    theme.adapt(figure, height=400, xaxis__nticks=5)
    return figure


def rank(rows: Sequence[Row], row: Row, key: str) -> float:
    """How far out a row lies, as a share of the largest value."""
    return float(row[key]) / (max(abs(other[key]) for other in rows) or 1.0)


def plan_stack(rows: Iterable[Row], title: str) -> go.Figure:
    """The choice as a picture of the stack: the first layer at the foot, a column for each piece of a layer.

    Row: `layer` ("3.attn", "3.attn.q", or "3" for a whole layer; "embed" and "head" are left out), `chosen`, `control`
    (bool), optionally `style` and `knowledge` (shares), which show on hovering. The control is ringed.
    """
    cells: dict[tuple[int, str], Row] = {}
    for row in rows:
        layer, _, piece = str(row["layer"]).partition(".")
        if layer.isdigit():
            cells[int(layer), piece or "layer"] = row
    if not cells:
        return theme.nothing(title)
    layers = sorted({layer for layer, _ in cells})
    columns = list(dict.fromkeys(piece for _, piece in cells))
    inner = max(18, min(30, 560 // len(layers))) * len(layers)
    figure = theme.new_figure(title, height=inner + theme.TITLE + 44 + 56, max_width=140 * len(columns) + 220)
    figure.update_layout(margin={"t": theme.TITLE + 44, "b": 56}, dragmode=False)
    figure.add_heatmap(
        x=columns, y=layers, xgap=3, ygap=2, zmin=0, zmax=1, showscale=False, hoverongaps=False,
        z=[[_level(cells.get((layer, piece))) for piece in columns] for layer in layers],
        colorscale=[[0, theme.BLUES[0][0]], [1, color("lapis")]],
        customdata=[[_effects(cells.get((layer, piece))) for piece in columns] for layer in layers],
        hovertemplate="<b>%{y}.%{x}</b><br>%{customdata}<extra></extra>",
    )  # fmt: skip
    control = [place for place, row in cells.items() if row.get("control")]
    figure.add_scatter(x=[None], y=[None], mode="markers", name="chosen", hoverinfo="skip",
                       marker={"symbol": "square", "size": 13, "color": color("lapis")})  # fmt: skip
    figure.add_scatter(
        x=[piece for _, piece in control], y=[layer for layer, _ in control], name="random control", mode="markers",
        marker={"symbol": "circle-open", "size": 11, "color": color("orange"), "line": {"width": 2}}, hoverinfo="skip",
    )  # fmt: skip
    theme.axis_title(figure, "piece", "layer")
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(tickvals=layers[:: -(-len(layers) // 16)], showgrid=False)
    return figure


def _level(row: Row | None) -> float | None:
    return None if row is None else float(bool(row.get("chosen")))


def _effects(row: Row | None) -> str:
    if row is None:
        return ""
    parts = ["chosen" if row.get("chosen") else "not chosen"]
    if row.get("style") is not None:
        parts.append(f"replies {row['style']:.1%}")
    if row.get("knowledge") is not None:
        parts.append(f"text {row['knowledge']:+.2%} harder")
    return ", ".join(parts)
