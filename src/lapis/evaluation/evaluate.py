"""A folder's model scored on everything that the options name: what `lapis eval` does.

    evaluate("runs/chat", EvalOptions(text=(Path("valid.txt"),)))   -> {"model", "precision", "text": {...}}

One line in _SCORERS for each kind of report/evaluations.py. Leaves out showing it (cli/eval.py).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lapis.checkpoint import open_checkpoint
from lapis.errors import ConfigError, LapisError
from lapis.evaluation.chats import score_chats
from lapis.evaluation.choices import read_choices, score_choices
from lapis.evaluation.classification import score_classes
from lapis.evaluation.options import EvalOptions
from lapis.evaluation.preference import score_pairs
from lapis.evaluation.text import score_text
from lapis.generation.ready import check_int8, choose_device, choose_dtype, ready
from lapis.model.adapter import fold
from lapis.model.reading.load import load_readable
from lapis.model.reading.readable import ReadableModel
from lapis.model.scoring import Progress
from lapis.model.transformer import Transformer
from lapis.report.evaluations import KINDS
from lapis.text.corpus import corpus
from lapis.text.corpus.labels import labeled
from lapis.text.corpus.pairs import pairs as read_pairs
from lapis.text.corpus.pictures import Pictures, pictures, scaling
from lapis.text.tokenizer.tokenizer import Tokenizer

Report = Callable[[float, float | None, str], None]


@dataclass(frozen=True)
class _Job:
    """A model, its tokenizer (None for pictures), the options, what was read before, and where progress goes."""

    source: str
    model: ReadableModel
    tokenizer: Tokenizer | None
    options: EvalOptions
    report: Report

    @property
    def own(self) -> Transformer:
        """The model, where lapis runs it. Raises ConfigError for one of transformers."""
        if not isinstance(self.model, Transformer):
            raise ConfigError(
                f"eval: {self.source} runs through transformers; --classes and --pairs need a lapis model"
            )
        return self.model

    @property
    def words(self) -> Tokenizer:
        """The tokenizer. Raises ConfigError for a model that takes pictures."""
        if self.tokenizer is None:
            raise ConfigError(f"eval: {self.source} takes pictures; it is scored on --classes only")
        return self.tokenizer

    def progress(self, label: str) -> Progress:
        return lambda done, total: self.report(done, total, label)


def evaluate(
    model: str | Path, options: EvalOptions, report: Report = lambda done, total, label: None
) -> dict[str, Any]:
    """Scores of a model by kind, as `lapis eval --json` prints them, with `model`, `precision` and `notes`.

    Args:
        model: A model folder.
        options: What to score it on.
        report: Called with what is done, what there is to do (None where nobody knows), and what it is.

    Raises:
        ConfigError: The model cannot be scored on that, or an option does not fit.
        DataError: A file is damaged or holds nothing to score.
        CheckpointError: The folder is damaged.
    """
    if not any(getattr(options, kind) for kind in KINDS):
        *most, last = (f"--{kind}" for kind in KINDS)
        raise ConfigError(f"eval: give {', '.join(most)} or {last}, to score the model on")
    if options.tasks:
        import lapis.evaluation.harness  # noqa: F401  says at once where lm-eval is not installed
    if options.choices is not None:
        read_choices(options.choices)  # what is damaged is refused before the model is loaded
    report(0, None, f"reading {model}")
    device = choose_device(options.device)
    checkpoint = open_checkpoint(model, adapters=True)
    dtype, note = choose_dtype(checkpoint, "bfloat16" if options.precision == "bf16" else options.precision, device)
    opened = load_readable(checkpoint, dtype, device)
    if options.weights == "int8":
        check_int8(next(opened.parameters()).dtype, device, checkpoint)
    tokenizer = None if opened.config.image else Tokenizer.open(checkpoint)
    if tokenizer is not None and checkpoint.runs is None:
        tokenizer.check_rows(opened.config.vocab)
    job = _Job(str(model), opened, tokenizer, options, report)
    precision = str(next(opened.parameters()).dtype).removeprefix("torch.")
    notes = [note] if note else []
    result: dict[str, Any] = {"model": str(model), "precision": precision, "notes": [*notes, *opened.notes]}
    if any(getattr(options, kind) for kind in KINDS if kind != "classes"):
        _ = job.words
    unrounded = None
    if options.weights == "int8":
        if options.text:
            report(0, None, "plain text, before its weights are rounded")
            unrounded = _score_text(job)["bits_per_byte"]
        ready(fold(job.own) if checkpoint.adapter is not None else job.own, weights="int8")
        result["weights"] = "int8"
    for kind in KINDS:
        if getattr(options, kind):
            report(0, None, KINDS[kind].title)
            result[kind] = _SCORERS[kind](job)
            _check_finite(result[kind], f"eval: {model}: {kind}", infinite=kind == "tasks")
    if unrounded is not None:
        result["text"]["bits_per_byte_unrounded"] = unrounded
        cost = result["text"]["bits_per_byte"] - unrounded
        result["notes"].append(f"int8 weights cost {cost:+.4f} bits per byte on this text ({unrounded:.4f} without)")
    return result


def _check_finite(scores: Any, where: str, infinite: bool) -> None:
    """Raises LapisError for a score that is no number: what it would say is not known. infinite: may a score be so."""
    if isinstance(scores, Mapping):
        for name, value in scores.items():
            _check_finite(value, f"{where}.{name}", infinite)
    elif isinstance(scores, (list, tuple)):
        for value in scores:
            _check_finite(value, where, infinite)
    elif isinstance(scores, float) and (math.isnan(scores) or (math.isinf(scores) and not infinite)):
        raise LapisError(f"{where} is {scores}: the model computes NaN or Inf there; try --precision float32")


def _score_text(job: _Job) -> dict[str, Any]:
    documents = islice(corpus.documents(job.options.text), job.options.limit)
    return score_text(job.model, job.words, documents, job.options.context, progress=job.progress("plain text"))


def _score_chats(job: _Job) -> dict[str, Any]:
    options, chats = job.options, islice(corpus.chats(job.options.chats), job.options.limit)
    return score_chats(
        job.model, job.words, chats, context=options.context, max_tokens=options.max_tokens,
        progress=job.progress("chats"), replies_progress=job.progress("replies"),
    )  # fmt: skip


def _score_choices(job: _Job) -> dict[str, Any]:
    assert job.options.choices is not None
    questions = read_choices(job.options.choices)[: job.options.limit]
    return score_choices(job.model, job.words, questions, progress=job.progress("multiple choice"))


def _score_classes(job: _Job) -> dict[str, Any]:
    options, image = job.options, job.own.config.image
    assert options.classes is not None
    examples: Pictures | list[Any]
    if image is None:
        examples = list(islice(labeled(options.classes), options.limit))
    else:  # the files of a folder are brought to the model's size and scale
        mean, std = scaling(Path(job.source))
        examples = pictures(options.classes, image.size if options.classes.is_dir() else None, mean, std)
    return score_classes(
        job.own, job.tokenizer, examples, context=options.context, positive=options.positive,
        progress=job.progress("classes"),
    )  # fmt: skip


def _score_pairs(job: _Job) -> dict[str, Any]:
    options, records = job.options, islice(read_pairs(job.options.pairs), job.options.limit)
    return score_pairs(
        job.own, job.words, records, reference=options.reference, context=options.context,
        progress=job.progress("preference pairs"),
    )  # fmt: skip


def _score_tasks(job: _Job) -> dict[str, Any]:
    from lapis.evaluation.harness import run_tasks

    options = job.options
    return run_tasks(
        job.model, job.words, options.tasks, folder=options.task_folder, fewshot=options.fewshot, limit=options.limit,
        chat=options.chat, progress=job.progress("tasks"),
    )  # fmt: skip


_SCORERS: dict[str, Callable[[_Job], dict[str, Any]]] = {
    "text": _score_text,
    "chats": _score_chats,
    "choices": _score_choices,
    "classes": _score_classes,
    "pairs": _score_pairs,
    "tasks": _score_tasks,
}
