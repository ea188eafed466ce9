"""`lapis data pack` and `lapis data show`: text as rows of tokens, and what of them carries loss."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lapis.text.rows import Rows
    from lapis.text.tokenizer import Tokenizer


def pack(
    files: list[Path],
    /,
    *,
    tokenizer: Path,
    out: Path,
    length: int = 512,
    too_long: Literal["cut", "drop"] = "cut",
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Pack documents or chats into rows of one length, as files that training maps into memory.

    Args:
        files: Text files, jsonl of documents (text) or chats (messages), .gz of these, folders or globs.
        tokenizer: A folder with a tokenizer.
        out: The folder to write.
        length: Tokens of a row.
        too_long: What becomes of a chat longer than a row: cut at its end, or dropped. Both are counted.
        overwrite: Replace the folder if it exists.
        json: Print one JSON object.
    """
    import time

    from lapis.checkpoint.commit import check_output
    from lapis.cli.output import console, show, stderr
    from lapis.text.packing import pack as pack_files
    from lapis.text.tokenizer import Tokenizer

    check_output(out, overwrite=overwrite, inputs=[tokenizer])
    opened = Tokenizer.open(tokenizer)
    begin = time.monotonic()
    with stderr.status("packing") as status:

        def report(texts: int, tokens: int) -> None:
            status.update(f"packing: {texts:,} texts, {tokens:,} tokens, {tokens / (time.monotonic() - begin):,.0f}/s")

        rows = pack_files(files, opened, out, length, too_long=too_long, overwrite=overwrite, report=report)
    result = {"out": str(out), **_figures(rows), "seconds": time.monotonic() - begin}
    show(result, json, lambda: console.print("\n".join(_lines(rows)), markup=False))


def show(
    source: Path,
    /,
    *,
    tokenizer: Path | None = None,
    rows: int = 3,
    length: int = 512,
    first: int = 1000,
    json: bool = False,
) -> None:
    """Show rows in color: what carries loss, where documents end, end tokens, padding. Coverage comes first.

    Args:
        source: A packed folder, or a file of documents or chats.
        tokenizer: For a file: a folder with a tokenizer.
        rows: How many rows to show.
        length: For a file: tokens of a row.
        first: For a file: how many of its documents or chats to look at.
        json: Print one JSON object.
    """
    from itertools import islice

    import numpy as np

    from lapis.cli.output import console
    from lapis.cli.output import show as output
    from lapis.errors import ConfigError
    from lapis.text.corpus import chats, documents, kind_of
    from lapis.text.packing import pack as pack_items
    from lapis.text.rows import MANIFEST, Rows
    from lapis.text.tokenizer import Tokenizer

    if (source / MANIFEST).is_file():
        packed = Rows.open(source)
        opened = Tokenizer.open(tokenizer or source / "tokenizer")
    else:
        kind = kind_of(source)
        if tokenizer is None:
            raise ConfigError(f"{source}: is not packed; give --tokenizer DIR to look at a file")
        opened = Tokenizer.open(tokenizer)
        if kind == "chats":
            packed = pack_items(islice(chats(source), first), opened, length=length)
        else:
            packed = pack_items(islice(documents(source), first), opened, length=length)
    ids, targets, segments, _ = packed.arrays(np.arange(min(rows, len(packed))))
    shown = [_row(packed, opened, *row) for row in zip(ids.tolist(), targets.tolist(), segments.tolist(), strict=True)]

    def render() -> None:
        console.print("\n".join(_lines(packed)), markup=False)
        console.print("loss", style=_LOSS, end="  ")
        console.print("no loss", style=_QUIET, end="  ")
        console.print("end token", style=_END, end="  ")
        console.print("| border", style=_BORDER, end="  ")
        console.print("· padding", style=_PADDING)
        for number, row in enumerate(shown):
            console.print(f"\nrow {number}", style="bold")
            console.print(_painted(row))

    output({"source": str(source), **_figures(packed), "shown": shown}, json, render)


_LOSS, _QUIET, _END, _BORDER, _PADDING = "green", "bright_black", "bold magenta", "bold yellow", "blue"


def _row(rows: "Rows", tokenizer: "Tokenizer", ids: list[int], targets: list[int], segments: list[int]) -> list[Any]:
    """Every token of a row in the order of the text: what the model reads, and the last target of each document."""
    from lapis.text.rows import IGNORE

    found: list[dict[str, Any]] = []

    def add(id: int, loss: bool, segment: int) -> None:
        end = id in tokenizer.end_ids
        found.append({"id": id, "text": tokenizer.text(id), "loss": loss, "end": end, "segment": segment})

    for t, (id, segment) in enumerate(zip(ids, segments, strict=True)):
        if segment == 0:
            add(id, False, 0)
            continue
        goes_on = t > 0 and segments[t - 1] == segment
        add(id, goes_on and targets[t - 1] != IGNORE, segment)
        last = t + 1 == len(ids) or segments[t + 1] != segment
        if last and targets[t] != IGNORE and (t + 1 < len(ids) or rows.chats or targets[t] == rows.info["end"]):
            add(targets[t], True, segment)
    return found


def _painted(row: list[dict[str, Any]]) -> Any:
    from rich.text import Text

    text = Text()
    padding = 0
    segment = row[0]["segment"] if row else 0
    for entry in row:
        if entry["segment"] == 0:
            padding += 1
            continue
        if entry["segment"] != segment:
            text.append("|\n", style=_BORDER)
            segment = entry["segment"]
        style = _END if entry["end"] else _LOSS if entry["loss"] else _QUIET
        text.append(entry["text"], style=f"{style} underline" if entry["end"] and entry["loss"] else style)
        if entry["text"].endswith("\\n"):
            text.append("\n")
    if padding:
        text.append(f"· x {padding}", style=_PADDING)
    return text


def _figures(rows: "Rows") -> dict[str, Any]:
    counts = rows.counts
    places = len(rows) * rows.length
    cut = counts.get("cut_tokens", 0)
    return {
        "kind": rows.info["kind"],
        "rows": len(rows),
        "length": rows.length,
        "counts": counts,
        "coverage": {
            "supervised": counts["supervised"] / max(1, counts["tokens"]),
            "padding": counts["padding"] / places,
            "cut": cut / max(1, counts["tokens"] + cut),
        },
        "digest": rows.digest,
    }


def _lines(rows: "Rows") -> list[str]:
    counts, figures = rows.counts, _figures(rows)["coverage"]
    texts = counts["chats"] if rows.chats else counts["documents"]
    lines = [
        f"{len(rows):,} rows of {rows.length:,} tokens from {texts:,} {rows.info['kind']}",
        f"{figures['supervised']:.1%} of tokens carry loss, {figures['padding']:.1%} of places are padding, "
        f"{figures['cut']:.1%} of tokens were cut",
    ]
    if rows.chats:
        lines.append(
            f"cut: {counts['cut_chats']:,} chats; dropped: {counts['dropped_long']:,} too long, "
            f"{counts['dropped_silent']:,} with nothing of the assistant left"
        )
    if counts.get("empty"):
        lines.append(f"skipped: {counts['empty']:,} documents without text")
    return lines
