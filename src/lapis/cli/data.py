"""`lapis data pack` and `lapis data show`: text as rows of tokens, and what of them carries loss."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lapis.wording import format_packed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lapis.text.corpus.corpus import Document
    from lapis.text.rows.rows import Rows
    from lapis.text.tokenizer.tokenizer import Tokenizer


def pack(
    files: list[Path],
    /,
    *,
    tokenizer: Path,
    out: Path,
    length: int = 512,
    too_long: Literal["cut", "drop"] = "cut",
    field: str | None = None,
    special: Literal["plain", "trusted"] = "plain",
    workers: int = 0,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Pack documents or chats into rows of one length, as files that training maps into memory.

    Under torchrun, and wherever else the same command runs several times on one disk, all share the files; what one
    that died left open is done by the others. A pack that was killed goes on where it was.

    Args:
        files: .txt, .md, .jsonl, .json or .parquet of documents (text) or chats (messages, ShareGPT, Alpaca, prompt
            and completion), .gz or .zst of these, folders, globs, or hub:OWNER/NAME.
        tokenizer: A folder with a tokenizer.
        out: The folder to write.
        length: Tokens of a row.
        too_long: What becomes of a chat longer than a row: cut at its end, or dropped. Both are counted.
        field: What holds the text or the messages, where the files call it otherwise.
        special: What special tokens that the text spells become: plain text, or, for text of your own that is trusted,
            tokens. They are counted either way.
        workers: Processes that tokenize; 0 = one for each processor. The result is the same for any number.
        overwrite: Replace the folder if it exists.
        json: Print one JSON object.
    """
    import time

    from lapis.checkpoint.commit import check_output, inode
    from lapis.cli.output import line, progress, show
    from lapis.cli.system_errors import system_error
    from lapis.config import environment_number
    from lapis.errors import LapisError
    from lapis.text.corpus.files import refuse_replacing
    from lapis.text.rows.coverage import figures, lines
    from lapis.text.rows.packing import pack as pack_files
    from lapis.text.tokenizer.tokenizer import Tokenizer

    alone = environment_number("WORLD_SIZE", 1) <= 1
    check_output(out, overwrite=overwrite or not alone, inputs=[tokenizer])  # another rank may be done already
    refuse_replacing(out, files)
    opened = Tokenizer.open(tokenizer)
    begin = time.monotonic()
    with progress("packing") as shown:

        def report(texts: int, tokens: int) -> None:
            shown.stage(f"packing: {format_packed(texts, tokens)}, {tokens / (time.monotonic() - begin):,.0f}/s")

        before = inode(out)
        try:
            rows = pack_files(
                files,
                opened,
                out,
                length,
                too_long=too_long,
                field=field,
                special=special,
                workers=workers,
                overwrite=overwrite,
                report=report,
            )
        except (LapisError, OSError) as error:
            if inode(out) in (None, before):
                raise
            line(f"note: {out} is complete; it could not be looked at: {system_error(error) or error}", error=True)
            return
    if environment_number("RANK", 0) == 0:
        result = {"out": str(out), **figures(rows), "seconds": time.monotonic() - begin}
        show(result, json, lambda: line("\n".join(lines(rows))))


def show(
    source: Path,
    /,
    *,
    tokenizer: Path | None = None,
    rows: int = 3,
    length: int = 512,
    first: int = 1000,
    field: str | None = None,
    special: Literal["plain", "trusted"] = "plain",
    json: bool = False,
) -> None:
    """Show data: the first records of a file as they are read, or rows of tokens in color.

    Of rows: what carries loss, where documents end, end tokens, padding. Coverage comes first.

    Args:
        source: A packed folder, or a file or hub:OWNER/NAME of documents, chats, preferences or labeled texts.
        tokenizer: For a file of documents or chats: a folder with a tokenizer, which makes rows of it.
        rows: How many rows to show.
        length: For a file: tokens of a row.
        first: For a file: how many of its documents or chats to look at.
        field: For a file: what holds the text or the messages, where it calls them otherwise.
        special: For a file: trusted makes tokens of special tokens that the text spells.
        json: Print one JSON object.
    """
    from itertools import islice

    import numpy as np

    from lapis.cli.output import console, line
    from lapis.cli.output import show as output
    from lapis.text.corpus.corpus import chats, documents
    from lapis.text.corpus.preview import preview
    from lapis.text.rows.coverage import figures, lines
    from lapis.text.rows.packing import pack as pack_items
    from lapis.text.rows.rows import MANIFEST, Rows
    from lapis.text.tokenizer.tokenizer import Tokenizer

    if (source / MANIFEST).is_file():
        packed = Rows.open(source)
        opened = Tokenizer.open(tokenizer or source / "tokenizer")
    else:
        seen = preview(source, rows, field)
        if tokenizer is None or seen["kind"] not in ("documents", "chats"):
            output({"source": str(source), **seen}, json, lambda: _print_records(seen))
            return
        opened = Tokenizer.open(tokenizer)
        if seen["kind"] == "chats":
            packed = pack_items(islice(chats(source, field), first), opened, length=length, special=special)
        else:
            packed = pack_items(_beginning(documents(source, field), first), opened, length=length, special=special)
        if seen["format"] is not None:
            packed.info["source_format"] = seen["format"]
    ids, targets, segments, _ = packed.arrays(np.arange(min(rows, len(packed))))
    shown = [_row(packed, opened, *row) for row in zip(ids.tolist(), targets.tolist(), segments.tolist(), strict=True)]

    def render() -> None:
        line("\n".join(lines(packed)))
        console.print("loss", style=_LOSS, end="  ")
        console.print("no loss", style=_QUIET, end="  ")
        console.print("end token", style=_END, end="  ")
        console.print("| border", style=_BORDER, end="  ")
        console.print("· padding", style=_PADDING)
        for number, row in enumerate(shown):
            console.print(f"\nrow {number}", style="bold")
            console.print(_painted(row))

    output({"source": str(source), **figures(packed), "shown": shown}, json, render)


def _print_records(seen: dict[str, Any]) -> None:
    from lapis.cli.output import line

    line(f"{seen['kind']}; {seen['format'] or 'plain text'}")
    for record in seen["records"]:
        line(f"\n{record['where']}", "bold")
        for part in record["parts"]:
            text = part["text"]
            line(f"{part['role']}: {text[:_SHOWN]}{' ...' if len(text) > _SHOWN else ''}")


def _beginning(items: "Iterator[Document]", first: int) -> "Iterator[Document]":
    """The first documents, and no more than a few pieces of long ones."""
    read = 0
    for number, document in enumerate(items):
        if number >= first or read > _LOOK:
            return
        read += len(document.text)
        yield document


_LOOK = 4 << 20  # characters
_SHOWN = 400  # characters of a part of a record
_LOSS, _QUIET, _END, _BORDER, _PADDING = "green", "bright_black", "bold magenta", "bold yellow", "blue"


def _row(rows: "Rows", tokenizer: "Tokenizer", ids: list[int], targets: list[int], segments: list[int]) -> list[Any]:
    """Every token of a row in the order of the text: what the model reads, and the last target of each document."""
    from lapis.text.rows.rows import IGNORE

    entries: list[dict[str, Any]] = []

    def add(id: int, loss: bool, segment: int) -> None:
        end = id in tokenizer.end_ids
        entries.append({"id": id, "text": tokenizer.text(id), "loss": loss, "end": end, "segment": segment})

    for t, (id, segment) in enumerate(zip(ids, segments, strict=True)):
        if segment == 0:
            add(id, False, 0)
            continue
        goes_on = t > 0 and segments[t - 1] == segment
        add(id, goes_on and targets[t - 1] != IGNORE, segment)
        last = t + 1 == len(ids) or segments[t + 1] != segment
        if last and targets[t] != IGNORE and (t + 1 < len(ids) or rows.chats or targets[t] == rows.info["end"]):
            add(targets[t], True, segment)
    return entries


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
