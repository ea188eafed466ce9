"""The picture of a square or other matrix with names on both sides: cosines between models, a classifier's confusions.

Rows in, plotly figure out. Reached through plots.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lapis.report import theme
from lapis.report.theme import BLUES, DIVERGING, color, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

CELL, SIDE = 44, 150  # pixels of a cell's height, and for the names on the left


def matrix(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], title: str, *, unit: str = "",
    format: str = ".2f", x: str = "", y: str = "", signed: bool = False,
) -> go.Figure:  # fmt: skip
    """values[i][j] with the names rows[i] and columns[j], written in its cell. The first row is drawn on top.

    unit: what the numbers are. format: of the numbers. signed: amber below zero, blue above, from -1 to 1.
    """
    if not values:
        return theme.nothing(title)
    narrow = max(30, min(CELL, 620 // len(values)))
    height = narrow * len(values)
    width = SIDE + max(54, min(120, 900 // len(columns))) * len(columns)
    least = min(width, SIDE + 54 * len(columns))
    figure = theme.new_figure(
        title, height=height + theme.TITLE + 56 + 90, min_width=least, max_width=max(width, 420), legend=False
    )
    figure.update_layout(margin={"t": theme.TITLE + 56, "b": 90}, dragmode=False)
    most = max((abs(value) for line in values for value in line), default=1.0) or 1.0
    names = {"r": [plain(name, 22) for name in rows], "c": [plain(name, 22) for name in columns]}
    bold = 0.5 if signed else 0.55 * most
    figure.add_heatmap(
        x=list(range(len(columns))), y=list(range(len(rows))), z=[list(line) for line in values],
        customdata=[[[plain(row), plain(column)] for column in columns] for row in rows], coloraxis="coloraxis",
        xgap=1, ygap=1,
        hovertemplate=f"<b>%{{customdata[0]}}, %{{customdata[1]}}</b><br>%{{z:{format}}} {plain(unit)}<extra></extra>",
    )  # fmt: skip
    if len(columns) <= 16:
        for role, strong in (("ink", False), ("paper", True)):
            mine = [(i, j) for i, line in enumerate(values) for j, v in enumerate(line) if (abs(v) > bold) == strong]
            figure.add_scatter(
                x=[j for _, j in mine], y=[i for i, _ in mine], text=[f"{values[i][j]:{format}}" for i, j in mine],
                mode="text", textfont={"size": 12, "color": color(role)}, hoverinfo="skip", showlegend=False,
            )  # fmt: skip
    ends = (-1.0, 1.0) if signed else (0.0, most)
    shades = DIVERGING if signed else BLUES
    bar: dict[str, Any] = {
        "x": 0, "xanchor": "left", "y": 1 + 4 / height, "len": 160, "lenmode": "pixels", "tickvals": list(ends),
        "ticktext": [f"{end:{format}}".replace("-", "−") for end in ends],
        "title": {"text": plain(unit), "side": "top", "font": {"size": 12, "color": color("quiet")}},
    }  # fmt: skip
    figure.update_layout(coloraxis=theme.color_axis(shades, *ends, **bar))
    theme.axis_title(figure, x, y)
    figure.update_xaxes(
        tickvals=list(range(len(columns))), ticktext=names["c"], showgrid=False, range=[-0.5, len(columns) - 0.5],
        tickangle=-35 if max(map(len, names["c"])) > 8 else 0,
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=names["r"], showgrid=False, range=[len(rows) - 0.5, -0.5]
    )
    return figure
