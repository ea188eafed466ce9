"""Documents and chats -> rows of one length, in memory or in a folder.

A document's last target is the end-of-text token, so every token of every text is learned once; a document longer than
a row goes on in the next one. Chats are packed whole, with loss on the assistant's tokens; one longer than a row is cut
at its end, or dropped, as `too_long` says, and counted. Files are cut into parts (corpus_parts.py) that several
processes and machines tokenize (parallel_packing.py); the rows are the same for any number of them.
"""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from lapis.checkpoint.commit import commit
from lapis.config import environment_number
from lapis.errors import ConfigError, DataError
from lapis.text.corpus.corpus import ChatRecord, Document, Kind, Source, files, kind_of
from lapis.text.rows.corpus_parts import parts, read
from lapis.text.rows.part_writer import Report, Shape, SpecialText, assemble, format_line, write_shard
from lapis.text.rows.rows import MANIFEST, Rows, array_name
from lapis.text.rows.sequences import best_fit
from lapis.text.tokenizer.tokenizer import Tokenizer

__all__ = ["Report", "best_fit", "pack", "processors"]


def pack(
    sources: Source | Iterable[Source] | Iterable[Document] | Iterable[ChatRecord],
    tokenizer: Tokenizer,
    out: str | Path | None = None,
    length: int = 512,
    *,
    kind: Kind | None = None,
    too_long: Literal["cut", "drop"] = "cut",
    field: str | None = None,
    special: SpecialText = "plain",
    workers: int = 0,
    overwrite: bool = False,
    report: Report | None = None,
) -> Rows:
    """Rows of `length` tokens from files, documents or chats. A pack of files that was killed goes on where it was.

    Args:
        sources: Files, folders, globs and hub data sets, or documents, or chats.
        tokenizer: With an end-of-text token.
        out: The folder to write; None keeps the rows in memory.
        length: Tokens of a row, 2 or more.
        kind: What files hold, where that is known; by default what their first record is.
        too_long: Whether a chat longer than a row is cut at its end, or dropped. Both are counted.
        field: What holds the text or the messages, where the files call it otherwise.
        special: Special tokens that the text spells stay plain text; "trusted" makes them tokens.
        workers: Processes that tokenize files for a folder; 0 = one for each processor.
        overwrite: Replace the folder if it exists.
        report: Called with the texts done and the tokens written.

    Raises:
        DataError: For damaged input, or where nothing is left to learn from.
        ConfigError: For a tokenizer without an end-of-text token.
        OutputError: Where `out` cannot be written.
    """
    if length < 2:
        raise ConfigError(f"length is {length}; the least is 2")
    if workers < 0:
        raise ConfigError(f"workers is {workers}; give 1 or more, or 0 for one per processor")
    if tokenizer.eos_id is None:
        raise ConfigError(f"{tokenizer.source}: names no eos_token, which stands between documents; name one")
    paths, items = _sorted_out(sources)
    if paths is not None:
        listed = files(paths)
        shape = Shape(kind or kind_of(listed, field), length, too_long, special)
        cut = parts(listed)
        if out is None:
            shards = [
                write_shard(read(part, shape.kind, field), tokenizer, shape, part=part, report=report) for part in cut
            ]
            info, used = assemble(shards, shape, tokenizer, format_line(shape.kind, listed[0], field))
            return Rows(info, [shards[i].arrays for i in used])
        from lapis.text.rows.parallel_packing import Job, share

        job = Job(shape, field, cut, tokenizer.digest())
        return share(job, tokenizer, Path(out), workers=workers or processors(), overwrite=overwrite, report=report)
    first = next(items, None)
    if first is None:
        raise DataError("there is nothing to pack")
    items = chain([first], items)
    shape = Shape("chats" if isinstance(first, ChatRecord) else "documents", length, too_long, special)
    if out is None:
        shard = write_shard(items, tokenizer, shape, report=report)
        return Rows(assemble([shard], shape, tokenizer)[0], [shard.arrays])
    with commit(out, kind="packing", overwrite=overwrite) as staging:
        shard = write_shard(items, tokenizer, shape, staging.path, report=report)
        info, _ = assemble([shard], shape, tokenizer)
        for name, digest in shard.digests.items():
            (staging.path / f"{name}.bin").rename(staging.path / array_name(name, 0))
            staging.digests[array_name(name, 0)] = digest
        (staging.path / "tokenizer").mkdir()
        tokenizer.save(staging.path / "tokenizer")
        (staging.path / MANIFEST).write_text(json.dumps(info, indent=1) + "\n")
    return Rows.open(out)


def processors() -> int:
    """Processors for this process: those it may use, shared with the other processes of torchrun on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, environment_number("LOCAL_WORLD_SIZE", 1)))


def _sorted_out(sources: Any) -> tuple[list[Source] | None, Iterator[Document | ChatRecord]]:
    """Paths, or items."""
    if isinstance(sources, (str, Path)):
        return [sources], iter(())
    iterator = iter(sources)
    first = next(iterator, None)
    if isinstance(first, (str, Path)):
        return [first, *iterator], iter(())
    return None, chain([] if first is None else [first], iterator)
