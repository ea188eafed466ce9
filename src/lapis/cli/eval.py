"""`lapis eval`: bits per byte, response NLL and stop rate, choices, classes, preference pairs, lm-eval's tasks."""

from pathlib import Path
from typing import Any, Literal


def evaluate(
    model: str,
    /,
    *,
    text: list[Path] | None = None,
    chats: list[Path] | None = None,
    choices: Path | None = None,
    classes: Path | None = None,
    pairs: list[Path] | None = None,
    reference: str | None = None,
    context: int | None = None,
    limit: int | None = None,
    max_tokens: int = 64,
    positive: str | None = None,
    tasks: list[str] | None = None,
    task_folder: Path | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    precision: Literal["float32", "bf16"] = "float32",
    json: bool = False,
) -> None:
    """Score a model on held-out text, chats, multiple choice, classes and preference pairs.

    Args:
        model: A model folder.
        text: Files of documents: bits per byte.
        chats: jsonl of chats: response NLL, and the share of greedy replies that end.
        choices: jsonl of prompt (or messages), choices and answer: accuracy.
        classes: Labeled texts (tsv, csv, jsonl) or pictures (npz, a folder of class folders): accuracy, F1, confusion.
        pairs: jsonl of prompt, chosen and rejected: how often the model prefers the chosen reply, how sure it is, and
            what length has to do with it; by rewards, or by the log-probabilities of a language model.
        reference: A model folder; pairs are then compared by the log-ratio to it (a policy's implicit reward).
        context: Tokens that the model sees at once; by default its own context.
        limit: Look at so many documents, chats, questions, examples and pairs only.
        max_tokens: Within which a reply has to end.
        positive: The class that F1 is of, where there are two; by default the second.
        tasks: Names of tasks of lm-evaluation-harness (needs lapis[eval]); may be given again.
        task_folder: Task files of one's own; they may name Python that is run.
        fewshot: Examples before each question of a task; by default as the task says.
        chat: Ask the tasks' questions through the chat template.
        precision: bf16 is faster where the machine has it, and about 0.001 off.
        json: Print one JSON object.
    """
    from itertools import islice

    from lapis.cli.output import number, progress, show, table
    from lapis.errors import ConfigError
    from lapis.evaluation.chats import score_chats
    from lapis.evaluation.choices import read_choices, score_choices
    from lapis.evaluation.classification import score_classes
    from lapis.evaluation.preference import score_pairs
    from lapis.evaluation.text import score_text
    from lapis.model.load import load
    from lapis.text.corpus import corpus
    from lapis.text.corpus.labels import labeled
    from lapis.text.corpus.pairs import pairs as read_pairs
    from lapis.text.tokenizer.tokenizer import Tokenizer

    if all(given is None for given in (text, chats, choices, classes, pairs, tasks)):
        raise ConfigError("eval: give --text, --chats, --choices, --classes, --pairs or --tasks, to score the model on")
    if tasks is not None:
        import lapis.evaluation.harness  # says at once where lm-eval is not installed
    questions = None if choices is None else read_choices(choices)[:limit]
    opened = load(model)
    tokenizer = None if opened.config.image else Tokenizer.open(model)
    if tokenizer is None and (text or chats or choices or pairs or tasks):
        raise ConfigError(f"eval: {model} takes pictures; it is scored on --classes only")
    result: dict[str, Any] = {"model": model}
    with progress("text") as report:
        if text is not None and tokenizer:
            documents = islice(corpus.documents(text), limit)
            result["text"] = score_text(opened, tokenizer, documents, context, precision=precision)
        if chats is not None and tokenizer:
            report.stage("chats")
            records = islice(corpus.chats(chats), limit)
            result["chats"] = score_chats(
                opened, tokenizer, records, context=context, max_tokens=max_tokens, precision=precision
            )
        if questions is not None and tokenizer:
            report.stage("choices")
            result["choices"] = score_choices(opened, tokenizer, questions, precision=precision)
        if pairs is not None and tokenizer:
            report.stage("pairs")
            found = islice(read_pairs(pairs), limit)
            result["pairs"] = score_pairs(
                opened, tokenizer, found, reference=reference, context=context, precision=precision
            )
        if tasks and tokenizer:
            report.stage("tasks")
            run_tasks = lapis.evaluation.harness.run_tasks
            options: Any = {"folder": task_folder, "fewshot": fewshot, "limit": limit, "chat": chat}
            result["tasks"] = run_tasks(opened, tokenizer, tasks, precision=precision, **options)
        if classes is not None:
            report.stage("classes")
            if tokenizer is None:
                examples: Any = _pictures(classes, opened.config.image, model)
            else:
                examples = list(islice(labeled(classes), limit))
            result["classes"] = score_classes(opened, tokenizer, examples, context=context, positive=positive)

    def render() -> None:
        told = {**result, **result.get("tasks", {})}
        rows = [(what, name, number(value)) for what, found in told.items() if what not in ("model", "tasks")
                for name, value in found.items() if not isinstance(value, (list, dict))]  # fmt: skip
        table(model, ["on", "score", ""], rows)
        if "classes" in result:
            _render_classes(result["classes"])

    show(result, json, render)


def _pictures(source: Path, image: Any, model: str) -> Any:
    """Held-out pictures as the model takes them: the files of a folder are brought to its size and scale."""
    from lapis.text.corpus.pictures import pictures, scaling

    mean, std = scaling(Path(model))
    return pictures(source, image.size if source.is_dir() else None, mean, std)


def _render_classes(found: dict[str, Any]) -> None:
    """Each class, and what was taken for what: the whole matrix where it is small, else the most frequent mistakes."""
    from lapis.cli.output import number, table

    names, confusion = found["classes"], found["confusion"]
    rows = [(name, *(number(figure) for figure in found["by_class"][name].values())) for name in names]
    if len(names) <= 12:
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
    table("the most frequent mistakes", ["is", "taken for", "times"], [(a, b, str(n)) for n, a, b in mistakes[:10]])
