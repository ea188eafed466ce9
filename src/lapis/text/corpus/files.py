"""The files that paths stand for: files(paths).

A path is a file, a folder, a glob, or a data set on the hub (hub.py); folders and globs stand for the files in them, by
name. Their bytes are in file_stream.py.
"""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lapis.config import nearest
from lapis.errors import DataError
from lapis.text.corpus.file_stream import KINDS, OpenedFile, suffix
from lapis.text.corpus.hub import hub_files

HUB = "hub:"
Source = str | Path


def files(paths: Source | Iterable[Source], kinds: Sequence[str] = KINDS, what: str = "give") -> list[Path]:
    """The files that paths, folders, globs and hub data sets stand for, each once.

    Args:
        paths: One or several.
        kinds: Suffixes that are read, without .gz and .zst.
        what: Words before the kinds in the refusal of another one.

    Raises:
        DataError: For a file that is not there or of another kind, a folder or glob without any, and for no paths.
    """
    listed: dict[Path, None] = {}
    for source in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(source)
        if str(source).startswith(HUB):
            listed.update(dict.fromkeys(hub_files(str(source))))
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if _is_data(p, path, kinds))
            if not inside:
                raise DataError(f"{path}: the folder holds no {', '.join(kinds)} (or .gz, .zst of these)")
            listed.update(dict.fromkeys(inside))
        elif os.path.lexists(path):
            if not path.is_file():
                raise DataError(f"{path}: is not a regular file")
            if suffix(path) not in kinds:
                raise DataError(
                    f'{path}: "{path.suffix}" is not known; {what} {", ".join(kinds)}, or .gz, .zst of these'
                )
            listed[path] = None
        elif glob.has_magic(str(source)):
            matches = sorted(glob.glob(str(source), recursive=True))
            if not matches:
                raise DataError(f"{source}: no file matches")
            listed.update(dict.fromkeys(files(matches, kinds, what)))
        else:
            hint = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
            raise DataError(f"{path}: there is no such file{f'; {hint}' if hint.startswith('did') else ''}")
    if not listed:
        raise DataError("no files were given")
    return list(listed)


def _is_data(path: Path, root: Path, kinds: Sequence[str]) -> bool:
    """Whether a file in a folder is data: of a known kind, not hidden, and, where it is .json, an array of records."""
    if suffix(path) not in kinds or any(part.startswith(".") for part in path.relative_to(root).parts):
        return False
    if not path.is_file():
        return False
    if suffix(path) != ".json":
        return True
    with OpenedFile(path) as file:  # others hold settings, or describe the data
        return file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
