"""The files that paths stand for: files(paths).

A path is a file, a folder, a glob, or a data set on the hub (hub:OWNER/NAME[@REVISION][/FOLDER or /GLOB]); folders and
globs stand for the files in them, by name. Of the hub the revision is settled once (a commit), the files come into
huggingface_hub's own cache, whole and checked, and are read like any others; no code of a data set is ever run. Without
a folder or glob it is the training split. A data set in a format that lapis does not read is taken as the hub's own
conversion to parquet. Leaves out: reading (file_stream.py, corpus.py), models (checkpoint/hub.py).
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from lapis.checkpoint.commit import commit_file
from lapis.checkpoint.files import read_json
from lapis.checkpoint.hub.repository import COMMIT, HubFile, Repository, fetch, list_files, safe_name
from lapis.checkpoint.remote.requests import Refused
from lapis.config import nearest
from lapis.errors import CheckpointError, DataError, OutputError
from lapis.text.corpus.file_stream import KINDS, OpenedFile, cache_folder, suffix

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
        elif os.path.isdir(path):
            inside = sorted(p for p in path.rglob("*") if _is_data(p, path, kinds))
            if not inside:
                raise DataError(f"{path}: the folder holds no {', '.join(kinds)} (or .gz, .zst of these); {what} one")
            listed.update(dict.fromkeys(inside))
        elif os.path.lexists(path):
            if not path.is_file():
                raise DataError(f"{path}: is not a regular file; give one, or a folder")
            if suffix(path) not in kinds:
                ending = f'files that end in "{path.suffix}" are not read' if path.suffix else "its name has no ending"
                raise DataError(f"{path}: {ending}; {what} {', '.join(kinds)}, or .gz, .zst of these")
            listed[path] = None
        elif glob.has_magic(str(source)):
            matches = sorted(glob.glob(str(source), recursive=True))
            if not matches:
                raise DataError(f"{source}: no file matches; give another pattern, or the files")
            listed.update(dict.fromkeys(files(matches, kinds, what)))
        else:
            hint = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
            remedy = hint if hint.startswith("did") else "give files, folders or globs"
            raise DataError(f"{path}: there is no such file; {remedy}")
    if not listed:
        raise DataError("no files were given")
    return list(listed)


def refuse_replacing(out: str | os.PathLike[str], paths: Iterable[Source], option: str = "--out") -> None:
    """Raises OutputError where what is written at `out` would replace something that is read: it exists nowhere else.

    Args:
        out: A file or folder, which may be there already.
        paths: As `files` reads them, or any other files; what is not there is not looked at.
        option: What names `out` on the command line.
    """
    whole = Path(os.path.realpath(out))
    if not os.path.lexists(whole):
        return
    for source in paths:
        there = [str(source)] if os.path.lexists(source) else glob.glob(str(source), recursive=True)
        for place in map(Path, there):
            around = os.path.isdir(place) and whole.is_relative_to(os.path.realpath(place))
            inside = [path for path in place.rglob("*") if _is_data(path, place, KINDS)] if around else []
            if any(Path(os.path.realpath(each)).is_relative_to(whole) for each in (place, *inside)):
                what = "is read" if place == Path(out) else f"{place}, which is read, lies there"
                raise OutputError(f"{out}: {what}; give another {option}")


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


_DESCRIBES = re.compile(r"(^|/)(dataset_infos?|.*config|metadata|state|schema|croissant)\.json$")  # not records
CONVERTED = "refs/convert/parquet"
_SPEC = re.compile(rf"hub:([\w.-]+/[\w.-]+)(?:@({CONVERTED}|[^/]+))?(?:/(.+))?")
_SPLITS = re.compile(r"(?<![a-z])(train(?:ing)?|test(?:ing)?|dev|valid(?:ation)?|eval)(?![a-z])", re.IGNORECASE)


def hub_files(spec: str) -> list[Path]:
    """Downloads what `spec` names, unless the cache has it. Raises DataError for whatever stands in the way."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise DataError(f"{spec}: expected hub:OWNER/NAME, hub:OWNER/NAME@REVISION or hub:OWNER/NAME/FOLDER")
    repository, revision, pattern = match.groups()
    listing = _listing(spec, repository, revision)
    if revision is None and not _readable(list(listing.files)):
        listing = _listing(spec, repository, CONVERTED)
    return [_download(spec, listing, name) for name in choose(spec, list(listing.files), pattern)]


def choose(spec: str, names: list[str], pattern: str | None) -> list[str]:
    """Which of a data set's files a spec stands for. Raises DataError where that cannot be known."""
    readable = _readable(names)
    if not readable:
        raise DataError(f"{spec}: holds no {', '.join(KINDS)} file (or .gz, .zst of these)")
    if pattern is not None:
        folder = pattern.rstrip("/")
        chosen = [
            name for name in readable if fnmatch(name, pattern) or name == folder or name.startswith(f"{folder}/")
        ]
        if not chosen:
            raise DataError(f"{spec}: no file matches; {nearest(folder, [*readable, *_folders(readable)][:40])}")
        return chosen
    chosen = [name for name in readable if any(word.lower().startswith("train") for word in _SPLITS.findall(name))]
    chosen = chosen or [name for name in readable if not _SPLITS.search(name)] or readable
    folders = _folders(chosen)
    if len(folders) > 1:
        some = ", ".join(folders[:8]) + (", ..." if len(folders) > 8 else "")
        raise DataError(f"{spec}: holds data in several folders ({some}); name one, as in {spec}/{folders[0]}")
    return chosen


def _readable(names: list[str]) -> list[str]:
    kinds = [kind for kind in KINDS if kind != ".md"]  # the card of a data set is no data
    data = (name for name in names if suffix(Path(name)) in kinds and not name.startswith("."))
    return sorted(name for name in data if not _DESCRIBES.search(name))


def _folders(names: list[str]) -> list[str]:
    return sorted({str(PurePosixPath(name).parent) for name in names})


def _listing(spec: str, repository: str, revision: str | None) -> Repository:
    """The files at a commit; those of last time where HF_HUB_OFFLINE forbids to ask the hub."""
    from huggingface_hub import constants

    label = f"{repository.replace('/', '--')}@{quote(revision or 'main', safe='')}.json"
    known = cache_folder() / "hub" / label
    if constants.is_offline_mode():
        if not known.is_file():
            raise DataError(f"{spec}: is not in the cache, and HF_HUB_OFFLINE forbids to fetch it")
        return _remembered(spec, repository, known)
    try:
        listing = list_files(spec, "dataset", repository, revision)
    except CheckpointError as error:
        raise _refusal(spec, repository, revision, error) from None
    known.parent.mkdir(parents=True, exist_ok=True)
    with commit_file(known, overwrite=True) as temporary:
        temporary.write_text(json.dumps({"commit": listing.commit, "files": list(listing.files)}))
    return listing


def _remembered(spec: str, repository: str, known: Path) -> Repository:
    """The list of files that an earlier run wrote down."""
    listed = read_json(known)
    commit, names = (listed.get("commit"), listed.get("files")) if isinstance(listed, dict) else (None, None)
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit) or not isinstance(names, list):
        raise DataError(f"{known}: is no list of files; delete it, and ask the hub again")
    return Repository(spec, "dataset", repository, commit, {name: HubFile(None) for name in names if safe_name(name)})


def _download(spec: str, repository: Repository, name: str) -> Path:
    if not repository.files[name].digest and os.path.lexists(repository.root / name):
        return repository.root / name
    try:
        return fetch(repository, name)
    except CheckpointError as error:
        raise _refusal(f"{spec}: {name}", repository.name, repository.commit, error) from None


def _refusal(spec: str, repository: str, revision: str | None, error: CheckpointError) -> DataError:
    page, code = f"https://huggingface.co/datasets/{repository}", error.code if isinstance(error, Refused) else ""
    if code == "GatedRepo":
        return DataError(f"{spec}: asks for its terms to be accepted first, at {page}; then log in with: hf auth login")
    if code == "RevisionNotFound":
        return DataError(f"{spec}: has no revision {revision}; see {page}")
    if code == "RepoNotFound":
        return DataError(f"{spec}: there is no such data set, or it is private; to see private ones: hf auth login")
    if code == "EntryNotFound":
        return DataError(f"{spec}: the file is gone from the hub")
    reason = str(error).removeprefix(f"{spec}: ")
    if isinstance(error, Refused) or "tried" not in reason:
        return DataError(f"{spec}: {reason}")
    return DataError(f"{spec}: the hub did not answer: {reason}")
