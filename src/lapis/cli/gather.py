"""`lapis gather`: what a model's layers read, or how much its weights matter, for merges that weigh with it."""

from pathlib import Path
from typing import Literal

from lapis.cli.output import line, progress, show, size
from lapis.wording import format_count


def gather(
    model: str,
    /,
    *,
    out: str,
    kind: Literal["gram", "fisher"] = "gram",
    text: list[Path] | None = None,
    chats: list[Path] | None = None,
    tokens: int = 65_536,
    context: int = 512,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Run a model on its own kind of text, and write what merges by regmean or fisher weigh it with.

    A recipe then names the folder: {model: MODEL, statistics: DIR}.

    Args:
        model: A model folder.
        out: A new folder.
        kind: gram: what each layer reads, for regmean. fisher: how much each weight matters, for fisher.
        text: Files of plain text.
        chats: jsonl of chats.
        tokens: How many are read.
        context: Of a window of text, and the most of a chat.
        overwrite: Swap an existing folder for the new one, whole.
        json: Print one JSON object.
    """
    import torch

    from lapis.model.threads import settle_threads
    from lapis.planning.gather import gather as run

    settle_threads(torch.device("cpu"))
    with progress("gathering", "tokens") as report:
        result = run(
            model, out, kind, text=text, chats=chats, tokens=tokens, context=context, overwrite=overwrite,
            progress=report,
        )  # fmt: skip
    what = f"{format_count(result['tensors'], 'tensor')} from {format_count(result['tokens'], 'token')}"
    show(result, json, lambda: line(f"{out}: {what}; {size(result['bytes'])} in {result['seconds']:.1f} s"))
