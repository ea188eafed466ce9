"""What the `data` of a training run stands for: open_data(...) -> Rows or Mixture.

    data: corpus/en                                     files, folders, globs, hub:OWNER/NAME, or packed rows
    data: [corpus/en, extra.jsonl]                      one source of several places
    data: {corpus/en: 0.7, packed/ms: 0.3}              a mixture, by weights
    data: [{path: corpus/en, weight: 7}, {path: [a.jsonl, b.jsonl], weight: 3}]
    data: {path: mine.jsonl, special: trusted}          special tokens that the text spells become tokens

Text is never trusted by itself: what spells a special token is plain text, and that is counted and shown. `special:
trusted`, which a source of a mixture may have as well, is for text of one's own.

Files of more than LARGE bytes are packed once, into a cache folder that later runs and the other processes of this one
share (`$LAPIS_CACHE`, by default ~/.cache/lapis); smaller ones in memory. Packing itself is in packing.py, drawing from
a mixture in mixture.py.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lapis.checkpoint.files import read_json
from lapis.config import nearest
from lapis.errors import ConfigError, DataError
from lapis.parsing import quoted
from lapis.text.corpus.corpus import kind_of
from lapis.text.corpus.file_stream import cache_folder
from lapis.text.corpus.files import files
from lapis.text.rows.mixture import Data, Mixture
from lapis.text.rows.packing import Report, pack, processors
from lapis.text.rows.part_writer import SpecialText
from lapis.text.rows.rows import MANIFEST, Rows
from lapis.text.tokenizer.tokenizer import Tokenizer

LARGE = 64 << 20  # bytes of files that are still packed in memory


@dataclass(frozen=True)
class PackingSettings:
    """How raw data is packed, and what packed data must agree with.

    Attributes:
        tokenizer, kind, length, too_long, field, workers, report, special: As of packing.pack.
    """

    tokenizer: Tokenizer
    kind: Literal["documents", "chats"]
    length: int
    too_long: Literal["cut", "drop"] = "cut"
    field: str | None = None
    workers: int = 0
    report: Report | None = None
    special: SpecialText = "plain"


def open_data(data: Any, settings: PackingSettings) -> Data:
    """Raises DataError or ConfigError, naming the source, for what cannot be learned from or mixed."""
    if isinstance(data, Mixture):
        for rows in data.sources:
            _checked(rows, settings)
        return data
    place, special = split_special(data)
    settings = replace(settings, special=special)
    weighted = _weighted(place)
    if weighted is None:
        return _source(place, settings)
    opened: dict[str, tuple[Rows, float]] = {}
    for name, (source, weight) in weighted.items():
        inner, special = split_special(source)
        rows = _source(inner, replace(settings, special=special) if inner is not source else settings)
        if rows.length != settings.length:
            raise ConfigError(
                f"{name}: was packed in rows of {rows.length:,}, but context is {settings.length:,}; give that context"
            )
        opened[name] = (rows, weight)
    return Mixture(opened)


def split_special(data: Any) -> tuple[Any, SpecialText]:
    """The place and the trust of a source that is written {path: ..., special: trusted}; others are "plain"."""
    if not isinstance(data, Mapping) or "path" not in data or "weight" in data:
        return data, "plain"
    unknown = [name for name in data if name not in ("path", "special")]
    if unknown:
        raise ConfigError(f"data: {unknown[0]} is not known; {nearest(str(unknown[0]), ('path', 'weight', 'special'))}")
    special = data.get("special", "plain")
    if special not in ("plain", "trusted"):
        raise ConfigError(f"data: special is {quoted(special)}; expected plain or trusted")
    return data["path"], special


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
    sources: dict[str, tuple[Any, float]] = {}
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or set(entry) - {"special"} != {"path", "weight"}:
            raise ConfigError(f"data[{i}] is {quoted(entry)}; where sources are mixed each has path and weight")
        path, weight = entry["path"], entry["weight"]
        name = (
            path.source if isinstance(path, Rows) else ", ".join(map(str, path if isinstance(path, list) else [path]))
        )
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight <= 0:
            raise ConfigError(
                f"data: the weight of {name} is {quoted(weight)}; give a number above 0, or leave the source out"
            )
        if name in sources:
            raise ConfigError(f"data: {name} stands twice; add the two weights")
        source = {"path": path, "special": entry["special"]} if "special" in entry else path
        sources[name] = (source, weight)
    if not sources:
        raise ConfigError("data: is empty; give at least one source")
    return sources


def _source(data: Any, settings: PackingSettings) -> Rows:
    if isinstance(data, Rows):
        return _checked(data, settings)
    if is_packed(data):
        return _checked(Rows.open(data), settings)
    paths = _paths(data)
    if paths is None:
        return _checked(_packed(data, settings), settings)
    listed = files(paths)
    kind = kind_of(listed, settings.field, settings.kind)
    if kind != settings.kind:
        raise DataError(f"{listed[0]}: holds {kind}; this objective learns from {settings.kind}")
    if sum(path.stat().st_size for path in listed) <= LARGE:
        return _packed(listed, settings)
    return _cached(listed, settings)


def _paths(data: Any) -> list[Any] | None:
    """The places of files, or None for documents and chats given as such."""
    if isinstance(data, (str, Path)):
        return [data]
    if isinstance(data, Sequence) and data and all(isinstance(entry, (str, Path)) for entry in data):
        if any(is_packed(entry) for entry in data):
            raise ConfigError("data: packed folders in a list need weights; write {FOLDER: WEIGHT, ...}")
        return list(data)
    return None


def _packed(data: Any, settings: PackingSettings, out: Path | None = None) -> Rows:
    return pack(
        data,
        settings.tokenizer,
        out,
        settings.length,
        kind=settings.kind if isinstance(data, list) else None,
        special=settings.special,
        too_long=settings.too_long,
        field=settings.field,
        workers=settings.workers,
        report=settings.report,
    )


def _cached(listed: list[Path], settings: PackingSettings) -> Rows:
    """Packed into the cache, or read from it. The key is that of the job: files, their sizes and times, tokenizer."""
    from lapis.text.rows.corpus_parts import parts
    from lapis.text.rows.parallel_packing import Job, share
    from lapis.text.rows.part_writer import Shape

    shape = Shape(settings.kind, settings.length, settings.too_long, settings.special)
    job = Job(shape, settings.field, parts([path.absolute() for path in listed]), settings.tokenizer.digest())
    folder = cache_folder() / "rows" / job.key[:24]
    if (folder / MANIFEST).is_file() and read_json(folder / MANIFEST).get("job") == job.key:
        return Rows.open(folder)
    workers = settings.workers or processors()
    return share(job, settings.tokenizer, folder, workers=workers, report=settings.report)


def _checked(rows: Rows, settings: PackingSettings) -> Rows:
    """Rows that fit the settings, and whose files are what was packed. One process of a machine looks through them."""
    kind = rows.info["kind"]
    if kind != settings.kind:
        raise DataError(f"{rows.source}: holds {kind}; this objective learns from {settings.kind}")
    if rows.info["tokenizer"] != settings.tokenizer.digest():
        raise DataError(f"{rows.source}: was packed with another tokenizer; pack the data again")
    if settings.special == "trusted" and rows.info.get("special") != "trusted":
        raise DataError(f"{rows.source}: was packed as plain text; pack the data again with --special trusted")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        rows.verify()
    return rows
