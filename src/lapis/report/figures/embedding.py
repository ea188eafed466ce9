"""The picture of an embedding row by row: how far a fine-tune moved each token, the template's tokens above all.

A vocabulary of 150,000 rows would make a page of several megabytes and a slow picture, so the bulk of a large one is
summed up in a band and only what stands out is drawn as points. Reached through plots.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lapis.report import theme
from lapis.report.theme import Row, color, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

SCATTER_LIMIT = 4000


def embedding_rows(rows: Iterable[Row], title: str, *, label: int = 8) -> go.Figure:
    """How far each row of the embedding moved, by token id; special tokens are drawn apart and named.

    Row (of `lapis diff --rows`): `token` (its text), `id`, `special` (bool), `relative_norm`, optionally `cosine`.
    Beyond 4000 ordinary tokens the bulk is drawn as a band (the middle nine tenths in each of 200 ranges of ids), and
    only the 200 rows that moved most as points. Besides the special tokens, up to `label` ordinary ones that moved
    most are named, where there is room.
    """
    everything = list(rows)
    if not everything:
        return theme.nothing(title)
    special = [row for row in everything if row.get("special")]
    ordinary = [row for row in everything if not row.get("special")]
    figure = theme.new_figure(title, height=440)
    points = ordinary
    if len(ordinary) > SCATTER_LIMIT:
        points = sorted(ordinary, key=lambda row: -row["relative_norm"])[:200]
        _band(figure, ordinary)
    widest = max(row["id"] for row in everything) or 1
    tallest = max(row["relative_norm"] for row in everything) or 1.0
    named = _spread(ordinary, special, label, widest, tallest)
    groups = (("tokens", points, "lapis", "circle", 4), ("special tokens", special, "orange", "diamond", 11))
    for name, group, role, symbol, size in groups:
        if not group:
            continue
        strong = role == "orange"
        beside = _beside(group, widest, tallest) if strong else ["top center"] * len(group)
        shown = beside if strong else [row["id"] in named for row in group]
        cosines = ["–" if row.get("cosine") is None else f"{row['cosine']:.4f}" for row in group]
        figure.add_scatter(
            x=[row["id"] for row in group],
            y=[row["relative_norm"] for row in group],
            customdata=[[plain(row["token"], 40), cosine] for row, cosine in zip(group, cosines, strict=True)],
            text=[plain(row["token"], 16) if show else "" for row, show in zip(group, shown, strict=True)],
            name=name,
            mode="markers+text",
            textposition=[place or "middle right" for place in beside],
            textfont={"size": 11, "color": color("ink" if strong else "quiet")},
            marker={"color": color(role), "symbol": symbol, "size": size, "opacity": 1 if strong else 0.55},
            hovertemplate="<b>%{customdata[0]}</b>  id %{x}<br>moved by %{y:.3f} of its length"
            "<br>cosine %{customdata[1]}<extra></extra>",
            cliponaxis=False,
        )
    theme.axis_title(figure, "token id", "change of the row (relative norm)")
    figure.update_xaxes(exponentformat="none", separatethousands=True, nticks=8, range=[-0.02 * widest, 1.02 * widest])
    figure.update_yaxes(range=[0, 1.08 * tallest])
    theme.adapt(figure, height=380, xaxis__nticks=4)
    return figure


def _band(figure: go.Figure, rows: Sequence[Row]) -> None:
    """The middle nine tenths of the rows in each of 200 ranges of ids."""
    width = -(-len(rows) // 200)
    chunks = [rows[i : i + width] for i in range(0, len(rows), width)]
    middle = [chunk[len(chunk) // 2]["id"] for chunk in chunks]
    sizes = [sorted(row["relative_norm"] for row in chunk) for chunk in chunks]
    low, high = ([size[int(share * (len(size) - 1))] for size in sizes] for share in (0.05, 0.95))
    paint = theme.BLUES[2][0]
    common: dict[str, Any] = {"x": middle, "mode": "lines", "line": {"width": 1, "color": paint}, "hoverinfo": "skip"}
    figure.add_scatter(**common, y=low, showlegend=False)
    figure.add_scatter(**common, y=high, fill="tonexty", fillcolor=paint, name=f"middle 90 % of every {width} tokens")


def _spread(rows: Sequence[Row], special: Sequence[Row], count: int, widest: float, tallest: float) -> set[int]:
    """The ids of up to `count` rows that moved most and whose names do not overlap, on a narrow screen either."""
    chosen: list[Row] = []
    for row in sorted(rows, key=lambda row: -row["relative_norm"])[: 8 * count]:
        clear = all(
            abs(row["id"] - other["id"]) > 0.24 * widest
            or abs(row["relative_norm"] - other["relative_norm"]) > 0.07 * tallest
            for other in (*chosen, *special)
        )
        if clear and len(chosen) < count:
            chosen.append(row)
    return {row["id"] for row in chosen}


def _beside(rows: Sequence[Row], widest: float, tallest: float) -> list[str]:
    """Where each special token's name stands: towards the middle of the picture, higher or lower where two are close.

    "" where there is no room; the name then shows on hovering.
    """
    places, taken = [""] * len(rows), dict[str, float]()
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["relative_norm"])
    heights = [row["relative_norm"] / tallest for row in rows]
    for i, below in zip(order, [*order[1:], None], strict=False):
        side = "left" if rows[i]["id"] > widest / 2 else "right"
        crowded = below is not None and heights[i] - heights[below] < 0.05
        for level, shift in (("top", 0.04), ("middle", 0.0), ("bottom", -0.04))[0 if crowded else 1 :]:
            if taken.get(side, 9.0) - (heights[i] + shift) >= 0.05:
                places[i], taken[side] = f"{level} {side}", heights[i] + shift
                break
    return places
