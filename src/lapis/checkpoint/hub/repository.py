"""A repository of the hub at one commit: its files with sizes and digests in, checked files in the cache out.

The cache is huggingface_hub's, spelled as it spells it, so that every program finds what one has downloaded. What a hub
says is believed as little as a file: names, commits and digests are checked before any of them becomes a path, what is
no hub's answer is one line, and a file is put into the cache only after its bytes are those that the hub lists.
"""

import fcntl
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from lapis import __version__
from lapis.checkpoint.commit import commit_file
from lapis.checkpoint.remote.connections import HttpFile
from lapis.checkpoint.remote.ranges import RemoteFile
from lapis.checkpoint.remote.requests import Refused, ShortReadError, body, call_patiently, opened, refusal
from lapis.errors import CheckpointError
from lapis.parsing import ParseError, parse_json, quoted

Kind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
REVISION = r"[A-Za-z0-9_][\w.-]*(?:/[\w.-]+)*"
LISTING_LIMIT = 64_000_000  # bytes of the hub's answer; a hundred thousand files take 25 MB
MOST_FILES = 500_000
SIDE_BY_SIDE = 64 << 20  # bytes from which a file is downloaded in several ranges at a time
SHOWN = 8 << 20  # bytes from which a bar is shown
_BLOCK = 1 << 20
_WORDS = {"model": "model", "dataset": "data set"}


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it. size: None where it is not known. digest: sha256 of a large file, git's of others."""

    size: int | None
    digest: str = ""


@dataclass(frozen=True)
class Repository:
    """A model or a data set at one commit.

    Attributes:
        label: What a user calls it.
        kind: What it is.
        name: owner/name.
        commit: The hash.
        files: By name; empty where only the cache was asked.
    """

    label: str
    kind: Kind
    name: str
    commit: str
    files: dict[str, HubFile]

    @property
    def root(self) -> Path:
        """The folder in the cache with the names of this commit's files."""
        return cache_of(self.kind, self.name) / "snapshots" / self.commit


def endpoint() -> str:
    """The hub's address."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def cache_of(kind: Kind, name: str) -> Path:
    """The folder of a repository in huggingface_hub's cache."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)
    return cache / f"{kind}s--{name.replace('/', '--')}"


def list_files(label: str, kind: Kind, name: str, revision: str | None, tries: int = 0) -> Repository:
    """What the hub has at a revision (default: the main branch).

    Raises:
        Refused: Where the hub says no, or what answers is no hub.
        CheckpointError: Where it cannot be reached.
    """
    if revision is not None and not safe_revision(revision):
        raise Refused(f"{label}: {quoted(revision)} is no revision; give a branch, a tag or a commit")
    url = f"{endpoint()}/api/{kind}s/{name}" + (f"/revision/{quote(revision, safe='')}" if revision else "")
    raw = bytearray()

    def ask() -> None:
        raw.clear()
        with opened(label, f"{url}?blobs=true", _headers()) as answer:
            if answer.status_code != 200:
                raise refusal(label, int(answer.status_code), answer.headers, _WORDS[kind])
            for piece in body(answer, LISTING_LIMIT):
                raw.extend(piece)

    call_patiently(label, ask, tries)
    try:
        commit, files = _read_listing(parse_json(bytes(raw)))
    except (ParseError, ValueError) as error:
        raise Refused(
            f"{label}: what {endpoint()} answered is no hub's answer ({error}); does the network ask for a login?"
        ) from None
    return Repository(label, kind, name, commit, files)


def safe_revision(revision: str) -> bool:
    """Whether a revision can stand in an address and in the cache: no absolute path, and none that leads out."""
    return len(revision) <= 255 and re.fullmatch(REVISION, revision) is not None and ".." not in revision


def safe_name(name: Any) -> bool:
    """Whether a file's name leads into a folder and nowhere else."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name or len(name.encode()) > 1000:
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= 240 for part in name.split("/"))


def fetch(repository: Repository, name: str, limit: int | None = None) -> Path:
    """A file, downloaded into the cache and checked unless it is there.

    Args:
        repository: At its commit.
        name: One of its files.
        limit: Bytes that the file may have at most.

    Raises:
        CheckpointError: For bytes that are not those that the hub lists, and where nothing can be read or written.
    """
    place = repository.root / name
    if os.path.lexists(place):
        return place
    label, listed = f"{repository.label}: {name}", repository.files.get(name)
    if listed is None or not safe_name(name):
        raise CheckpointError(f"{repository.label}: has no {name:.200}")
    if limit is not None and listed.size is not None and listed.size > limit:
        raise CheckpointError(f"{label} has {listed.size:,} bytes; no file of this kind has more than {limit:,}")
    unlisted = hashlib.sha256(f"{repository.commit}/{name}".encode()).hexdigest()
    blob = cache_of(repository.kind, repository.name) / "blobs" / (listed.digest or f"unlisted-{unlisted}")
    try:
        blob.parent.mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(blob.parent).free
        if (listed.size or 0) > free:
            raise CheckpointError(f"{label} has {listed.size:,} bytes, and {free:,} are free; set HF_HUB_CACHE")
        if not blob.exists():
            _download(repository, name, listed, blob, limit)
        _link(blob, place)
    except OSError as error:
        raise CheckpointError(
            f"{blob.parent}: the cache cannot be written: {error.strerror}; set HF_HUB_CACHE"
        ) from None
    return place


def remember(repository: Repository, revision: str) -> None:
    """Writes down, as huggingface_hub does, which commit a revision is, so that it is found offline."""
    place = cache_of(repository.kind, repository.name) / "refs" / revision
    if not safe_revision(revision):
        raise CheckpointError(f"{repository.label}: {quoted(revision)} is no revision")
    try:
        if place.is_file() and place.read_text() == repository.commit:
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with commit_file(place, overwrite=True) as temporary:
            temporary.write_text(repository.commit)
    except OSError as error:
        raise CheckpointError(f"{place}: the cache cannot be written: {error.strerror}; set HF_HUB_CACHE") from None


def remembered(kind: Kind, name: str, revision: str | None) -> str | None:
    """The commit of a revision that the cache has; None where it has none."""
    revision = revision or "main"
    if not safe_revision(revision):
        return None
    reference = cache_of(kind, name) / "refs" / revision
    try:
        with reference.open(encoding="ascii") as file:
            commit = file.read(100).strip()
    except (OSError, ValueError):
        commit = revision
    there = COMMIT.fullmatch(commit) and (cache_of(kind, name) / "snapshots" / commit).is_dir()
    return commit if there else None


def remote_file(repository: Repository, name: str, *, check: bool = True) -> RemoteFile:
    """A file of which the size is known, to be read in ranges.

    Args:
        repository: At its commit, which every answer must name where it names one.
        name: One of its files.
        check: Whether its sha256, where the hub lists one, must agree once all of it was read.
    """
    listed, label = repository.files[name], f"{repository.label}: {name}"
    if listed.size is None:
        raise CheckpointError(f"{label}: the hub does not say how large it is; load it whole")
    sha256 = listed.digest if len(listed.digest) == 64 else ""
    fixed = {"x-repo-commit": repository.commit, "x-linked-size": str(listed.size)}
    place = HttpFile(
        label,
        _address(repository, name),
        listed.size,
        _headers(),
        fixed | ({"x-linked-etag": sha256} if sha256 else {}),
    )
    return RemoteFile(place, sha256 if check else "", version=sha256 or f"{repository.commit}/{listed.digest}")


def _headers() -> dict[str, str]:
    """Who asks. What huggingface_hub would make of it asks the hub for a list of programs first."""
    from huggingface_hub import __version__ as hub_version
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = {"user-agent": f"lapis/{__version__}; hf_hub/{hub_version}; python/{platform.python_version()}"}
    return headers | ({"authorization": f"Bearer {token}"} if token else {})


def _address(repository: Repository, name: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository.name, name, repo_type=repository.kind, revision=repository.commit, endpoint=endpoint())


def _read_listing(answer: Any) -> tuple[str, dict[str, HubFile]]:
    """Commit and files of the hub's answer. Raises ValueError for what no hub answers."""
    if not isinstance(answer, dict):
        raise ValueError(f"it is {quoted(answer)}")
    commit, siblings = answer.get("sha"), answer.get("siblings")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise ValueError(f"its commit is {quoted(commit)}")
    if siblings is None:
        siblings = []
    if not isinstance(siblings, list) or len(siblings) > MOST_FILES:
        raise ValueError(f"its files are {quoted(siblings)}")
    files: dict[str, HubFile] = {}
    for entry in siblings:
        if not isinstance(entry, dict) or not isinstance(entry.get("rfilename"), str):
            raise ValueError(f"one of its files is {quoted(entry)}")
        size, large, blob = entry.get("size"), entry.get("lfs"), entry.get("blobId")
        if size is not None and (type(size) is not int or not 0 <= size < 2**50):
            raise ValueError(f"the size of a file is {quoted(size)}")
        digest = blob if large is None else large.get("sha256") if isinstance(large, dict) else large
        length = 40 if large is None else 64
        if digest is not None and not (isinstance(digest, str) and re.fullmatch(rf"[0-9a-f]{{{length}}}", digest)):
            raise ValueError(f"the digest of a file is {quoted(digest)}")
        if safe_name(entry["rfilename"]):
            files[entry["rfilename"]] = HubFile(size, digest or "")
    return commit, files


@contextmanager
def _partial(blob: Path) -> Iterator[int]:
    """The file that becomes `blob`, open and held by this process alone; another's is waited for."""
    path = blob.with_name(f"{blob.name}.incomplete")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.lexists(path) and os.stat(path).st_ino == os.fstat(handle).st_ino:
                yield handle
                return
        finally:
            os.close(handle)


def _download(repository: Repository, name: str, listed: HubFile, blob: Path, limit: int | None) -> None:
    """Puts the bytes at `blob` once they are those that the hub lists; goes on where an earlier download broke off."""
    label = f"{repository.label}: {name}"
    most = listed.size if listed.size is not None else limit if limit is not None else 2**50
    with _partial(blob) as handle:
        if blob.exists():  # another process was at it
            return
        if not listed.digest or os.fstat(handle).st_size > most:
            os.ftruncate(handle, 0)
        with _bar(name, listed.size, os.fstat(handle).st_size) as report:
            if listed.size is not None and listed.size > SIDE_BY_SIDE:
                _fill_side_by_side(remote_file(repository, name, check=False), handle, report)
            _fill(label, _address(repository, name), handle, listed.size, most, report)
        size = os.fstat(handle).st_size
        if listed.size is not None and size != listed.size:
            os.ftruncate(handle, 0)
            raise CheckpointError(f"{label} came with {size:,} of {listed.size:,} bytes; try again")
        if listed.digest and _digest(handle, size, len(listed.digest)) != listed.digest:
            os.ftruncate(handle, 0)
            raise CheckpointError(f"{label} came with other bytes than the hub lists; load again")
        os.fsync(handle)
        os.replace(blob.with_name(f"{blob.name}.incomplete"), blob)


def _fill(
    label: str, url: str, handle: int, size: int | None, most: int, report: Callable[[int], None]
) -> None:  # fmt: skip
    """Appends what is missing, in one request after the other."""

    def ask() -> None:
        start = os.fstat(handle).st_size
        if size is not None and start == size > 0:
            return
        ranges = {"Range": f"bytes={start}-"} if start else {}
        with opened(label, url, {**_headers(), **ranges}) as answer:
            if answer.status_code not in (200, 206):
                raise refusal(label, int(answer.status_code), answer.headers)
            whole = answer.status_code == 200
            if whole and start:
                os.ftruncate(handle, 0)
                start = 0
            if not whole and not answer.headers.get("content-range", "").startswith(f"bytes {start}-"):
                raise Refused(f"{label}: the server answered with another range than was asked for")
            length = answer.headers.get("content-length", "")
            for piece in body(answer, most - start):
                _append(handle, piece)
                report(len(piece))
        expected = size if size is not None else start + int(length) if re.fullmatch(r"\d{1,15}", length) else None
        if expected is not None and os.fstat(handle).st_size < expected:
            raise ShortReadError(f"{os.fstat(handle).st_size:,} of {expected:,} bytes came")

    call_patiently(label, ask)


def _fill_side_by_side(file: RemoteFile, handle: int, report: Callable[[int], None]) -> None:
    """Appends what is missing in several ranges at a time; a server that has no ranges is left to `_fill`."""
    try:
        for block in file.blocks(os.fstat(handle).st_size):
            _append(handle, block)
            report(len(block))
    except Refused as refused:
        if refused.status != 200:
            raise


def _append(handle: int, piece: bytes | memoryview) -> None:
    view = memoryview(piece)
    try:
        while view:
            view = view[os.pwrite(handle, view, os.fstat(handle).st_size) :]
    except OSError as error:  # no fault of the network, so it is not tried again
        raise Refused(f"the cache cannot be written: {error.strerror}; set HF_HUB_CACHE") from None


def _digest(handle: int, size: int, length: int) -> str:
    """sha256, or where 40 digits are listed git's: sha1 of a blob with its header."""
    digest = hashlib.sha256() if length == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    at = 0
    while piece := os.pread(handle, _BLOCK, at):
        digest.update(piece)
        at += len(piece)
    return digest.hexdigest()


def _link(blob: Path, place: Path) -> None:
    """The file under its own name: a link to the blob, or the blob itself where there are no links."""
    if os.path.lexists(place):
        return
    aside = place.with_name(f".{secrets.token_hex(8)}")
    try:
        os.symlink(os.path.relpath(blob, place.parent), aside)
    except OSError:
        os.replace(blob, place)
        return
    os.replace(aside, place)


@contextmanager
def _bar(name: str, size: int | None, done: int) -> Iterator[Callable[[int], None]]:
    """huggingface_hub's own bar, which its variables switch off, for what takes a while."""
    if (size or 0) < SHOWN:
        yield lambda count: None
        return
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    make: Any = tqdm
    with make(total=size, initial=done, unit="B", unit_scale=True, desc=name[-40:]) as bar:
        yield bar.update
