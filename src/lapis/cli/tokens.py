"""`lapis tokens`: text -> tokens -> ids -> vectors -> ids again, through the output embedding."""

from pathlib import Path
from typing import Any

from lapis.wording import format_count


def tokens(model: str, text: str, /, *, json: bool = False) -> None:
    """Show how a model reads a text, and the way back: which token each vector gives through the output embedding.

    Args:
        model: A model, or a folder with only a tokenizer, of which tokens and ids are shown.
        text: The text; what spells a special token is plain text, as in every prompt.
        json: Print one JSON object.
    """
    from lapis.checkpoint import open_checkpoint
    from lapis.cli.output import line, show, table
    from lapis.text.tokenizer.roundtrip import holds_only_tokenizer, round_trip, token_table
    from lapis.text.tokenizer.tokenizer import Tokenizer

    if holds_only_tokenizer(Path(model)):
        entries = token_table(Tokenizer.open(model), text)
        alone = {"model": model, "text": text, "tokens": entries}
        show(alone, json, lambda: table("", ("token", "id"), [[e["text"], str(e["id"])] for e in entries]))
        return
    checkpoint = open_checkpoint(model)
    result: dict[str, Any] = {"model": model, "text": text, **round_trip(checkpoint, Tokenizer.open(checkpoint), text)}

    def render() -> None:
        rows = [
            [
                entry["text"],
                str(entry["id"]),
                " ".join(f"{x:+.3f}" for x in entry["vector"]),
                f"{entry['norm']:.3f}",
                entry["back_text"] if entry["back"] != entry["id"] else "same",
            ]
            for entry in result["tokens"]
        ]
        table("", ("token", "id", f"first of {result['dim']} numbers", "norm", "back"), rows)
        head = "the input embedding itself (tied)" if result["tied"] else result["head"]
        line(f"{result['returned']} of {format_count(len(rows), 'token')} come back as themselves, through {head}")

    show(result, json, render)
