"""`lapis eval`: bits per byte, response NLL and stop rate, multiple choice."""

from pathlib import Path
from typing import Any, Literal


def evaluate(
    model: str,
    /,
    *,
    text: list[Path] | None = None,
    chats: list[Path] | None = None,
    choices: Path | None = None,
    context: int | None = None,
    limit: int | None = None,
    max_tokens: int = 64,
    precision: Literal["float32", "bf16"] = "float32",
    json: bool = False,
) -> None:
    """Score a model on held-out text, chats and multiple choice.

    Args:
        model: A model folder.
        text: Files of documents: bits per byte.
        chats: jsonl of chats: response NLL, and the share of greedy replies that end.
        choices: jsonl of prompt (or messages), choices and answer: accuracy.
        context: Tokens that the model sees at once; by default its own context.
        limit: Look at so many documents, chats and questions only.
        max_tokens: Within which a reply has to end.
        precision: bf16 is faster where the machine has it, and about 0.001 off.
        json: Print one JSON object.
    """
    from itertools import islice

    from lapis.cli.output import number, show, stderr, table
    from lapis.errors import ConfigError
    from lapis.evaluate import read_choices, score_chats, score_choices, score_text
    from lapis.model import load
    from lapis.text import corpus
    from lapis.text.tokenizer import Tokenizer

    if text is None and chats is None and choices is None:
        raise ConfigError("eval: give --text, --chats or --choices, files to score the model on")
    questions = None if choices is None else read_choices(choices)[:limit]
    opened, tokenizer = load(model), Tokenizer.open(model)
    result: dict[str, Any] = {"model": model}
    with stderr.status("text") as status:
        if text is not None:
            documents = islice(corpus.documents(text), limit)
            result["text"] = score_text(opened, tokenizer, documents, context, precision=precision)
        if chats is not None:
            status.update("chats")
            records = islice(corpus.chats(chats), limit)
            result["chats"] = score_chats(
                opened, tokenizer, records, context=context, max_tokens=max_tokens, precision=precision
            )
        if questions is not None:
            status.update("choices")
            result["choices"] = score_choices(opened, tokenizer, questions, precision=precision)

    def render() -> None:
        rows = [(what, name, number(value)) for what, found in result.items() if what != "model"
                for name, value in found.items()]  # fmt: skip
        table(model, ["on", "score", ""], rows)

    show(result, json, render)
