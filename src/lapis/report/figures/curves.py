"""Pictures of training: a loss over the run, and a small panel for each other metric.

Rows in, plotly figure out; the shape of a row stands in each docstring. Reached through plots.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from lapis.report import theme
from lapis.report.theme import Row, color, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

Runs = Mapping[str, Sequence[Row]]

AXES = {
    "tokens": "tokens seen",
    "seconds": "seconds of training",
    "step": "optimizer steps",
    "loss": "loss (nats per token)",
    "bits_per_byte": "bits per byte",
    "response_nll": "response NLL (nats per token)",
    "stop_rate": "stop rate (share of replies that end)",
    "answers": "answers exactly right (share)",
    "gap_closed": "gap closed (share)",
    "parameters": "parameters",
    "flops": "FLOPs",
}
METRICS = {
    "reward": "reward", "kl": "KL to the reference (nats)", "length": "length of a reply (tokens)",
    "entropy": "entropy (nats per token)", "ended": "replies that end (share)", "clip_share": "clipped tokens (share)",
    "unscored": "replies without a score (share)", "rollout_gap": "gap between rollout and training",
    "value_loss": "loss of the value head", "kl_weight": "weight of the KL", "policy_shift": "shift of the policy",
    "accuracy": "accuracy (share)", "margin": "margin, chosen over rejected", "f1": "F1",
    "f1_macro": "F1, mean over the classes",
    "chosen_reward": "reward of the chosen reply", "rejected_reward": "reward of the rejected reply",
    "lr": "learning rate", "grad_norm": "norm of the gradient", "tokens_per_second": "tokens per second",
    "perplexity": "perplexity",
}  # fmt: skip
POINTS = 1000


def learning_curves(
    rows: Iterable[Row], title: str, *, x: str = "tokens", y: str = "loss", log_x: bool = False, label: str = ""
) -> go.Figure:
    """Loss (or any `y`) against tokens, seconds or steps, one color per run.

    Row: `run`, the keys `x` and `y`, and optionally `split` ("train" or another, such as "held-out"). Held-out figures
    are drawn as points on a strong line. A training curve of more than 40 points is drawn faint, with its moving
    average (over a twentieth of the curve, centered) on top; of more than 1000, every n-th point is kept. `label` names
    the vertical axis, with its unit.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get(x) is not None and row.get(y) is not None:
            groups.setdefault((row["run"], row.get("split", "train")), []).append(row)
    if not groups:
        return theme.nothing(title)
    places = theme.series(run for run, _ in groups)
    figure = theme.new_figure(title, height=420)
    x_name, y_name = AXES.get(x, x), label or AXES.get(y, y)
    several = len({split for _, split in groups}) > 1
    for (run, split), points in groups.items():
        shown = points[:: -(-len(points) // POINTS)]
        if shown[-1] is not points[-1]:
            shown = [*shown, points[-1]]
        xs, ys = [row[x] for row in shown], [row[y] for row in shown]
        paint, dash = color(theme.SERIES[places[run]]), theme.DASHES[list(places).index(run) % len(theme.DASHES)]
        name = plain(f"{run}, {split}" if several else run)
        common: dict[str, Any] = {
            "x": xs,
            "name": name,
            "legendgroup": name,
            "hovertemplate": f"<b>%{{fullData.name}}</b><br>%{{x:,}} {x_name}<br>%{{y:.3f}} {y_name}<extra></extra>",
        }
        noisy = split == "train" and len(shown) > 40
        if noisy:
            figure.add_scatter(
                **common, y=ys, mode="lines", line={"color": paint, "width": 1}, opacity=0.28, showlegend=False
            )
            smooth = moving_average(ys, len(ys) // 20)
            figure.add_scatter(
                **common, y=smooth, mode="lines", line={"color": paint, "width": 2.2, "dash": dash}, meta="average"
            )
        else:
            figure.add_scatter(
                **common,
                y=ys,
                mode="lines+markers" if split != "train" or len(shown) < 20 else "lines",
                line={"color": paint, "width": 2, "dash": dash if split == "train" else "dot"},
                marker={"color": paint, "size": 7 if split == "train" else 10, "symbol": theme.SYMBOLS[places[run]]},
            )
    theme.axis_title(figure, x_name, y_name)
    figure.update_xaxes(type="log" if log_x else "linear", exponentformat="SI" if x != "seconds" else "none", nticks=7)
    theme.adapt(figure, height=340, xaxis__nticks=4, yaxis__nticks=5)
    return figure


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """The mean of about `window` values around each place; towards the ends the window shrinks, always centered."""
    totals = [0.0, *accumulate(values)]
    means = []
    for i in range(len(values)):
        reach = min(window // 2, i, len(values) - 1 - i)
        means.append((totals[i + reach + 1] - totals[i - reach]) / (2 * reach + 1))
    return means


def metric_panels(runs: Runs, names: Sequence[str], title: str, *, x: str = "step") -> go.Figure:
    """A small panel for each metric, every run a curve; a long curve is drawn faint under its moving average."""
    names = [name for name in names if any(metric_points(rows, name, x) for rows in runs.values())]
    if not names:
        return theme.nothing(title)
    figure = theme.new_figure(title)
    wide = min(3, len(names))
    titles = [metric_title(name) for name in names]
    several = len(runs) > 1
    heights = theme.panels(figure, titles, height=170, wide=wide, top=62 if several else 30)
    places = theme.series(runs)
    if several:  # one entry for each run, whichever panels it is in, above the panels' titles
        above = [1 + 28 / height for height in heights]
        figure.update_layout(legend_y=above[0])
        theme.adapt(figure, legend__y=above[1])
        for run in runs:
            figure.add_scatter(x=[None], y=[None], mode="lines", name=plain(run), legendgroup=run, hoverinfo="skip",
                               line={"color": color(theme.SERIES[places[run]]), "width": 2})  # fmt: skip
    for panel, name in enumerate(names, 1):
        number = "" if panel == 1 else str(panel)
        for run, rows in runs.items():
            paint = color(theme.SERIES[places[run]])
            hover = f"<b>{plain(run)}</b><br>%{{x:,}} {AXES.get(x, x)}<br>%{{y:.4g}}<extra></extra>"
            common: dict[str, Any] = {"xaxis": f"x{number}", "yaxis": f"y{number}", "name": plain(run),
                                      "legendgroup": run, "hovertemplate": hover, "cliponaxis": False,
                                      "showlegend": False}  # fmt: skip
            points = metric_points(rows, name, x, held_out=False)
            if points:
                xs, ys = [p[0] for p in points], [p[1] for p in points]
                if len(points) > 40:
                    figure.add_scatter(x=xs, y=ys, mode="lines", line={"color": paint, "width": 1}, opacity=0.28,
                                       **common)  # fmt: skip
                    ys = moving_average(ys, len(ys) // 20)
                mode = "lines+markers" if len(points) == 1 else "lines"
                figure.add_scatter(x=xs, y=ys, mode=mode, line={"color": paint, "width": 2}, **common)
            held = metric_points(rows, name, x, held_out=True)
            if held:
                figure.add_scatter(x=[p[0] for p in held], y=[p[1] for p in held], mode="markers+lines",
                                   marker={"color": paint, "size": 8, "symbol": theme.SYMBOLS[places[run]]},
                                   line={"color": paint, "width": 1, "dash": "dot"}, **common)  # fmt: skip
        figure.update_layout({
            f"xaxis{number}": {"nticks": 4, "exponentformat": "SI"},
            f"yaxis{number}": {"nticks": 5, "exponentformat": "e" if name == "lr" else "SI"},
        })  # fmt: skip
        if panel > len(names) - wide:
            theme.axis_title(figure, AXES.get(x, x), panel=panel)
    return figure


def metric_title(name: str) -> str:
    """A metric as a reader would call it; ms/bits_per_byte is "bits per byte, ms"."""
    of, _, plainly = name.rpartition("/")
    return METRICS.get(plainly, plainly.replace("_", " ")) + (f", {of}" if of else "")


def metric_points(rows: Iterable[Row], name: str, x: str, held_out: bool | None = None) -> list[tuple[float, float]]:
    """(x, value) of a metric, of at most POINTS rows. held_out: only those that are, or are not."""
    points = []
    for row in rows:
        value = None
        if held_out is not True:
            value = (row.get("metrics") or {}).get(name, row.get(name))
        if value is None and held_out is not False:
            value = (row.get("held_out") or {}).get(name)
        if isinstance(value, int | float) and isinstance(row.get(x), int | float):
            points.append((row[x], value))
    return points[:: -(-len(points) // POINTS) or 1]
