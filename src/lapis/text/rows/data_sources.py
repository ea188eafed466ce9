"""What the `data` of a training run stands for: open_data(...) -> Rows or Mixture.

    data: corpus/en                                     files, folders, globs, hub:OWNER/NAME, or packed rows
    data: [corpus/en, extra.jsonl]                      one source of several places
    data: {corpus/en: 0.7, packed/ms: 0.3}              a mixture, by weights
    data: [{path: corpus/en, weight: 7}, {path: [a.jsonl, b.jsonl], weight: 3}]

Files of more than LARGE bytes are packed once, into a cache folder that later runs and the other processes of this one
share (`$LAPIS_CACHE`, by default ~/.cache/lapis); smaller ones in memory.
Leaves out: packing itself (packing.py), drawing from a mixture (mixture.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lapis.checkpoint.files import read_json
from lapis.errors import ConfigError, DataError
from lapis.text.corpus.corpus import kind_of
from lapis.text.corpus.file_stream import cache_folder
from lapis.text.corpus.files import files
from lapis.text.rows.mixture import Data, Mixture
from lapis.text.rows.packing import Report, pack, processors
from lapis.text.rows.rows import MANIFEST, Rows
from lapis.text.tokenizer.tokenizer import Tokenizer

LARGE = 64 << 20  # bytes of files that are still packed in memory


@dataclass(frozen=True)
class Wanted:
    """How raw data is to be packed, and what packed data must agree with."""

    tokenizer: Tokenizer
    kind: Literal["documents", "chats"]
    length: int
    too_long: Literal["cut", "drop"] = "cut"
    field: str | None = None
    workers: int = 0
    report: Report | None = None


def open_data(data: Any, wanted: Wanted) -> Data:
    """Raises DataError or ConfigError, naming the source, for what cannot be learned from or mixed."""
    if isinstance(data, Mixture):
        for rows in data.sources:
            _checked(rows, wanted)
        return data
    weighted = _weighted(data)
    if weighted is None:
        return _source(data, wanted)
    opened: dict[str, tuple[Rows, float]] = {}
    for name, (source, weight) in weighted.items():
        rows = _source(source, wanted)
        if rows.length != wanted.length:
            raise ConfigError(
                f"{name}: was packed in rows of {rows.length:,}, but context is {wanted.length:,}; give that context"
            )
        opened[name] = (rows, weight)
    return Mixture(opened)


def is_packed(data: Any) -> bool:
    """True for a folder that `lapis data pack` made."""
    return isinstance(data, (str, Path)) and (Path(data) / MANIFEST).is_file()


def _weighted(data: Any) -> dict[str, tuple[Any, float]] | None:
    """name -> (source, weight), or None where no weights are given."""
    if isinstance(data, Mapping):
        entries = [{"path": path, "weight": weight} for path, weight in data.items()]
    elif isinstance(data, Sequence) and not isinstance(data, str) and any(isinstance(e, Mapping) for e in data):
        entries = list(data)
    else:
        return None
    found: dict[str, tuple[Any, float]] = {}
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or set(entry) != {"path", "weight"}:
            raise ConfigError(f"data[{i}] is {entry!r:.60}; where sources are mixed each has path and weight")
        path, weight = entry["path"], entry["weight"]
        name = (
            path.source if isinstance(path, Rows) else ", ".join(map(str, path if isinstance(path, list) else [path]))
        )
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight <= 0:
            raise ConfigError(
                f"data: the weight of {name} is {weight!r}; give a number above 0, or leave the source out"
            )
        if name in found:
            raise ConfigError(f"data: {name} stands twice; add the two weights")
        found[name] = (path, weight)
    if not found:
        raise ConfigError("data: is empty; give at least one source")
    return found


def _source(data: Any, wanted: Wanted) -> Rows:
    if isinstance(data, Rows):
        return _checked(data, wanted)
    if is_packed(data):
        return _checked(Rows.open(data), wanted)
    paths = _paths(data)
    if paths is None:
        return _checked(_packed(data, wanted), wanted)
    listed = files(paths)
    kind = kind_of(listed, wanted.field)
    if kind != wanted.kind:
        raise DataError(f"{listed[0]}: holds {kind}; this objective learns from {wanted.kind}")
    if sum(path.stat().st_size for path in listed) <= LARGE:
        return _packed(listed, wanted)
    return _cached(listed, wanted)


def _paths(data: Any) -> list[Any] | None:
    """The places of files, or None for documents and chats given as such."""
    if isinstance(data, (str, Path)):
        return [data]
    if isinstance(data, Sequence) and data and all(isinstance(entry, (str, Path)) for entry in data):
        if any(is_packed(entry) for entry in data):
            raise ConfigError("data: packed folders in a list need weights; write {FOLDER: WEIGHT, ...}")
        return list(data)
    return None


def _packed(data: Any, wanted: Wanted, out: Path | None = None) -> Rows:
    return pack(
        data,
        wanted.tokenizer,
        out,
        wanted.length,
        too_long=wanted.too_long,
        field=wanted.field,
        workers=wanted.workers,
        report=wanted.report,
    )


def _cached(listed: list[Path], wanted: Wanted) -> Rows:
    """Packed into the cache, or found there. The key is that of the job: files, their sizes and times, tokenizer."""
    from lapis.text.rows.corpus_parts import parts
    from lapis.text.rows.parallel_packing import Job, share
    from lapis.text.rows.part_writer import Shape

    shape = Shape(wanted.kind, wanted.length, wanted.too_long)
    job = Job(shape, wanted.field, parts([path.absolute() for path in listed]), wanted.tokenizer.digest())
    folder = cache_folder() / "rows" / job.key[:24]
    if (folder / MANIFEST).is_file() and read_json(folder / MANIFEST).get("job") == job.key:
        return Rows.open(folder)
    workers = wanted.workers or processors()
    return share(job, wanted.tokenizer, folder, workers=workers, report=wanted.report)


def _checked(rows: Rows, wanted: Wanted) -> Rows:
    kind = rows.info["kind"]
    if kind != wanted.kind:
        raise DataError(f"{rows.source}: holds {kind}; this objective learns from {wanted.kind}")
    if rows.info["tokenizer"] != wanted.tokenizer.digest():
        raise DataError(f"{rows.source}: was packed with another tokenizer; pack the data again")
    return rows
