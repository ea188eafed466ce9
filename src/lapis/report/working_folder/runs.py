"""The page of training runs: every figure that a learning curve holds, held-out ones too, and replies before and after.

Rows of log.jsonl in, blocks of a page out. A metric needs no word here to be drawn; METRICS only names the known ones
as a reader would. Leaves out: reading files (folders.py), drawing one curve large (training.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lapis.report import theme
from lapis.report.figures.matrix import matrix
from lapis.report.figures.training import AXES, POINTS, learning_curves, moving_average
from lapis.report.markup import Column
from lapis.report.page import Page
from lapis.report.theme import Row, color, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

METRICS = {
    "reward": "reward", "kl": "KL to the reference (nats)", "length": "length of a reply (tokens)",
    "entropy": "entropy (nats per token)", "ended": "replies that end (share)", "clip_share": "clipped tokens (share)",
    "unscored": "replies without a score (share)", "rollout_gap": "gap between rollout and training",
    "value_loss": "loss of the value head", "kl_weight": "weight of the KL", "policy_shift": "shift of the policy",
    "accuracy": "accuracy (share)", "margin": "margin, chosen over rejected", "f1": "F1", "macro_f1": "F1, macro",
    "chosen_reward": "reward of the chosen reply", "rejected_reward": "reward of the rejected reply",
    "lr": "learning rate", "grad_norm": "norm of the gradient", "tokens_per_second": "tokens per second",
    "perplexity": "perplexity",
}  # fmt: skip
AXES_OF_A_RUN = ("lr", "grad_norm", "tokens_per_second")
Runs = Mapping[str, Sequence[Row]]


def run_page(log: Sequence[Row], facts: Mapping[str, Any], name: str) -> Page:
    """The page of one run. log: the rows of log.jsonl; facts: training.json, or {}."""
    objective = str(facts.get("objective", "") or "")
    lead = f"How `{name}` was trained" + (f": objective `{objective}`." if objective else ".")
    page = Page(f"Training of {name}", lead)
    return add_runs(page, {name: log}, {name: facts})


def add_runs(page: Page, runs: Runs, facts: Mapping[str, Mapping[str, Any]]) -> Page:
    """The curves of some runs, on shared axes, with their settings and what else they hold."""
    curves = {name: rows for name, rows in runs.items() if any("loss" in row for row in rows)}
    page.section("Learning curves", "Each point is the mean over a few steps; held-out figures stand on top.")
    if len(curves) == 1:
        ((name, rows),) = curves.items()
        page.stats(_key_figures(rows, facts.get(name, {})))
    x = "tokens" if all(row.get("tokens") for rows in curves.values() for row in rows[-1:]) else "step"
    page.figure(learning_curves(_loss_rows(curves), _finding(curves), x=x))
    if any(row.get("bits_per_byte") is not None for rows in curves.values() for row in rows):
        rows = [{"run": name, **row} for name, mine in curves.items() for row in mine]
        page.figure(learning_curves(rows, "The same in bits per byte, which tokenizers share", x=x, y="bits_per_byte"))
    own = _names(curves, ("metrics", "held_out"))
    if own:
        page.section("What the objective measures", "Dots are held-out figures.")
        page.figure(metric_panels(curves, own, _moved(curves, own), x=x))
    page.section("How the run went", "What the optimizer did, step by step.")
    page.figure(metric_panels(curves, AXES_OF_A_RUN, "Learning rate, gradient, speed", x=x))
    for name, known in facts.items():
        _add_facts(page, name if len(facts) > 1 else "", known)
    return page


def metric_panels(runs: Runs, names: Sequence[str], title: str, *, x: str = "step") -> go.Figure:
    """A small panel for each metric, every run a curve; a long curve is drawn faint under its moving average."""
    names = [name for name in names if any(_points(rows, name, x) for rows in runs.values())]
    if not names:
        return theme.nothing(title)
    figure = theme.new_figure(title)
    wide = min(3, len(names))
    titles = [METRICS.get(name, name.replace("_", " ")) for name in names]
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
            points = _points(rows, name, x, held_out=False)
            if points:
                xs, ys = [p[0] for p in points], [p[1] for p in points]
                if len(points) > 40:
                    figure.add_scatter(x=xs, y=ys, mode="lines", line={"color": paint, "width": 1}, opacity=0.28,
                                       **common)  # fmt: skip
                    ys = moving_average(ys, len(ys) // 20)
                mode = "lines+markers" if len(points) == 1 else "lines"
                figure.add_scatter(x=xs, y=ys, mode=mode, line={"color": paint, "width": 2}, **common)
            held = _points(rows, name, x, held_out=True)
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


def _points(rows: Iterable[Row], name: str, x: str, held_out: bool | None = None) -> list[tuple[float, float]]:
    """(x, value) of a metric, of at most POINTS rows. held_out: only those that are, or are not."""
    found = []
    for row in rows:
        value = None
        if held_out is not True:
            value = (row.get("metrics") or {}).get(name, row.get(name))
        if value is None and held_out is not False:
            value = (row.get("held_out") or {}).get(name)
        if isinstance(value, int | float) and isinstance(row.get(x), int | float):
            found.append((row[x], value))
    return found[:: -(-len(found) // POINTS) or 1]


def _loss_rows(runs: Runs) -> list[Row]:
    """Rows of learning_curves: the loss, and a held-out loss where there is one."""
    rows: list[Row] = []
    for run, log in runs.items():
        rows += [{**row, "run": run} for row in log if row.get("loss") is not None]
        rows += [
            {**row, "run": run, "split": "held-out", "loss": row["held_out"]["loss"]}
            for row in log if (row.get("held_out") or {}).get("loss") is not None
        ]  # fmt: skip
    return rows


def _names(runs: Runs, keys: Sequence[str]) -> list[str]:
    """Metrics that any row holds, in their order, the loss apart."""
    found = {name for rows in runs.values() for row in rows for key in keys for name in row.get(key) or {}}
    order = [name for rows in runs.values() for row in rows for key in keys for name in row.get(key) or {}]
    return [name for name in dict.fromkeys(order) if name in found and name not in ("loss", "bits_per_byte")]


def _ends(rows: Sequence[Row]) -> tuple[float, float]:
    """Mean loss over the first and the last twentieth of a curve."""
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    few = max(1, len(losses) // 20)
    return sum(losses[:few]) / few, sum(losses[-few:]) / few


def _finding(runs: Runs) -> str:
    if not runs:
        return "No step was taken"
    if len(runs) > 1:
        ends = {name: _ends(rows)[1] for name, rows in runs.items()}
        best = min(ends, key=lambda name: ends[name])
        return f"The loss of {best} ends lowest, at {ends[best]:.3f}"
    first, last = _ends(next(iter(runs.values())))
    verb = "fell" if last < first else "rose" if last > first else "stayed"
    return f"The loss {verb} from {first:.3f} to {last:.3f}"


def _moved(runs: Runs, names: Sequence[str]) -> str:
    """The metric to look at first, from where to where."""
    for name in ("reward", "accuracy", "margin", *names):
        for rows in runs.values():
            points = _points(rows, name, "step")
            if name in names and len(points) > 1:
                few = max(1, len(points) // 20)
                first, last = (sum(v for _, v in part) / few for part in (points[:few], points[-few:]))
                known = METRICS.get(name, name.replace("_", " "))
                return f"{known[0].upper()}{known[1:]}: from {first:.3g} to {last:.3g}"
    return "What the objective measures"


def _key_figures(rows: Sequence[Row], facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    last = rows[-1]
    figures = [("loss at the end", f"{_ends(rows)[1]:.3f}", f"{_ends(rows)[0]:.3f} at the start"),
               ("steps", f"{last.get('step', len(rows)):,}", f"{last.get('tokens', 0):,} tokens")]  # fmt: skip
    if last.get("seconds"):
        pace = last.get("tokens", 0) / last["seconds"]
        figures.append(("time", _clock(last["seconds"]), f"{pace:,.0f} tokens per second" if pace else ""))
    held = facts.get("held_out") or last.get("held_out") or {}
    figures += [(f"held-out {name.replace('_', ' ')}", f"{value:.4g}", "")
                for name, value in list(held.items())[:2] if isinstance(value, int | float)]  # fmt: skip
    return figures


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    )


def _valued(row: Mapping[str, Any], key: str) -> str:
    """before, or where it is known: before, reward 0.25."""
    reward = row.get(f"{key}_reward")
    return f"{key}, reward {reward:.2f}" if isinstance(reward, int | float) else key


def _add_facts(page: Page, name: str, facts: Mapping[str, Any]) -> None:
    """Replies before and after, where a run kept some, and its settings."""
    replies = facts.get("replies")
    if isinstance(replies, list) and replies:
        page.section(f"Replies before and after{f', {name}' if name else ''}")
        page.replies([
            {"prompt": str(row.get("prompt", "")),
             "replies": {_valued(row, key): str(row[key]) for key in ("before", "after") if key in row}}
            for row in replies if isinstance(row, Mapping)
        ])  # fmt: skip
    add_confusion(page, facts)
    settings = {**(facts.get("config") or {}), **(facts.get("options") or {})}
    rows = [{"setting": key, "value": str(value)} for key, value in settings.items() if value not in (None, "", {})]
    if rows:
        page.table(rows, [Column("setting"), Column("value")], folded=f"Settings{f' of {name}' if name else ''}")


def add_confusion(page: Page, found: Mapping[str, Any]) -> None:
    """What a classifier took for what, wherever `confusion` and `classes` stand in an object of figures."""
    table, classes = found.get("confusion"), found.get("classes")
    if isinstance(table, list) and table and isinstance(classes, list) and len(classes) == len(table):
        right = sum(line[i] for i, line in enumerate(table))
        total = sum(map(sum, table)) or 1
        wrong = [(line[j], i, j) for i, line in enumerate(table) for j in range(len(line)) if i != j and line[j]]
        title = f"{right / total:.1%} are right"
        if wrong:
            _, i, j = max(wrong)
            title += f"; {classes[i]} is most often taken for {classes[j]}"
        names = [str(name) for name in classes]
        page.section("What is taken for what")
        page.figure(matrix(table, names, names, title, unit="texts", format=",.0f", x="said", y="true"))
    for value in found.values():
        if isinstance(value, Mapping):
            add_confusion(page, value)
