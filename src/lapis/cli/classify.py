"""`lapis classify`: the class of a text, a picture, or each text of a file, with probabilities."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lapis.generation.options import Runtime
from lapis.wording import format_part

if TYPE_CHECKING:
    from lapis.model.transformer import Transformer
    from lapis.text.corpus.pictures import Pictures


def classify(
    model: str,
    text: Annotated[str, Parameter(allow_leading_hyphen=True)] = "",
    /,
    *,
    file: Path | None = None,
    context: int | None = None,
    runtime: Annotated[Runtime, Parameter(name="*")] = Runtime(),  # noqa: B008
    json: bool = False,
) -> None:
    """Say which class a text is of, or a picture, and how sure the model is.

    Args:
        model: A model folder with a classifier.
        text: The text; "-" reads it from standard input. For a model that takes pictures, a picture's file.
        file: Texts instead of one: .txt with one on each line, or .jsonl, .tsv, .csv with a field or column text; for
            pictures an .npz file, or a folder of class folders.
        context: Tokens that the model sees; longer texts are cut at their end.
        json: Print one JSON object.
    """
    from lapis.checkpoint import open_checkpoint
    from lapis.cli.output import notes, progress, show
    from lapis.errors import ConfigError
    from lapis.evaluation.classification import classify as run
    from lapis.generation.ready import choose_device, choose_dtype
    from lapis.model.load import load
    from lapis.model.threads import settle_threads
    from lapis.text.tokenizer.tokenizer import Tokenizer

    if (text == "") == (file is None):
        raise ConfigError('classify: give a text, or --file FILE: lapis classify MODEL "text"')
    if text == "-":
        text = sys.stdin.read()
    with progress(f"reading {model}") as report:
        device = choose_device(runtime.device)
        settle_threads(device)
        checkpoint = open_checkpoint(model, adapters=True)
        dtype, note = choose_dtype(checkpoint, runtime.dtype, device)
        opened = load(checkpoint, dtype, device)
        if opened.config.head not in ("classes", "scalar"):
            raise ConfigError(f"classify: {model} has the head {opened.config.head}, which names no classes; train a "
                              "classifier with: objective: classify")  # fmt: skip
        tokenizer = None if opened.config.image else Tokenizer.open(checkpoint)
        inputs: list[str] | Pictures = (
            _pictures(file or Path(text), opened, model) if opened.config.image else [text] if file is None
            else _texts(file)
        )  # fmt: skip
        predictions = run(
            opened, tokenizer, inputs, context=context,
            progress=lambda done, total: report(done, total, "classifying"),
        )  # fmt: skip
    names = list(inputs) if isinstance(inputs, list) else list(inputs.where)
    rows = [
        {"input": name, "label": p.label, "probability": p.probabilities.get(p.label or ""), "score": p.score,
         "cut": p.cut, "probabilities": p.probabilities}
        for name, p in zip(names, predictions, strict=True)
    ]  # fmt: skip
    remarks = [*([note] if note else []), *opened.notes]
    if cut := sum(p.cut for p in predictions):
        long = "longer than the context and"
        remarks.append(
            format_part(cut, len(rows), "text", f"is {long} was cut at its", f"are {long} were cut at their") + " end"
        )
    result = {"model": model, **(rows[0] if file is None else {}), "results": rows, "notes": remarks}
    show(result, json, lambda: _print(rows, file is None))
    if not json:
        notes(remarks)


def _print(rows: list[dict[str, Any]], one: bool) -> None:
    """All classes of one input, or the likeliest of each."""
    from lapis.cli.output import number, table

    if rows[0]["score"] is not None:
        table("", ["input", "score"], [(row["input"], number(row["score"])) for row in rows])
    elif one:
        table("", ["class", "probability"], [(name, f"{p:.4f}") for name, p in rows[0]["probabilities"].items()])
    else:
        table("", ["input", "class", "probability"],
              [(row["input"], row["label"], f"{row['probability']:.4f}") for row in rows])  # fmt: skip


def _texts(file: Path) -> list[str]:
    """The texts of a file: each line of a .txt, each record's text of the others."""
    from lapis.errors import DataError
    from lapis.text.corpus.labels import bare_texts

    if file.suffix.lower() != ".txt":
        return list(bare_texts(file))
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}; give a text file in UTF-8") from None
    if texts := [line for line in lines if line.strip()]:
        return texts
    raise DataError(f"{file}: holds no line of text; there is nothing to classify")


def _pictures(source: Path, model: "Transformer", folder: str) -> "Pictures":
    """Pictures as the model takes them: one file, an .npz file, or a folder of class folders."""
    from lapis.text.corpus.pictures import Pictures, pictures, scaling

    image = model.config.image
    assert image is not None
    mean, std = scaling(Path(folder))
    if source.is_file() and source.suffix != ".npz":
        shape = (image.channels, image.size, image.size)
        return Pictures((source,), ("",), (str(source),), shape, tuple(mean), tuple(std), image.size)
    return pictures(source, image.size if source.is_dir() else None, mean, std)
