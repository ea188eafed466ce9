"""Pictures of what a language costs: tokens and FLOPs for a byte of text, by the number of added tokens.

Rows in, plotly figure out; the shape of a row stands in the docstring. Reached through plots.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lapis.report import theme
from lapis.report.theme import Row, color

if TYPE_CHECKING:
    import plotly.graph_objects as go


def fertility_curve(rows: Iterable[Row], title: str, *, mark: int = 0) -> go.Figure:
    """Tokens per byte in one panel, FLOPs per byte, where they are known, in the other.

    Row: `added`, `tokens_per_byte`, and where known `replay_tokens_per_byte`, `flops_per_byte`. mark: the number of
    added tokens that is set off; 0 for none.
    """
    shown = sorted(rows, key=lambda row: row["added"])
    if not shown:
        return theme.nothing(title)
    with_flops = shown[0].get("flops_per_byte") is not None
    figure = theme.new_figure(title)
    titles = ["tokens per byte of text", "FLOPs per byte of text, forward"][: 1 + with_flops]
    heights = theme.panels(figure, titles, height=260, wide=2, gap=96, top=62)
    figure.update_layout(legend_y=1 + 28 / heights[0])
    theme.adapt(figure, legend__y=1 + 28 / heights[1])
    lines = [("tokens_per_byte", "the language", 1, 0), ("replay_tokens_per_byte", "replay text", 1, 1),
             ("flops_per_byte", "the language", 2, 0)]  # fmt: skip
    for key, name, panel, place in lines:
        points = [(row["added"], row[key]) for row in shown if row.get(key) is not None]
        if not points or (panel == 2 and not with_flops):
            continue
        number, paint = "" if panel == 1 else "2", color(theme.SERIES[place])
        figure.add_scatter(
            x=[x for x, _ in points], y=[y for _, y in points], name=name, mode="lines+markers", legendgroup=name,
            xaxis=f"x{number}", yaxis=f"y{number}", line={"color": paint, "width": 2, "dash": theme.DASHES[place]},
            marker={
                "color": paint, "symbol": theme.SYMBOLS[place],
                "size": [14 if mark and x == mark and place == 0 else 7 for x, _ in points],
            },
            cliponaxis=False, showlegend=panel == 1,
            hovertemplate=f"<b>{name}</b><br>%{{x:,}} tokens more<br>%{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    for panel in range(1, 2 + with_flops):
        number = "" if panel == 1 else "2"
        theme.axis_title(figure, "tokens added", panel=panel)
        figure.update_layout({
            f"xaxis{number}": {"nticks": 5, "exponentformat": "SI", "rangemode": "tozero"},
            f"yaxis{number}": {"rangemode": "tozero", "nticks": 5, "exponentformat": "SI"},
        })  # fmt: skip
    return figure
