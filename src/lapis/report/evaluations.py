"""The kinds of evaluation and what each measures: KINDS is the one table, for `lapis eval` and for the report.

Names and keys are those of the JSON that `lapis eval --json` prints. A new kind is a function that scores
(evaluation/), an entry here, and a line in evaluation/evaluate.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation.

    key: in the JSON. label: for people. unit: "" where the figure has none; "share" is from 0 to 1. better: which
    direction is better; "neither" for counts and for what only describes the data.
    """

    key: str
    label: str
    unit: str = ""
    better: Better = "neither"


@dataclass(frozen=True)
class EvaluationKind:
    """One kind of evaluation. key: its name in the JSON and its option (`--text`). title: for people. The first metric
    is the one to look at first."""

    key: str
    title: str
    metrics: tuple[Metric, ...]

    def metric(self, key: str) -> Metric:
        """The metric of that key; one that the table does not know is named by its key."""
        return next((metric for metric in self.metrics if metric.key == key), Metric(key, key.replace("_", " ")))


@dataclass(frozen=True)
class Score:
    """One figure of a result. subject: what it is of: the kind, or the task of lm-evaluation-harness."""

    kind: EvaluationKind
    subject: str
    metric: Metric
    value: float | int | str | None


_CLASS_METRICS = (
    Metric("accuracy", "accuracy", "share", "higher"),
    Metric("f1_macro", "F1, mean over classes", "share", "higher"),
    Metric("f1", "F1 of the positive class", "share", "higher"),
    Metric("positive", "positive class"),
    Metric("loss", "loss", "nats per example", "lower"),
    Metric("n", "examples"),
)

KINDS: dict[str, EvaluationKind] = {
    kind.key: kind
    for kind in (
        EvaluationKind(
            "text",
            "plain text",
            (
                Metric("bits_per_byte", "bits per byte", "bits", "lower"),
                Metric("nll", "NLL", "nats per token", "lower"),
                Metric("tokens", "tokens"),
                Metric("bytes", "bytes"),
                Metric("documents", "documents"),
            ),
        ),
        EvaluationKind(
            "chats",
            "chats",
            (
                Metric("response_nll", "response NLL", "nats per token", "lower"),
                Metric("stop_rate", "replies that end", "share", "higher"),
                Metric("tokens", "tokens of replies"),
                Metric("chats", "chats"),
                Metric("cut", "chats cut at the context"),
                Metric("unanswered", "chats without room for a reply"),
            ),
        ),
        EvaluationKind(
            "choices",
            "multiple choice",
            (
                Metric("accuracy", "accuracy", "share", "higher"),
                Metric("accuracy_per_byte", "accuracy per byte", "share", "higher"),
                Metric("chance", "accuracy of guessing", "share"),
                Metric("n", "questions"),
            ),
        ),
        EvaluationKind("classes", "classes", _CLASS_METRICS),
        EvaluationKind(
            "pairs",
            "preference pairs",
            (
                Metric("accuracy", "accuracy", "share", "higher"),
                Metric("margin", "margin, chosen over rejected", "", "higher"),
                Metric("loss", "loss", "nats per pair", "lower"),
                Metric("calibration_error", "calibration error", "share", "lower"),
                Metric("by", "compared by"),
                Metric("length_correlation", "correlation with length"),
                Metric("length_correlation_within", "correlation with length, within pairs"),
                Metric("longer_preferred", "longer reply preferred", "share"),
                Metric("longer_chosen", "longer reply chosen in the data", "share"),
                Metric("accuracy_chosen_longer", "accuracy where the chosen reply is longer", "share", "higher"),
                Metric("accuracy_chosen_shorter", "accuracy where the chosen reply is shorter", "share", "higher"),
                Metric("pairs", "pairs"),
                Metric("cut_replies", "replies cut at the context"),
                Metric("dropped_long", "pairs left out, too long"),
            ),
        ),
        EvaluationKind(
            "tasks",
            "tasks of lm-evaluation-harness",
            (
                Metric("acc", "accuracy", "share", "higher"),
                Metric("acc_norm", "accuracy per byte", "share", "higher"),
                Metric("acc_stderr", "standard error of accuracy", "share"),
                Metric("acc_norm_stderr", "standard error of accuracy per byte", "share"),
                Metric("exact_match", "exact match", "share", "higher"),
                Metric("f1", "F1", "share", "higher"),
                Metric("bits_per_byte", "bits per byte", "bits", "lower"),
                Metric("byte_perplexity", "perplexity per byte", "", "lower"),
                Metric("word_perplexity", "perplexity per word", "", "lower"),
                Metric("perplexity", "perplexity", "", "lower"),
            ),
        ),
    )
}  # fmt: skip


def kinds_in(result: Mapping[str, Any]) -> list[str]:
    """The kinds and tasks that a result has figures of."""
    return list(dict.fromkeys(score.subject for score in scores(result)))


def scores(result: Mapping[str, Any]) -> Iterator[Score]:
    """Every figure of what `lapis eval --json` prints, kind by kind in the order of KINDS; lists and tables are left
    out. A classifier's classes.json (accuracy, confusion, ... at its top) is read as the kind "classes"."""
    if isinstance(result.get("confusion"), list):
        result = {"classes": result}
    for key, kind in KINDS.items():
        figures = result.get(key)
        if not isinstance(figures, Mapping):
            continue
        subjects = figures.items() if key == "tasks" else [(key, figures)]
        for subject, values in subjects:
            if not isinstance(values, Mapping):
                continue
            order = {metric.key: place for place, metric in enumerate(kind.metrics)}
            for name in sorted(values, key=lambda name: order.get(name, len(order))):
                if not isinstance(values[name], (list, Mapping)):
                    yield Score(kind, str(subject), kind.metric(name), values[name])
