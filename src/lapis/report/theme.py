"""The look that every picture and page shares: a few colors, the fonts, the axes, and where panels stand.

A figure is made in the light colors. A page swaps each of them for its dark twin when the reader prefers dark, so a
color is written once, by its role. What a figure does on a narrow screen stands in `layout.meta`: `narrow` holds the
layout settings (dotted path -> value) that replace the wide ones there, `min_width` the pixels below which the
picture scrolls sideways inside its own box, `max_width` those beyond which it does not grow, `end` that it is scrolled
to its right end at first, and `more` the sentence that says on a narrow screen what is left out there.

The six series colors keep apart under protanopia, deuteranopia and tritanopia (tests/report/test_theme.py measures
it), and each series also has its own dash and marker. This file leaves out which picture shows what: see plots.py.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = Mapping[str, Any]

# role -> (light, dark)
COLORS: dict[str, tuple[str, str]] = {
    "paper": ("#fcfbf8", "#15171c"),
    "wash": ("#f4f1ea", "#1e2128"),
    "rule": ("#e3dfd4", "#2f343e"),
    "shade": ("#d3cdbf", "#434a57"),  # at the edge of what scrolls
    "quiet": ("#5b616b", "#a4acb9"),
    "ink": ("#1c2026", "#e7e9ed"),
    "lapis": ("#1633a8", "#4590ff"),
    "orange": ("#b04310", "#ef7526"),
    "teal": ("#1b9d92", "#3cceb8"),
    "gold": ("#bc8805", "#e6c83a"),
    "purple": ("#854698", "#b862ab"),
    "slate": ("#3b4048", "#dfe5f2"),
    "on_bright": ("#14171b", "#101317"),  # text on teal and gold, which are bright in both modes
}
SERIES = ("lapis", "orange", "teal", "gold", "purple", "slate")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")

# The models of the tour keep their color in every picture; other names take what is left, in order.
USUAL = {"grafted": 0, "adapted": 1, "chat": 2, "tuned": 3, "yardstick": 4, "base": 5}

# From the paper to the strongest ink, in both modes: more color is more of what is measured.
BLUES = (
    ("#f1eee6", "#1d2027"),
    ("#cdd9ea", "#1f3358"),
    ("#94b3dc", "#26529a"),
    ("#5483c6", "#3d7bd6"),
    ("#264f9f", "#86b4f7"),
    ("#0e2760", "#dceaff"),
)
AMBERS = (
    ("#f2ede4", "#1e1f26"),
    ("#f3ddb4", "#40301c"),
    ("#e6b76a", "#73501d"),
    ("#c98635", "#b07a25"),
    ("#8e5317", "#e3b252"),
    ("#4d2a09", "#fdecc2"),
)

DIVERGING = (*reversed(AMBERS[1:]), *BLUES)  # below zero, zero, above it

TITLE, LEGEND = 36, 40  # pixels above a plot; a page writes the title itself and takes TITLE away again

SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Noto Sans CJK SC', 'Liberation Sans', sans-serif"


def color(role: str) -> str:
    """The light color of a role of COLORS."""
    return COLORS[role][0]


def to_dark() -> dict[str, str]:
    """Light color -> its dark twin, for every color a figure of ours may hold."""
    return dict((*COLORS.values(), *BLUES, *AMBERS))


def shades() -> dict[str, tuple[str, str]]:
    """BLUES and AMBERS as further roles of a style sheet: blue-0 to blue-5, amber-0 to amber-5."""
    scales = {"amber": AMBERS, "blue": BLUES}
    return {f"{name}-{i}": pair for name, pairs in scales.items() for i, pair in enumerate(pairs)}


def scale(pairs: Sequence[tuple[str, str]] = BLUES) -> list[list[Any]]:
    """A plotly colorscale from BLUES or AMBERS."""
    return [[i / (len(pairs) - 1), light] for i, (light, _) in enumerate(pairs)]


def series(names: Iterable[str]) -> dict[str, int]:
    """Name -> place in SERIES, DASHES and SYMBOLS; the models of the tour always get the same place."""
    ordered = list(dict.fromkeys(names))
    taken = {USUAL[name] for name in ordered if name in USUAL}
    free = [place for place in range(len(SERIES)) if place not in taken] or list(range(len(SERIES)))
    others = [name for name in ordered if name not in USUAL]
    places = {name: free[i % len(free)] for i, name in enumerate(others)}
    return {name: places[name] if name in places else USUAL[name] for name in ordered}


def plain(text: object, limit: int = 0) -> str:
    """Text that plotly shows as it stands.

    Plotly reads a little HTML in its labels; a token such as `<b>` must not vanish into it. Line breaks, tabs and
    other control characters are made visible. With `limit`, longer text is cut and ends with an ellipsis.
    """
    shown = "".join(_visible(character) for character in str(text))
    if limit and len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    return html.escape(shown, quote=False)


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return "↵" if character == "\n" else "⇥"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F or 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000:
        return "\N{REPLACEMENT CHARACTER}"
    return character


def template() -> dict[str, Any]:
    """The plotly template (light); a page swaps its colors for dark ones."""
    title = {"font": {"color": color("quiet"), "size": 13}, "standoff": 8}
    axis = {
        "gridcolor": color("rule"),
        "linecolor": color("rule"),
        "zerolinecolor": color("rule"),
        "tickcolor": color("rule"),
        "tickfont": {"color": color("quiet"), "size": 12},
        "title": title,
        "zeroline": False,
        "automargin": True,
        "ticks": "",
        "ticklabelstandoff": 4,
    }
    return {
        "layout": {
            "font": {"family": SANS, "size": 13, "color": color("ink")},
            "title": {"x": 0, "xanchor": "left", "xref": "container", "font": {"size": 17}, "pad": {"l": 12}},
            "colorway": [color(role) for role in SERIES],
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 8, "r": 18, "t": 40, "b": 8},
            "xaxis": {**axis, "title": {**title, "standoff": 14}},
            "yaxis": axis,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "title": {}},
            "hoverlabel": {
                "bgcolor": color("paper"),
                "bordercolor": color("quiet"),
                "font": {"family": SANS, "size": 13, "color": color("ink")},
                "align": "left",
            },
            "hovermode": "closest",
            "annotationdefaults": {"font": {"color": color("quiet"), "size": 12}, "showarrow": False},
        }
    }


def new_figure(
    title: str, *, height: int = 400, min_width: int = 0, max_width: int = 0, legend: bool = True
) -> go.Figure:
    """An empty figure in the house look. `title` is plain text and states the finding; `legend` leaves room for one.

    `min_width` and `max_width` (pixels; 0 = none) are explained at the top of this file.
    """
    import plotly.graph_objects as go

    meta = {"title": title, "narrow": {}, "min_width": min_width, "max_width": max_width}
    figure = go.Figure(layout={"template": template(), "height": height, "meta": meta})
    figure.update_layout(title_text=plain(title), margin_t=TITLE + (LEGEND if legend else 8))
    return figure


def nothing(title: str) -> go.Figure:
    """The figure of no rows: it says so."""
    figure = new_figure(title, height=160, legend=False)
    figure.update_layout(xaxis_visible=False, yaxis_visible=False, dragmode=False)
    figure.add_annotation(text="nothing was measured", x=0, y=0.5, xref="paper", yref="paper", xanchor="left")
    return figure


def color_axis(shades: Sequence[tuple[str, str]], low: float, high: float, **bar: Any) -> dict[str, Any]:
    """A color axis with a slim horizontal color bar; `bar` places it and sets its ticks."""
    house: dict[str, Any] = {
        "orientation": "h",
        "thickness": 8,
        "outlinewidth": 0,
        "ypad": 0,
        "xpad": 0,
        "ticks": "",
        "tickangle": 0,
    }
    house |= {"yanchor": "bottom", "ticklabeloverflow": "allow", "tickfont": {"color": color("quiet"), "size": 11}}
    return {"colorscale": scale(shades), "cmin": low, "cmax": high, "colorbar": {**house, **bar}}


def powers(low: float, high: float, most: int = 8) -> dict[str, list[Any]]:
    """Ticks at powers of ten from `low` to `high` (> 0), at most `most` of them: 1, 0.01, 1e-4."""
    exponents = list(range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1))
    exponents = exponents[:: -(-len(exponents) // most) or 1]
    texts = [
        f"{10**power:,}" if power >= 0 else f"{10.0**power:g}" if power > -4 else f"1e{power}" for power in exponents
    ]
    return {"tickvals": [10.0**power for power in exponents], "ticktext": texts}


def percent(values: Iterable[float | None], sign: str = "") -> str:
    """A tick format for shares, with as many decimals as tell the ticks of these values apart.

    Args:
        values: What is drawn along the axis.
        sign: "+" shows it.
    """
    known = [value for value in values if value is not None]
    step = 100 * (max(known, default=1.0) - min(known, default=0.0)) / 7
    digits = min(6, max(0, math.ceil(-math.log10(step)))) if step > 0 else 1
    return f"{sign}.{digits}%"


def adapt(figure: go.Figure, **overrides: Any) -> None:
    """Add settings for narrow screens: `adapt(figure, height=600, yaxis__domain=[0, 0.4])`.

    Args:
        figure: Of `new_figure`.
        overrides: Settings of plotly's layout, `__` for the dots of their names.
    """
    meta = dict(figure.layout.meta)
    meta["narrow"] = {**meta["narrow"], **{key.replace("__", "."): value for key, value in overrides.items()}}
    figure.layout.meta = meta


def end(figure: go.Figure, more: str) -> None:
    """The right end of a wide picture decides: it is shown first, and a narrow screen says what is left out there."""
    figure.layout.meta = {**figure.layout.meta, "end": True, "more": more}


def axis_title(figure: go.Figure, x: str = "", y: str = "", panel: int = 1) -> None:
    """Name the axes of one panel; the unit belongs into the name."""
    number = "" if panel == 1 else str(panel)
    figure.update_layout(
        {f"xaxis{number}": {"title": {"text": plain(x)}}, f"yaxis{number}": {"title": {"text": plain(y)}}}
    )


def panels(
    figure: go.Figure,
    titles: Sequence[str],
    *,
    height: int,
    wide: int,
    narrow: int = 1,
    gap: int = 78,
    top: int = 30,
) -> tuple[int, int]:
    """Lay `len(titles)` panels out in `wide` columns, and in `narrow` columns on a narrow screen.

    `height` is the pixels of one row of panels, `gap` the pixels between rows (room for axis and panel titles), `top`
    those above the first. Panel i (from 1) uses the axes x{i}, y{i}. Returns the pixels from the top of the first row
    to the foot of the last, wide and narrow. Dragging does not zoom: panels are for reading across.
    """
    total, boxes = _boxes(len(titles), wide, height, gap)
    total_narrow, boxes_narrow = _boxes(len(titles), narrow, height, gap)
    above, below = TITLE + top, 54
    figure.update_layout(height=total + above + below, margin={"t": above, "b": below}, dragmode=False)
    adapt(figure, height=total_narrow + above + below)
    for i, title in enumerate(titles):
        n = "" if i == 0 else str(i + 1)
        figure.update_layout(
            {
                f"xaxis{n}": {"domain": boxes[i][0], "anchor": f"y{n}"},
                f"yaxis{n}": {"domain": boxes[i][1], "anchor": f"x{n}"},
            }
        )
        adapt(figure, **{f"xaxis{n}__domain": boxes_narrow[i][0], f"yaxis{n}__domain": boxes_narrow[i][1]})
        figure.add_annotation(
            text=plain(title), xref=f"x{n} domain", yref=f"y{n} domain", x=0, y=1, yshift=6,
            xanchor="left", yanchor="bottom", font={"color": color("ink"), "size": 13},
        )  # fmt: skip
    return total, total_narrow


def _boxes(count: int, columns: int, height: int, gap: int) -> tuple[int, list[tuple[list[float], list[float]]]]:
    """The pixels of the whole, and of each panel its x and y domain (shares of the whole)."""
    columns = min(columns, count)
    rows = -(-count // columns)
    total = rows * height + (rows - 1) * gap
    between = {1: 0.0, 2: 0.14}.get(columns, 0.08)
    width = (1 - between * (columns - 1)) / columns
    boxes = []
    for i in range(count):
        row, column = divmod(i, columns)
        left, top = column * (width + between), 1 - row * (height + gap) / total
        x, y = [left, left + width], [max(0.0, top - height / total), top]
        boxes.append(([round(v, 4) for v in x], [round(v, 4) for v in y]))
    return total, boxes
