"""Pictures of a forward pass: what each layer would say, how ranks move, where attention looks, who wrote a word.

Rows in, plotly figure out; the shape of a row stands in each docstring. All are reached through plots.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lapis.report import theme
from lapis.report.theme import Row, color, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

CELL = 78  # pixels of a token in the grid
LAST = 4  # tokens of the grid that fit a narrow screen


def lens_grid(rows: Iterable[Row], title: str) -> go.Figure:
    """Layer by position: in each cell the token that this layer would say next; color = its probability.

    Row, one per cell: `layer` (int; the lowest is drawn at the foot, and -1 is the embedding), `position` (int),
    `token` (what stands in the prompt there), `top`: list of (token, probability), best first; up to ten of them show
    on hovering.
    """
    cells = {(row["layer"], row["position"]): row for row in rows}
    if not cells:
        return theme.nothing(title)
    layers, positions = sorted({key[0] for key in cells}), sorted({key[1] for key in cells})
    tokens = {row["position"]: plain(row["token"], 12) for row in cells.values()}
    z: list[list[float | None]] = []
    words: list[list[str]] = []
    hover: list[list[str]] = []
    for layer in layers:
        line = [cells.get((layer, position)) for position in positions]
        z.append([cell["top"][0][1] if cell else None for cell in line])
        words.append([plain(cell["top"][0][0], 9) if cell else "" for cell in line])
        hover.append([_top(cell["top"]) if cell else "" for cell in line])
    inner = 26 * len(layers)
    figure = theme.new_figure(
        title, height=inner + theme.TITLE + 56 + 58, min_width=CELL * len(positions) + 70, legend=False
    )
    figure.update_layout(margin={"t": theme.TITLE + 56, "b": 58}, dragmode=False)
    names = ["embed" if layer < 0 else str(layer) for layer in layers]
    figure.add_heatmap(
        x=positions, y=layers, z=z, coloraxis="coloraxis", xgap=1, ygap=1, hoverongaps=False,
        customdata=hover, text=[[f"{name}, after {tokens[position]}" for position in positions] for name in names],
        hovertemplate="<b>layer %{text}</b><br>%{customdata}<extra></extra>",
    )  # fmt: skip
    for role, bright in (("ink", False), ("paper", True)):
        # Words on strong cells take the color of the paper, so that they read in light and in dark.
        mine = [
            (position, layer, words[i][j])
            for i, layer in enumerate(layers)
            for j, position in enumerate(positions)
            if words[i][j] and ((z[i][j] or 0.0) > 0.5) == bright
        ]
        figure.add_scatter(
            x=[place[0] for place in mine], y=[place[1] for place in mine], text=[place[2] for place in mine],
            mode="text", textfont={"size": 12, "color": color(role)}, hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    figure.update_layout(
        coloraxis=theme.color_axis(
            theme.BLUES, 0, 1, x=1, xanchor="right", y=1 + 4 / inner, len=180, lenmode="pixels",
            tickvals=[0, 0.5, 1], tickformat=".0%",
            title={"text": "probability", "side": "top", "font": {"size": 12, "color": color("quiet")}},
        )
    )  # fmt: skip
    figure.add_annotation(
        text="prompt, token by token →", xref="x domain", yref="y domain", x=1, y=0, xanchor="right", yshift=-40,
        font={"size": 13},
    )  # fmt: skip
    if len(positions) > LAST:
        theme.adapt(figure, xaxis__range=[positions[-1] - LAST + 0.5, positions[-1] + 0.5], meta__min_width=0)
        theme.end(figure, f"The last {LAST} of {len(positions)} tokens; a wider screen shows all.")
    theme.axis_title(figure, "", "layer")
    edge = 0.5
    figure.update_xaxes(
        tickvals=positions, ticktext=[tokens[p] for p in positions], showgrid=False, tickangle=0,
        range=[positions[0] - edge, positions[-1] + edge],
    )  # fmt: skip
    shown = range(0, len(layers), -(-len(layers) // 16))
    figure.update_yaxes(  # on the right, beside the last token, which decides
        tickvals=[layers[i] for i in shown], ticktext=[names[i] for i in shown], showgrid=False, side="right",
        range=[layers[0] - edge, layers[-1] + edge],
    )  # fmt: skip
    return figure


def _top(top: Sequence[tuple[str, float]]) -> str:
    return "<br>".join(f"{probability:6.1%}  {plain(token, 30)}" for token, probability in top[:10])


def rank_trajectories(rows: Iterable[Row], title: str) -> go.Figure:
    """The rank of each tracked word over the layers; rank 1 is on top, the axis is logarithmic.

    Row: `word`, `layer` (int), `rank` (int, 1 = best), optionally `model` (a dash style each: before and after).
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["word"], str(row.get("model", ""))), []).append(row)
    if not groups:
        return theme.nothing(title)
    places = theme.series(word for word, _ in groups)
    models = list(dict.fromkeys(model for _, model in groups))
    figure = theme.new_figure(title, height=440)
    worst = 1
    for (word, model), points in groups.items():
        ordered = sorted(points, key=lambda row: row["layer"])
        place = places[word]
        paint = color(theme.SERIES[place])
        worst = max(worst, *(row["rank"] for row in ordered))
        dash = theme.DASHES[models.index(model) % len(theme.DASHES)]
        figure.add_scatter(
            x=[row["layer"] for row in ordered],
            y=[row["rank"] for row in ordered],
            name=plain(f"{word}, {model}" if len(models) > 1 else word, 60),
            mode="lines+markers",
            line={"color": paint, "width": 2, "dash": dash},
            marker={"color": paint, "size": 7, "symbol": theme.SYMBOLS[place]},
            hovertemplate="<b>%{fullData.name}</b><br>layer %{x}: rank %{y:,}<extra></extra>",
            cliponaxis=False,
        )
    theme.axis_title(figure, "layer", "rank of the word (1 = said next)")
    foot = max(math.log10(worst), 0.5)
    figure.update_yaxes(type="log", range=[foot * 1.04, -0.06 * foot], **theme.powers(1, max(worst, 10)))
    layers = max(row["layer"] for points in groups.values() for row in points)
    figure.update_xaxes(tickformat="d", tick0=0, dtick=-(-layers // 14) or 1)
    theme.adapt(figure, height=380, xaxis__dtick=-(-layers // 7) or 1)
    return figure


def attention_map(rows: Iterable[Row], tokens: Sequence[str], title: str) -> go.Figure:
    """Where each position looks: a panel per head, rows = the token that looks, columns = what it looks at.

    Row: `head` (its label), `weights` (T x T, rows sum to 1; what a causal mask hides may be None or 0). `tokens`: the
    T tokens of the prompt.
    """
    shown = list(rows)
    if not shown:
        return theme.nothing(title)
    labels = [plain(token, 12) for token in tokens]
    count = len(labels)
    one = len(shown) == 1
    figure = theme.new_figure(title, max_width=48 * count + 220 if one else 0, legend=False)
    height = 34 * count + 20 if one else max(150, 15 * count)
    most = 4 if count <= 8 else 3 if count <= 14 else 2
    wide, small = theme.panels(
        figure,
        [str(row["head"]) for row in shown],
        height=height,
        wide=min(most, len(shown)),
        narrow=1,
        gap=130,
        top=76,
    )
    figure.update_layout(margin_r=28, margin_b=110)
    ticks = list(range(count))
    for i, row in enumerate(shown, 1):
        number = "" if i == 1 else str(i)
        hidden = [
            [None if w is None or (w == 0 and source > target) else w for source, w in enumerate(line)]
            for target, line in enumerate(row["weights"])
        ]
        figure.add_heatmap(
            x=ticks, y=ticks, z=hidden, coloraxis="coloraxis", xaxis=f"x{number}", yaxis=f"y{number}", xgap=1, ygap=1,
            customdata=[[[target, source] for source in labels] for target in labels], hoverongaps=False,
            hovertemplate="%{customdata[0]} looks at <b>%{customdata[1]}</b><br>%{z:.1%}<extra></extra>",
        )  # fmt: skip
        axis: dict[str, Any] = {"showgrid": False, "tickvals": ticks, "ticktext": labels, "tickfont": {"size": 10}}
        figure.update_layout(
            {f"xaxis{number}": {**axis, "tickangle": -60}, f"yaxis{number}": {**axis, "autorange": "reversed"}}
        )
        theme.axis_title(figure, "looked at", "looking", panel=i)
    figure.update_layout(
        coloraxis=theme.color_axis(
            theme.BLUES, 0, 1, x=1, xanchor="right", y=1 + 44 / wide, len=150, lenmode="pixels",
            tickvals=[0, 0.5, 1], tickformat=".0%",
        )
    )  # fmt: skip
    theme.adapt(figure, coloraxis__colorbar__y=1 + 44 / small)
    return figure


def contributions(rows: Iterable[Row], title: str) -> go.Figure:
    """Layer by part: blue adds to the word's logit, amber takes from it.

    Row: `part` ("head", "mlp", "attention", ...), `layer` (int, or None for what stands outside the layers), `head`
    (int or None), `logit`. What stands outside the layers is left to the table.
    """
    cells: dict[tuple[int, str], float] = {}
    delta = False
    for row in rows:
        delta = delta or row["part"] == "delta net"
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
    other = "attention, the rest, or a delta net" if delta else "attention, the rest"
    names = [f"head {name}" if name.isdigit() else other if name == "other" else name for name in columns]
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
    figure.update_layout(coloraxis=theme.color_axis(theme.DIVERGING, -most, most, **bar))
    theme.axis_title(figure, "attention head, and the MLP", "layer")
    figure.update_xaxes(type="category", showgrid=False, tickangle=0)
    figure.update_yaxes(tickvals=layers[:: -(-len(layers) // 16)], showgrid=False)
    return figure
