"""The picture of who wrote a word: what each attention head and MLP adds to its logit, layer by layer.

Rows in, plotly figure out. Reached through plots.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lapis.report import theme
from lapis.report.theme import AMBERS, BLUES, Row, color

if TYPE_CHECKING:
    import plotly.graph_objects as go

DIVERGING = (*reversed(AMBERS[1:]), BLUES[0], *BLUES[1:])  # against the word, nothing, for it


def contributions(rows: Iterable[Row], title: str) -> go.Figure:
    """Layer by part: blue adds to the word's logit, amber takes from it.

    Row: `part` ("head", "mlp", "attention", ...), `layer` (int, or None for what stands outside the layers), `head`
    (int or None), `logit`. What stands outside the layers is left to the table.
    """
    cells: dict[tuple[int, str], float] = {}
    for row in rows:
        if row["layer"] is not None:
            column = str(row["head"]) if row["part"] == "head" else "MLP" if row["part"] == "mlp" else "other"
            cells[row["layer"], column] = cells.get((row["layer"], column), 0.0) + row["logit"]
    if not cells:
        return theme.nothing(title)
    layers = sorted({layer for layer, _ in cells})
    heads = sorted({name for _, name in cells if name.isdigit()}, key=int)
    columns = [*heads, *(name for name in ("other", "MLP") if any(place[1] == name for place in cells))]
    figure = theme.new_figure(title, height=22 * len(layers) + 150, min_width=24 * len(columns) + 80, legend=False)
    inner = 22 * len(layers)
    figure.update_layout(margin={"t": theme.TITLE + 56, "b": 58}, dragmode=False)
    most = max(abs(value) for value in cells.values()) or 1.0
    names = [f"head {name}" if name.isdigit() else "attention, the rest" if name == "other" else name
             for name in columns]  # fmt: skip
    figure.add_heatmap(
        x=columns, y=layers, z=[[cells.get((layer, column)) for column in columns] for layer in layers],
        customdata=[names for _ in layers], coloraxis="coloraxis", xgap=1, ygap=1, hoverongaps=False,
        hovertemplate="<b>layer %{y}, %{customdata}</b><br>%{z:+.3f} to the logit<extra></extra>",
    )  # fmt: skip
    bar = {
        "x": 0, "xanchor": "left", "y": 1 + 4 / inner, "len": 180, "lenmode": "pixels",
        "tickvals": [-most, 0, most], "ticktext": [f"−{most:.2g}", "0", f"+{most:.2g}"],
        "title": {"text": "added to the logit", "side": "top", "font": {"size": 12, "color": color("quiet")}},
    }  # fmt: skip
    figure.update_layout(coloraxis=theme.color_axis(DIVERGING, -most, most, **bar))
    theme.axis_title(figure, "attention head, and the MLP", "layer")
    figure.update_xaxes(type="category", showgrid=False, tickangle=0)
    figure.update_yaxes(tickvals=layers[:: -(-len(layers) // 16)], showgrid=False)
    return figure
