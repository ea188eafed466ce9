"""The page of training runs: curves of the loss and of everything else in the log, what a model says, and settings.

Takes the rows of log.jsonl and the facts of training.json. A metric needs no word here to be drawn; METRICS in
figures/curves.py only names the known ones as a reader would. Files are read in working_folder.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lapis.report.figures.curves import Runs, learning_curves, metric_panels, metric_points, metric_title
from lapis.report.figures.matrix import matrix
from lapis.report.markup import Column
from lapis.report.page import Page
from lapis.report.theme import Row

# What one unit of an objective's loss is; runs are compared only where it is the same
UNITS = {
    "causal": "nats per token", "chat": "nats per token of a reply", "masked": "nats per hidden token",
    "classify": "nats per example", "reward": "nats per pair", "dpo": "nats per pair", "orpo": "nats per pair",
    "simpo": "nats per pair", "ipo": "squared error per pair", "kto": "per reply",
    "grpo": "policy loss per token", "rloo": "policy loss per token", "ppo": "policy loss per token",
}  # fmt: skip
HELD_OUT_LOSS = ("valid_loss", "loss")
OPTIMIZER = ("lr", "grad_norm", "tokens_per_second")
SAMPLES = 6  # of what a model wrote on the way, the last ones
RISE = 1.01  # over the lowest held-out loss, from which a run counts as over-fitting


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: Of its folder.
        log: Rows of log.jsonl, with what times.json says of each.
        facts: training.json, with "replies" and the confusion matrix of a classifier where the folder has them.
    """

    name: str
    log: Sequence[Row]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, log: Sequence[Row], facts: Mapping[str, Any]) -> Run:
        """A run from its files: facts holds times.json as "times", if there is one."""
        rest = dict(facts)
        at_step = {row["step"]: row for row in (rest.pop("times", None) or {}).get("curve", ())}
        return cls(name, [{**at_step.get(row.get("step"), {}), **row} for row in log], rest)

    @property
    def objective(self) -> str:
        return str(self.facts.get("objective") or "")

    @property
    def rows(self) -> list[Row]:
        """The log; a held-out measurement that was made only at the end stands at the last row, one at the start in a
        row of its own."""
        rows: list[Row] = [dict(row) for row in self.log]
        if rows and isinstance(start := self.facts.get("start"), Mapping) and start:
            rows.insert(0, {"step": 0, "tokens": 0, "seconds": 0.0, "held_out": dict(start)})
        last = self.facts.get("held_out")
        if rows and isinstance(last, Mapping) and last and not any(row.get("held_out") for row in rows):
            rows[-1] = {**rows[-1], "held_out": last}
        return rows

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.log if row.get("loss") is not None]

    @property
    def first_loss(self) -> float | None:
        """Mean over the first twentieth of the curve."""
        few = max(1, len(self.losses) // 20)
        return sum(self.losses[:few]) / few if self.losses else None

    @property
    def last_loss(self) -> float | None:
        """The one that training.json states; without it the mean over the last twentieth of the curve."""
        stated = self.facts.get("loss")
        if isinstance(stated, int | float):
            return float(stated)
        few = max(1, len(self.losses) // 20)
        return sum(self.losses[-few:]) / few if self.losses else None

    @property
    def held_out(self) -> list[tuple[Row, float]]:
        """(row, held-out loss) of each measurement that gave a number."""
        losses = ((row, _held_out_loss(row)) for row in self.rows)
        return [(row, loss) for row, loss in losses if loss is not None and math.isfinite(loss)]


def run_page(log: Sequence[Row], facts: Mapping[str, Any], name: str) -> Page:
    """The page of one run.

    Args:
        log: The rows of log.jsonl.
        facts: training.json, or {}.
        name: What the run is called.
    """
    objective = str(facts.get("objective") or "")
    source = facts.get("model") or (facts.get("config") or {}).get("model")
    lead = f"How `{name}` was trained" + (f" from `{source}`" if isinstance(source, str) else "")
    page = Page(title_of(name), lead + (f", with the objective `{objective}`." if objective else "."))
    return add_runs(page, [Run(name, log, facts)])


def title_of(name: str) -> str:
    """The title of a run's page, by which a report knows it again."""
    return f"Training of {name}"


def add_runs(page: Page, runs: Sequence[Run], heading: str = "") -> Page:
    """Adds runs of one objective, on shared axes, with their settings and what else they hold.

    Args:
        page: Grows.
        runs: Of one objective, so that their losses mean the same.
        heading: What stands behind the titles of sections: the objective, where a page has several.
    """
    behind = f": {heading}" if heading else ""
    curves = {run.name: run.rows for run in runs if run.losses}
    unit = UNITS.get(runs[0].objective, "")
    measured = any(run.held_out for run in runs)
    text = f"The loss is in {unit}. " if unit else ""
    text += "Each point is the mean over a few steps" + ("; held-out figures stand on top." if measured else ".")
    page.section(f"Learning curves{behind}", text)
    if len(runs) == 1:
        page.stats(_key_figures(runs[0], unit))
    elif runs:
        page.table([_overview(run) for run in runs], _overview_columns(unit), "The runs", sortable=True)
    x = "tokens" if all(row.get("tokens") for rows in curves.values() for row in rows[-1:]) else "step"
    label = f"loss ({unit})" if unit else "loss"
    page.figure(learning_curves(_loss_rows(runs), _finding(runs), x=x, label=label))
    for run in runs:
        if (sentence := _over_fitting(run)) is not None:
            page.text(f"{run.name}: {sentence}" if len(runs) > 1 else sentence[0].upper() + sentence[1:])
        if isinstance(ended := run.facts.get("ended"), str):
            page.text(f"{run.name}: {ended}." if len(runs) > 1 else f"Why it ended: {ended}.")
    if any(row.get("bits_per_byte") is not None for rows in curves.values() for row in rows):
        rows = [{"run": name, **row} for name, mine in curves.items() for row in mine]
        page.figure(learning_curves(rows, "The same in bits per byte, which tokenizers share", x=x, y="bits_per_byte"))
    own = _names(curves, ("metrics", "held_out"))
    if own:
        dots = any(metric_points(rows, name, x, held_out=True) for rows in curves.values() for name in own)
        page.section(f"What the objective measures{behind}", "Dots are held-out figures." if dots else "")
        page.figure(metric_panels(curves, own, _moved(curves, own), x=x))
    for run in runs:
        _add_words(page, run, len(runs) > 1)
        add_confusion(page, run.facts, run.name if len(runs) > 1 else "")
    optimizer = [name for name in OPTIMIZER if any(metric_points(rows, name, x) for rows in curves.values())]
    if optimizer:
        page.section(f"How the run went{behind}", "What the optimizer did, step by step.")
        page.figure(metric_panels(curves, optimizer, "Learning rate, gradient, speed", x=x))
    for run in runs:
        _add_settings(page, run, len(runs) > 1)
    return page


def _held_out_loss(row: Row) -> float | None:
    """The held-out loss of a row, whatever its objective calls it."""
    figures = row.get("held_out") or {}
    return next((figures[name] for name in HELD_OUT_LOSS if isinstance(figures.get(name), int | float)), None)


def _loss_rows(runs: Sequence[Run]) -> list[Row]:
    """Rows of learning_curves: the loss, and a held-out loss where there is one."""
    rows: list[Row] = []
    for run in runs:
        rows += [{**row, "run": run.name} for row in run.log if row.get("loss") is not None]
        rows += [{**row, "run": run.name, "split": "held-out", "loss": loss} for row, loss in run.held_out]
    return rows


def _names(runs: Runs, keys: Sequence[str]) -> list[str]:
    """Metrics that any row holds, in their order, losses apart."""
    names = [name for rows in runs.values() for row in rows for key in keys for name in row.get(key) or {}]
    return [name for name in dict.fromkeys(names) if name not in (*HELD_OUT_LOSS, "bits_per_byte")]


def _finding(runs: Sequence[Run]) -> str:
    ends = {run.name: run.last_loss for run in runs if run.last_loss is not None}
    if not ends:
        return "No step was taken"
    if len(ends) > 1:
        best = min(ends, key=lambda name: ends[name] or 0.0)
        return f"The loss of {best} ends lowest, at {ends[best]:.3f}"
    first, last = runs[0].first_loss or 0.0, runs[0].last_loss or 0.0
    verb = "fell" if last < first else "rose" if last > first else "stayed"
    return f"The loss {verb} from {first:.3f} to {last:.3f}"


def _over_fitting(run: Run) -> str | None:
    """A sentence where the held-out loss rose again while the run went on."""
    if len(run.held_out) < 2:
        return None
    row, best = min(run.held_out, key=lambda pair: pair[1])
    last = run.held_out[-1][1]
    if last <= RISE * best or row is run.held_out[-1][0]:
        return None
    chosen = run.facts.get("best_step")
    written = f"; the weights of step {chosen:,} were written" if isinstance(chosen, int) else ""
    return (
        f"the held-out loss was lowest at step {row.get('step', 0):,}, at {best:.3f}, and rose to {last:.3f}: "
        f"from there on the run over-fits{written}."
    )


def _moved(runs: Runs, names: Sequence[str]) -> str:
    """The metric to look at first, from where to where."""
    for name in ("reward", "accuracy", "margin", *names):
        for rows in runs.values():
            points = metric_points(rows, name, "step")
            if name in names and len(points) > 1:
                few = max(1, len(points) // 20)
                first, last = (sum(v for _, v in part) / few for part in (points[:few], points[-few:]))
                known = metric_title(name)
                return f"{known[0].upper()}{known[1:]}: from {first:.3g} to {last:.3g}"
    return "What the objective measures"


def _key_figures(run: Run, unit: str) -> list[tuple[str, str, str]]:
    if not run.log:
        return [("steps", "0", "")]
    last = run.log[-1]
    figures = []
    if run.last_loss is not None:
        figures.append(
            ("loss at the end", f"{run.last_loss:.3f}", f"{unit}; {run.first_loss:.3f} at the start".lstrip("; "))
        )
    if run.held_out:
        figures.append(("held-out loss", f"{run.held_out[-1][1]:.3f}", unit))
    held_out = run.facts.get("held_out") or last.get("held_out") or {}
    others = [(name, value) for name, value in held_out.items() if name not in HELD_OUT_LOSS]
    figures += [(f"held-out {metric_title(name)}", f"{value:.4g}", "")
                for name, value in others[:2] if isinstance(value, int | float)]  # fmt: skip
    figures.append(("steps", f"{last.get('step', len(run.log)):,}", f"{last.get('tokens', 0):,} tokens"))
    if last.get("seconds"):
        pace = last.get("tokens", 0) / last["seconds"]
        figures.append(("time", _clock(last["seconds"]), f"{pace:,.0f} tokens per second" if pace else ""))
    return figures


def _overview(run: Run) -> dict[str, Any]:
    last = run.log[-1] if run.log else {}
    return {
        "run": run.name, "loss": run.last_loss, "held_out": run.held_out[-1][1] if run.held_out else None,
        "steps": last.get("step"), "tokens": last.get("tokens"),
        "time": _clock(last["seconds"]) if last.get("seconds") else None,
    }  # fmt: skip


def _overview_columns(unit: str) -> list[Column]:
    return [
        Column("run"), Column("loss", "loss at the end", ".3f", best="min", unit=unit),
        Column("held_out", "held-out loss", ".3f", best="min", unit=unit), Column("steps"), Column("tokens"),
        Column("time"),
    ]  # fmt: skip


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    )


def _with_reward(row: Mapping[str, Any], key: str) -> str:
    """before, or where it is known: before, reward 0.25."""
    reward = row.get(f"{key}_reward")
    return f"{key}, reward {reward:.2f}" if isinstance(reward, int | float) else key


def _add_words(page: Page, run: Run, several: bool) -> None:
    """What the model wrote: samples on the way, and replies before and after."""
    of = f", {run.name}" if several else ""
    samples = [f"step {row.get('step', 0):,}: {row['sample']}" for row in run.log if row.get("sample")]
    if samples:
        page.section(f"Samples on the way{of}")
        page.samples(samples[-SAMPLES:])
    replies = run.facts.get("replies")
    if isinstance(replies, list) and replies:
        page.section(f"Replies before and after{of}")
        page.replies([
            {"prompt": str(row.get("prompt", "")),
             "replies": {_with_reward(row, key): str(row[key]) for key in ("before", "after") if key in row}}
            for row in replies if isinstance(row, Mapping)
        ])  # fmt: skip


def _add_settings(page: Page, run: Run, several: bool) -> None:
    settings = {**(run.facts.get("config") or {}), **(run.facts.get("options") or {})}
    rows = [{"setting": key, "value": str(value)} for key, value in settings.items() if value not in (None, "", {})]
    if rows:
        page.table(rows, [Column("setting"), Column("value")], folded=f"Settings{f' of {run.name}' if several else ''}")


def add_confusion(page: Page, figures: Mapping[str, Any], name: str = "") -> None:
    """What a classifier took for what, wherever `confusion` and `classes` stand in an object of figures."""
    counts, classes = figures.get("confusion"), figures.get("classes")
    if isinstance(counts, list) and counts and isinstance(classes, list) and len(classes) == len(counts):
        right = sum(line[i] for i, line in enumerate(counts))
        total = sum(map(sum, counts)) or 1
        wrong = [(line[j], i, j) for i, line in enumerate(counts) for j in range(len(line)) if i != j and line[j]]
        title = f"{right / total:.1%} are right"
        if wrong:
            _, i, j = max(wrong)
            title += f"; {classes[i]} is most often taken for {classes[j]}"
        names = [str(label) for label in classes]
        page.section("What is taken for what" + (f", {name}" if name else ""))
        page.figure(matrix(counts, names, names, title, unit="examples", format=",.0f", x="said", y="true"))
    for value in figures.values():
        if isinstance(value, Mapping):
            add_confusion(page, value, name)
