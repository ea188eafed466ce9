"""The kinds of evaluation, what each measures, and the options of an evaluation.

KINDS is the one table that `lapis eval` and the report read, EvalOptions the one place where options are written.

Names and keys are those of the JSON that `lapis eval --json` prints. A new kind is a function that scores, an entry
here, and a line in evaluate.py. Needs no torch, so that the report and the command line can read it at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lapis.errors import ConfigError

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


@dataclass(frozen=True)
class EvalOptions:
    """What to score a model on, and how. Raises ConfigError for a value out of range."""

    text: tuple[Path, ...] = ()
    """Files of documents: bits per byte."""
    chats: tuple[Path, ...] = ()
    """jsonl of chats: response NLL, and the share of greedy replies that end."""
    choices: Path | None = None
    """jsonl of prompt (or messages), choices and answer: accuracy."""
    classes: Path | None = None
    """Labeled texts (tsv, csv, jsonl) or pictures (npz, a folder of class folders): accuracy, F1, confusion."""
    pairs: tuple[Path, ...] = ()
    """jsonl of prompt, chosen and rejected: how often the model prefers the chosen reply, how sure it is, and what
    length has to do with it; by rewards, or by the log-probabilities of a language model."""
    reference: str | None = None
    """A model folder; pairs are then compared by the log-ratio to it (a policy's implicit reward)."""
    context: int | None = None
    """Tokens that the model sees at once; by default its own context."""
    limit: int | None = None
    """Look at so many documents, chats, questions, examples and pairs only."""
    max_tokens: int = 64
    """Within which a reply has to end."""
    positive: str | None = None
    """The class that F1 is of, where there are two; by default the second."""
    tasks: tuple[str, ...] = ()
    """Names of tasks of lm-evaluation-harness (needs lapis[eval]); may be given again."""
    task_folder: Path | None = None
    """Task files of one's own; they may name Python that is run."""
    fewshot: int | None = None
    """Examples before each question of a task; by default as the task says."""
    chat: bool = False
    """Ask the tasks' questions through the chat template."""
    precision: Literal["float32", "bf16"] | None = None
    """Of weights and arithmetic; default: that of the folder, or float32 where the processor has no bfloat16
    instructions. Scores in bf16 are about 0.001 off."""
    device: str | None = None
    """cpu or cuda; default: a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("context", "limit", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"eval: {name} is {value}; give 1 or more")
