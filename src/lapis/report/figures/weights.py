"""Pictures of weights: where a fine-tune changed them, in direction and magnitude, and what a model is made of.

Rows in, plotly figure out; the shape of a row stands in each docstring. All are reached through plots.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lapis.report import theme
from lapis.report.figures.scores import short
from lapis.report.theme import Row, color, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

# The order in which a forward pass meets them; anything else follows by name.
ORDER = (
    "embed", "embed.position", "embed.type", "norm.embed",
    "norm.attn", "attn.qkv", "attn.q", "attn.k", "attn.v", "attn.q_norm", "attn.k_norm", "attn.o",
    "norm.mlp", "mlp.gate", "mlp.up", "mlp.down", "norm.final", "head",
)  # fmt: skip


def layer_heatmap(rows: Iterable[Row], title: str) -> go.Figure:
    """Two panels, layer by component: how far the direction turned, and how large the change is.

    Row (a tensor of `lapis diff`): `layer` (int, or None for what stands outside the layers), `component`, `cosine`
    (or `direction` = 1 - cosine) and `relative_norm` (norm of the difference over norm of the first model's tensor).
    Biases (by `kind`, or by `name`) make lines of their own; where several tensors share a cell (experts), it shows
    their mean and says so. A panel whose values span more than a factor of 30 has a logarithmic color scale; what is
    not known (None, NaN) stays blank.
    """
    cells: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        bias = row.get("kind") == "bias" or str(row.get("name", "")).endswith((".bias", ".beta"))
        cells.setdefault((row["component"] + (" bias" if bias else ""), row["layer"]), []).append(row)
    if not cells:
        return theme.nothing(title)
    layers = sorted({layer for _, layer in cells if layer is not None})
    components = sorted({component for component, _ in cells}, key=_place)
    outside = any(layer is None for _, layer in cells)
    columns = ["in", *map(str, layers), "out"] if outside else [str(layer) for layer in layers]
    figure = theme.new_figure(title, legend=False)
    theme.panels(
        figure,
        ["direction (1 − cosine)", "magnitude (relative norm)"],
        height=22 * len(components) + 10, wide=2, gap=110,
    )  # fmt: skip
    measures = (("direction", theme.BLUES), ("relative_norm", theme.AMBERS))
    for panel, (measure, shades) in enumerate(measures, 1):
        grid: list[list[float | None]] = [[None] * len(columns) for _ in components]
        notes = [[""] * len(columns) for _ in components]
        for (component, layer), group in cells.items():
            early = layer is None and component.startswith(("embed", "norm.embed"))
            column = columns.index(str(layer)) if layer is not None else (0 if early else len(columns) - 1)
            values = [value for value in (_measure(row, measure) for row in group) if value is not None]
            if values:
                line = components.index(component)
                grid[line][column] = sum(values) / len(values)
                notes[line][column] = f", mean of {len(values)}" if len(values) > 1 else ""
        _heat(figure, panel, columns, components, grid, notes, shades)
    return figure


def _measure(row: Row, measure: str) -> float | None:
    value = row.get(measure)
    if value is None and measure == "direction" and row.get("cosine") is not None:
        value = 1 - row["cosine"]
    return None if value is None or not math.isfinite(value) else float(value)  # infinite: what was 0 before


def _place(component: str) -> tuple[int, str]:
    base = component.removesuffix(" bias")
    return (ORDER.index(base) if base in ORDER else len(ORDER), component)


def _heat(
    figure: go.Figure,
    panel: int,
    columns: Sequence[str],
    lines: Sequence[str],
    grid: list[list[float | None]],
    notes: list[list[str]],
    shades: Sequence[tuple[str, str]],
) -> None:
    """One heatmap on axes x{panel}, y{panel}, its color bar above it on the right."""
    number = "" if panel == 1 else str(panel)
    positive = [value for line in grid for value in line if value is not None and value > 0]
    low, high = (min(positive), max(positive)) if positive else (0.0, 1.0)
    logarithmic = bool(positive) and high > 30 * low
    floor = math.floor(math.log10(low)) if logarithmic else 0.0
    shown = [
        [None if v is None else (math.log10(v) if v > 0 else floor) if logarithmic else v for v in line]
        for line in grid
    ]
    figure.add_heatmap(
        x=list(columns), y=[plain(line) for line in lines], z=shown, customdata=grid, text=notes, xgap=1, ygap=1,
        coloraxis=f"coloraxis{number}", xaxis=f"x{number}", yaxis=f"y{number}", hoverongaps=False,
        hovertemplate="layer %{x}, %{y}<br>%{customdata:.3g}%{text}<extra></extra>",
    )  # fmt: skip
    bar: dict[str, Any] = {
        "x": figure.layout[f"xaxis{number}"].domain[1], "xanchor": "right", "len": 0.13,
        "y": figure.layout[f"yaxis{number}"].domain[1] + 0.012,
        "tickvals": [0, high], "ticktext": ["0", f"{high:.2g}"],
    }  # fmt: skip
    ends = (0.0, high)
    if logarithmic:
        ends = (math.log10(low), math.log10(high))
        ticks = theme.powers(low, high, most=3)
        bar |= {"tickvals": [math.log10(value) for value in ticks["tickvals"]], "ticktext": ticks["ticktext"]}
    axis = {"type": "category", "showgrid": False}
    figure.update_layout(
        {
            f"coloraxis{number}": theme.color_axis(shades, *ends, **bar),
            f"xaxis{number}": {**axis, "title": {"text": "layer"}, "nticks": 16},
            f"yaxis{number}": {**axis, "autorange": "reversed"},
        }
    )
    narrow = dict(figure.layout.meta)["narrow"]
    place = f"coloraxis{number}__colorbar__"
    theme.adapt(
        figure,
        **{
            f"{place}x": narrow[f"xaxis{number}.domain"][1],
            f"{place}y": narrow[f"yaxis{number}.domain"][1] + 0.006,
            f"{place}len": 0.3,
            f"xaxis{number}__nticks": 9,
        },
    )


def spectra(rows: Iterable[Row], title: str, *, log_x: bool = True) -> go.Figure:
    """Singular values, largest first, each divided by the first: how many directions a change really has.

    Row: `name`, `values` (singular values in falling order, all > 0).
    """
    shown = list(rows)
    if not shown:
        return theme.nothing(title)
    places = theme.series(row["name"] for row in shown)
    figure = theme.new_figure(title, height=420)
    for row in shown:
        paint, dash = color(theme.SERIES[places[row["name"]]]), theme.DASHES[places[row["name"]]]
        figure.add_scatter(
            x=list(range(1, len(row["values"]) + 1)),
            y=[value / row["values"][0] for value in row["values"]],
            customdata=list(row["values"]),
            name=plain(row["name"]),
            mode="lines",
            line={"color": paint, "width": 2, "dash": dash},
            hovertemplate="<b>%{fullData.name}</b><br>number %{x}: %{customdata:.4g}"
            "<br>%{y:.3g} of the largest<extra></extra>",
        )
    theme.axis_title(figure, "singular values, largest first", "share of the largest")
    figure.update_xaxes(type="log" if log_x else "linear", dtick=1 if log_x else None)
    least = min(row["values"][-1] / row["values"][0] for row in shown)
    figure.update_yaxes(type="log", **theme.powers(least, 1))
    theme.adapt(figure, height=360)
    return figure


def tensor_errors(rows: Iterable[Row], title: str, *, y: str = "error", label: str = "relative error") -> go.Figure:
    """One point per tensor: the error of a merge or graft (against an exact one) by layer, colored by component.

    Row: `name`, `layer` (int or None), `component`, and the key `y` (>= 0; an exact zero is drawn at the foot).
    """
    shown = list(rows)
    if not shown:
        return theme.nothing(title)
    groups: dict[str, list[Row]] = {}
    for row in shown:
        groups.setdefault(row["component"].split(".")[0], []).append(row)
    positive = [row[y] for row in shown if row[y] > 0]
    foot = min(positive) / 3 if positive else 1e-12
    last = max((row["layer"] for row in shown if row["layer"] is not None), default=0)
    figure = theme.new_figure(title, height=420)
    for place, (group, points) in enumerate(sorted(groups.items(), key=lambda item: _place(item[1][0]["component"]))):
        figure.add_scatter(
            x=[_column(row, last) for row in points],
            y=[row[y] or foot for row in points],
            customdata=[[plain(row["name"]), row[y]] for row in points],
            name=plain(group),
            mode="markers",
            marker={
                "color": color(theme.SERIES[place % len(theme.SERIES)]),
                "symbol": theme.SYMBOLS[place % len(theme.SYMBOLS)],
                "size": 8,
                "opacity": 0.85,
            },
            hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]:.3g}<extra></extra>",
            cliponaxis=False,
        )
    theme.axis_title(figure, "layer (in = before the first, out = after the last)", label)
    step = max(1, -(-(last + 1) // 12))
    ticks = [-1, *range(0, last + 1, step), last + 1]
    figure.update_xaxes(tickvals=ticks, ticktext=["in", *map(str, ticks[1:-1]), "out"], range=[-1.6, last + 1.6])
    if len(positive) < len(shown):
        figure.add_annotation(text="exactly zero", x=0, xref="paper", y=math.log10(foot), xanchor="left")
    figure.update_yaxes(type="log", **theme.powers(foot, max(positive, default=1.0)))
    theme.adapt(figure, height=360, xaxis__title__text="layer")
    return figure


def _column(row: Row, last: int) -> int:
    if row["layer"] is not None:
        return int(row["layer"])
    return -1 if row["component"].startswith("embed") else last + 1


def parameter_treemap(rows: Iterable[Row], title: str) -> go.Figure:
    """What a model is made of: area = parameters, first by layer, then by component.

    Row (of `lapis inspect`): `layer` (int or None), `component`, `parameters` (> 0). Rows of one layer and component
    are added up.
    """
    sizes: dict[tuple[int | None, str], int] = {}
    for row in rows:
        key = (row["layer"], row["component"])
        sizes[key] = sizes.get(key, 0) + row["parameters"]
    total = sum(sizes.values())
    if not total:
        return theme.nothing(title)
    roles = {"attn": "lapis", "mlp": "teal", "embed": "gold", "head": "orange", "norm": "slate"}
    nodes: list[tuple[str, str, str, int, str]] = [("model", "all", "", total, "wash")]
    for layer in sorted({layer for layer, _ in sizes if layer is not None}):
        inside = sum(size for (other, _), size in sizes.items() if other == layer)
        nodes.append((f"layer {layer}", f"layer {layer}", "model", inside, "wash"))
    for (where, component), size in sizes.items():
        parent = "model" if where is None else f"layer {where}"
        role = roles.get(component.split(".")[0], "purple")
        nodes.append((f"{parent}/{component}", plain(component), parent, size, role))
    text = {"wash": "ink", "teal": "on_bright", "gold": "on_bright"}
    figure = theme.new_figure(title, height=520, legend=False)
    figure.add_treemap(
        ids=[node[0] for node in nodes],
        labels=[node[1] for node in nodes],
        parents=[node[2] for node in nodes],
        values=[node[3] for node in nodes],
        customdata=[[short(node[3]), f"{node[3]:,}", node[3] / total] for node in nodes],
        textfont={"color": [color(text.get(node[4], "paper")) for node in nodes]},
        marker={
            "colors": [color(node[4]) for node in nodes],
            "line": {"width": 1, "color": color("paper")},
            "cornerradius": 2,
        },
        branchvalues="total",
        texttemplate="%{label}<br>%{customdata[0]}",
        hovertemplate="<b>%{id}</b><br>%{customdata[1]} parameters<br>%{customdata[2]:.2%} of the model<extra></extra>",
        tiling={"pad": 1, "packing": "squarify"},
        pathbar={"visible": False},
        root={"color": "rgba(0,0,0,0)"},
    )
    figure.update_layout(margin={"l": 0, "r": 0, "b": 0}, dragmode=False, uniformtext={"minsize": 9, "mode": "hide"})
    theme.adapt(figure, height=560)
    return figure
