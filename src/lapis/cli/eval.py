"""`lapis eval`: bits per byte, response NLL and stop rate, choices, classes, preference pairs, lm-eval's tasks."""

from collections.abc import Mapping
from typing import Annotated, Any

from cyclopts import Parameter

from lapis.evaluation.options import EvalOptions

WHOLE_MATRIX = 12  # classes of which the whole confusion matrix is shown
MISTAKES = 10


def evaluate(
    model: str,
    /,
    *,
    options: Annotated[EvalOptions, Parameter(name="*")] = EvalOptions(),  # noqa: B008
    json: bool = False,
) -> None:
    """Score a model on held-out text, chats, multiple choice, classes and preference pairs.

    Args:
        model: A model folder.
        json: Print one JSON object.
    """
    from lapis.cli.output import notes, progress, show
    from lapis.evaluation.evaluate import evaluate as run
    from lapis.generation.ready import choose_device
    from lapis.model.threads import settle_threads

    settle_threads(choose_device(options.device))
    with progress("scoring", "tokens") as report:
        result = run(model, options, report)
    show(result, json, lambda: _print(result))
    if not json:
        notes(result["notes"])


def _print(result: Mapping[str, Any]) -> None:
    """Every figure with its unit, and the classes' table."""
    from lapis.cli.output import number, table
    from lapis.report.evaluations import scores

    rows = [(score.subject, score.metric.label, number(score.value), score.metric.unit) for score in scores(result)]
    table(result["model"], ["on", "score", "", "unit"], rows)
    if "classes" in result:
        _print_classes(result["classes"])


def _print_classes(figures: Mapping[str, Any]) -> None:
    """Each class, and what was taken for what: the whole matrix where it is small, else the most frequent mistakes."""
    from lapis.cli.output import number, table

    names, confusion = figures["classes"], figures["confusion"]
    rows = [(name, *(number(figure) for figure in figures["by_class"][name].values())) for name in names]
    if len(names) <= WHOLE_MATRIX:
        rows = [(*row, *map(str, line)) for row, line in zip(rows, confusion, strict=True)]
        table("classes", ["is", "precision", "recall", "f1", "n", *(f"taken for {name}" for name in names)], rows)
        return
    table("classes", ["is", "precision", "recall", "f1", "n"], rows)
    mistakes = sorted(
        (
            (count, names[i], names[j])
            for i, line in enumerate(confusion)
            for j, count in enumerate(line)
            if i != j and count
        ),
        reverse=True,
    )
    listed = [(a, b, str(n)) for n, a, b in mistakes[:MISTAKES]]
    table("the most frequent mistakes", ["is", "taken for", "times"], listed)
