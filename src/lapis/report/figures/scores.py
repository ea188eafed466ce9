"""Pictures of scores and costs: models compared, the scale of a graft, what grows with length, ways to mix an input.

Rows in, plotly figure out; the shape of a row stands in each docstring. Reached through plots.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lapis.report import theme
from lapis.report.figures.curves import AXES
from lapis.report.theme import Row, color, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go


def scale_sweep(
    rows: Iterable[Row], title: str, *, chosen: float | None = None, budget: float | None = None
) -> go.Figure:
    """The trade of a graft: gap closed (up is good) against its cost in the target language (left is good).

    Row: `scale`, `gap_closed` (share of the way from adapted to tuned), `cost` (how much worse the target language's
    bits per byte became, as a share: 0.03 = 3 %), and optionally `language` (of the gap; one curve each). The points
    of the first curve carry their scale. `chosen` rings the scale that was taken; `budget` draws the largest cost that
    is allowed.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get("language", "")), []).append(row)
    if not groups:
        return theme.nothing(title)
    figure = theme.new_figure(title, height=420)
    for place, (language, points) in enumerate(groups.items()):
        ordered = sorted(points, key=lambda row: row["scale"])
        paint = color(theme.SERIES[place % len(theme.SERIES)])
        taken = [chosen is not None and math.isclose(row["scale"], chosen) for row in ordered]
        figure.add_scatter(
            x=[row["cost"] for row in ordered],
            y=[row["gap_closed"] for row in ordered],
            text=[f"× {row['scale']:g}" if place == 0 and row["scale"] else "" for row in ordered],
            customdata=[row["scale"] for row in ordered],
            name=plain(language),
            mode="lines+markers+text",
            textposition="top left",
            textfont={"size": 12, "color": color("quiet")},
            line={"color": paint, "width": 2, "dash": theme.DASHES[place % len(theme.DASHES)]},
            marker={
                "color": paint,
                "symbol": theme.SYMBOLS[place % len(theme.SYMBOLS)],
                "size": [14 if ring else 8 for ring in taken],
                "opacity": 1,
                "line": {"width": [3 if ring else 0 for ring in taken], "color": color("ink")},
            },
            hovertemplate="scale %{customdata}<br>gap closed %{y:.2f}<br>cost %{x:.1%}<extra></extra>",
            showlegend=bool(language),
            cliponaxis=False,
        )
    if budget is not None:
        figure.add_vline(x=budget, line={"color": color("quiet"), "width": 1, "dash": "dot"})
        figure.add_annotation(x=budget, y=0, yref="paper", text="budget", xanchor="left", yanchor="bottom", xshift=4)
    theme.axis_title(figure, "cost: target language's bits per byte, worse by", "gap closed (share of adapted → tuned)")
    figure.update_xaxes(tickformat=".1~%", nticks=8)
    theme.adapt(figure, height=360, xaxis__nticks=5, xaxis__title__text="cost in the target language (bits per byte)")
    return figure


def scores(
    rows: Iterable[Row], title: str, *, metric: str, kind: str = "bar", format: str = ".2f", label: str = ""
) -> go.Figure:
    """One metric per model, a panel per language, the value written beside each mark.

    Row: `model`, `language`, and the key `metric` (None = not measured, left out). kind "bar" starts at zero; "dot"
    is for metrics that live far from zero. `label` names the axis, with its unit (default: known metrics are named).
    """
    known = [row for row in rows if row.get(metric) is not None]
    if not known:
        return theme.nothing(title)
    models = list(dict.fromkeys(row["model"] for row in known))
    languages = list(dict.fromkeys(row["language"] for row in known))
    figure = theme.new_figure(title, legend=False)
    theme.panels(figure, languages, height=34 * len(models) + 10, wide=min(3, len(languages)), gap=96)
    places = theme.series(models)
    top, bottom = max(row[metric] for row in known), min(row[metric] for row in known)
    span = (top - bottom) or abs(top) or 1.0
    for i, language in enumerate(languages, 1):
        mine = [row for row in known if row["language"] == language]
        paints = [color(theme.SERIES[places[row["model"]]]) for row in mine]
        number = "" if i == 1 else str(i)
        marks: dict[str, Any] = {
            "x": [row[metric] for row in mine],
            "y": [plain(row["model"]) for row in mine],
            "text": [f"{row[metric]:{format}}" for row in mine],
            "xaxis": f"x{number}",
            "yaxis": f"y{number}",
            "hovertemplate": f"<b>%{{y}}</b><br>%{{x:{format}}} {label or AXES.get(metric, metric)}<extra></extra>",
            "showlegend": False,
            "cliponaxis": False,
        }
        if kind == "bar":
            figure.add_bar(
                **marks, orientation="h", marker={"color": paints}, textposition="outside", width=0.62,
                textfont={"color": color("ink")},
            )  # fmt: skip
            reach = [min(0.0, bottom - 0.2 * span), max(0.0, top) + 0.2 * max(span, abs(top))]
        else:
            figure.add_scatter(
                **marks, mode="markers+text", marker={"color": paints, "size": 13}, textposition="middle right",
                textfont={"color": color("ink")},
            )  # fmt: skip
            reach = [bottom - 0.12 * span, top + 0.35 * span]
        theme.axis_title(figure, label or AXES.get(metric, metric), panel=i)
        figure.update_layout(
            {
                f"xaxis{number}": {"range": reach, "nticks": 5},
                f"yaxis{number}": {
                    "type": "category",
                    "categoryarray": [plain(model) for model in models],
                    "range": [len(models) - 0.4, -0.6],
                    "showgrid": kind == "dot",
                    "tickfont": {"color": color("ink"), "size": 13},
                },
            }
        )
    return figure


def mixers(rows: Iterable[Row], title: str, *, metrics: Sequence[str] = ("parameters", "flops")) -> go.Figure:
    """Ways to mix the same input compared: a panel per metric on a log axis (they differ by powers of ten).

    Row: `mixer` (its name) and a positive number for each of `metrics`.
    """
    shown = list(rows)
    if not shown:
        return theme.nothing(title)
    figure = theme.new_figure(title, legend=False)
    theme.panels(
        figure, [AXES.get(metric, metric) for metric in metrics], height=38 * len(shown) + 10, wide=len(metrics), gap=96
    )
    names = [plain(row["mixer"]) for row in shown]
    for i, metric in enumerate(metrics, 1):
        number = "" if i == 1 else str(i)
        values = [row[metric] for row in shown]
        figure.add_scatter(
            x=values,
            y=names,
            text=[short(value) for value in values],
            customdata=[f"{value:,}" for value in values],
            mode="markers+text",
            textposition="middle right",
            textfont={"color": color("ink")},
            marker={"color": color("lapis"), "size": 13, "symbol": "circle"},
            hovertemplate=f"<b>%{{y}}</b><br>%{{customdata}} {AXES.get(metric, metric)}<extra></extra>",
            xaxis=f"x{number}",
            yaxis=f"y{number}",
            showlegend=False,
            cliponaxis=False,
        )
        low, high = math.log10(min(values)), math.log10(max(values))
        reach = [math.floor(low) - 0.2, high + 0.35 * max(high - low, 1)]
        theme.axis_title(figure, f"{AXES.get(metric, metric)} (log scale)", panel=i)
        step = max(1, math.ceil((high - low) / 3))
        x_axis = {"type": "log", "range": reach, "exponentformat": "SI", "dtick": step}
        y_axis = {"type": "category", "range": [len(shown) - 0.4, -0.6], "tickfont": {"color": color("ink")}}
        figure.update_layout({f"xaxis{number}": x_axis, f"yaxis{number}": y_axis})
    return figure


def growth(rows: Iterable[Row], title: str) -> go.Figure:
    """What grows with the number of tokens: memory in one panel, FLOPs per token in the other, both axes logarithmic.

    Row: `context` (tokens), `weights`, `cache` (bytes), `flops` (per token, forward), `attention` (the part of them
    that attention takes).
    """
    shown = sorted(rows, key=lambda row: row["context"])
    if not shown:
        return theme.nothing(title)
    figure = theme.new_figure(title)
    heights = theme.panels(figure, ["memory", "FLOPs per token, forward"], height=260, wide=2, gap=96, top=62)
    figure.update_layout(legend_y=1 + 28 / heights[0])
    theme.adapt(figure, legend__y=1 + 28 / heights[1])
    lines = (("weights", "weights", 1e9, 1), ("cache", "KV cache", 1e9, 1), ("flops", "all", 1.0, 2),
             ("attention", "attention alone", 1.0, 2))  # fmt: skip
    for place, (key, name, unit, panel) in enumerate(lines):
        points = [(row["context"], row[key] / unit) for row in shown if row.get(key)]
        number = "" if panel == 1 else str(panel)
        paint = color(theme.SERIES[place])
        figure.add_scatter(
            x=[x for x, _ in points], y=[y for _, y in points], name=name, mode="lines+markers",
            xaxis=f"x{number}", yaxis=f"y{number}", line={"color": paint, "width": 2, "dash": theme.DASHES[place]},
            marker={"color": paint, "size": 7, "symbol": theme.SYMBOLS[place]}, cliponaxis=False,
            hovertemplate=f"<b>{name}</b><br>%{{x:,}} tokens<br>%{{y:.3s}}<extra></extra>",
        )  # fmt: skip
    contexts = [row["context"] for row in shown]
    for panel in (1, 2):
        number = "" if panel == 1 else str(panel)
        theme.axis_title(figure, "tokens in the sequence", "GB" if panel == 1 else "FLOPs", panel=panel)
        x_axis = {"type": "log", "tickvals": contexts[:: -(-len(contexts) // 5)], "exponentformat": "none"}
        y_axis = {"type": "log", "exponentformat": "SI", "nticks": 5, "dtick": 1}
        figure.update_layout({f"xaxis{number}": {**x_axis, "tickformat": ",d"}, f"yaxis{number}": y_axis})
    return figure


def short(value: float) -> str:
    """A count in four characters or so: 124439808 -> 124M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
