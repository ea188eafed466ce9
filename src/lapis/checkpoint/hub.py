"""Models on the Hugging Face hub: `owner/name` or `owner/name@revision` in the place of a folder.

huggingface_hub resolves, holds the token, keeps the cache and downloads; HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and
HF_HUB_OFFLINE mean what they mean everywhere. A revision is pinned to its commit when it is first looked up. Opening
reads config and headers (by ranges); a difference or a merge reads tensors by ranges; loading fetches whole files,
which are checked against the hub's sha256. Leaves out: uploading; anything but models.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lapis.checkpoint.commit import commit_file
from lapis.checkpoint.files import contained
from lapis.checkpoint.ranges import Refused, RemoteFile, patiently, refusal
from lapis.checkpoint.tensor_file import Header, holds_adapter, parse_header
from lapis.errors import CheckpointError

_ID = re.compile(r"(?P<repo>[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,255}))?")
BESIDE = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")  # what may lie beside the weights and be of use
LARGEST = 200_000_000  # bytes of a file that is not weights
FIRST = 1 << 16  # bytes of a weight file that are asked for first: most headers are in them

T = TypeVar("T")


@dataclass
class Snapshot:
    """A model at one commit. root: its folder in the cache; sizes: bytes of every file on the hub; sha256: of large."""

    source: str
    repo: str
    commit: str
    root: Path
    sizes: dict[str, int]
    sha256: dict[str, str] = field(default_factory=dict)
    _remote: dict[str, RemoteFile] = field(default_factory=dict, repr=False)

    def here(self, name: str) -> bool:
        """Whether a file is in the cache."""
        return os.path.lexists(self.root / name)

    def fetch(self, name: str) -> Path:
        """A file, downloaded into the cache unless it is there."""
        if not self.here(name):
            if name not in self.sizes:
                raise CheckpointError(f"{self.source}: has no {name}")
            _download(self, name)
        return contained(self.root, name)

    def fetch_beside(self) -> None:
        """Everything that is not weights and may be of use: tokenizer, templates, configs."""
        for name, size in self.sizes.items():
            if name.endswith(BESIDE) and not name.startswith(".") and size <= LARGEST and name.count("/") < 2:
                self.fetch(name)

    def fetch_weights(self, names: Sequence[str]) -> None:
        """Whole weight files; those that are new are checked against the hub's sha256."""
        for name in names:
            if self.here(name):
                continue
            path = self.fetch(name)
            if name in self.sha256:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != self.sha256[name]:
                    path.unlink()
                    (self.root / name).unlink(missing_ok=True)
                    raise CheckpointError(f"{self.source}: {name} came with other bytes than the hub lists; load again")

    def remote(self, name: str) -> RemoteFile:
        """A file to be read in ranges."""
        if name not in self._remote:
            self._remote[name] = _remote_file(self, name)
        return self._remote[name]

    def header(self, name: str) -> Header:
        """The header of a weight file that is not in the cache, by one or two ranges."""
        file = self.remote(name)
        raw = file.fetch(0, min(FIRST, file.size))
        place = self.root / name

        def more(first: int, last: int) -> bytes:
            return raw[first:last] if last <= len(raw) else raw[first:] + file.fetch(max(first, len(raw)), last)

        return parse_header(place, file.size, more)


def hub_id(source: str) -> tuple[str, str | None] | None:
    """(owner/name, revision) where `source` is written like a hub id and no such folder, nor the owner's, is here."""
    match = _ID.fullmatch(source)
    if match is None or ".." in source or os.path.lexists(source):
        return None
    if match["revision"] is None and os.path.isdir(source.split("/")[0]):
        return None  # "runs/base" beside a folder "runs" is a path that is mistyped
    return match["repo"], match["revision"]


def open_snapshot(source: str, repo: str, revision: str | None) -> Snapshot:
    """The model at the commit that the revision (default: the main branch) has now; offline, that of the cache.

    Raises CheckpointError, in one line, where hub and cache do not have it, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        return _from_cache(source, repo, revision, "HF_HUB_OFFLINE is set")
    try:
        info = _call_hub(source, lambda: HfApi(endpoint=_endpoint()).model_info(
            repo, revision=revision, files_metadata=True, timeout=15
        ), tries=3)  # fmt: skip
    except Refused:
        raise
    except CheckpointError as error:
        return _from_cache(source, repo, revision, str(error).removeprefix(f"{source}: "))
    files = info.siblings or []
    commit = str(info.sha)
    if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        raise CheckpointError(f'{source}: the hub names the commit "{commit[:40]}", which is none')
    sizes = {file.rfilename: int(file.size or 0) for file in files if _plain(file.rfilename)}
    hashes = {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None and file.lfs.sha256}
    snapshot = Snapshot(source, repo, commit, _folder(repo) / "snapshots" / commit, sizes, hashes)
    if revision != commit:
        _remember(snapshot, revision or "main")
    return snapshot


def find_model(source: str | os.PathLike[str], index: str) -> Snapshot:
    """The hub's model that `source` names, with its config (and `index`, where it has one) in the cache.

    An adapter is fetched whole. Raises CheckpointError where `source` is no hub id either.
    """
    identity = hub_id(str(source))
    if identity is None:
        what = "is a file; give the folder that holds it" if os.path.exists(source) else "there is no such folder"
        raise CheckpointError(f"{source}: {what}")
    snapshot = open_snapshot(str(source), *identity)
    if holds_adapter(snapshot.sizes):
        snapshot.fetch_beside()
        snapshot.fetch_weights([name for name in snapshot.sizes if name.endswith(".safetensors")])
    elif snapshot.sizes:
        snapshot.fetch("config.json")
        if index in snapshot.sizes:
            snapshot.fetch(index)
    return snapshot


def local_folder(source: Path | str) -> Path | None:
    """The folder in the cache with all that lies beside a hub model's weights; None where `source` is no hub id."""
    identity = hub_id(str(source))
    if identity is None:
        return None
    snapshot = open_snapshot(str(source), *identity)
    snapshot.fetch_beside()
    return snapshot.root


def _plain(name: str) -> bool:
    return not name.startswith("/") and ".." not in Path(name).parts and name.isprintable()


def _endpoint() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)


def _folder(repo: str) -> Path:
    return _cache() / f"models--{repo.replace('/', '--')}"


def _remember(snapshot: Snapshot, revision: str) -> None:
    """Writes down, as huggingface_hub does, which commit a revision is, so that it is found offline."""
    place = _folder(snapshot.repo) / "refs" / revision
    if place.is_file() and place.read_text() == snapshot.commit:
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with commit_file(place, overwrite=True) as temporary:
            temporary.write_text(snapshot.commit)
    except OSError as error:
        raise CheckpointError(f"{_cache()}: the cache cannot be written: {error.strerror}; set HF_HUB_CACHE") from None


def _from_cache(source: str, repo: str, revision: str | None, why: str) -> Snapshot:
    """What the cache has of a revision, when the hub cannot be asked."""
    folder, name = _folder(repo), revision or "main"
    reference = folder / "refs" / name
    commit = reference.read_text().strip() if reference.is_file() else name
    root = folder / "snapshots" / commit
    if "/" in commit or not root.is_dir():
        raise CheckpointError(
            f"{source}: there is no such folder, and the cache of the hub does not hold it ({why}); give a folder"
        )
    return Snapshot(source, repo, commit, root, {})


def _download(snapshot: Snapshot, name: str) -> None:
    from huggingface_hub import hf_hub_download

    path = _call_hub(snapshot.source, lambda: hf_hub_download(
        snapshot.repo, name, revision=snapshot.commit, cache_dir=_cache(), endpoint=_endpoint(), library_name="lapis"
    ), name)  # fmt: skip
    expected = snapshot.sizes.get(name)
    if expected and os.path.getsize(path) != expected:
        got = os.path.getsize(path)
        os.unlink(os.path.realpath(path))
        os.unlink(path)
        raise CheckpointError(f"{snapshot.source}: {name} came with {got:,} of {expected:,} bytes; try again")


def _remote_file(snapshot: Snapshot, name: str) -> RemoteFile:
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(snapshot.repo, name, revision=snapshot.commit, endpoint=_endpoint())
    headers = build_hf_headers(library_name="lapis")
    return RemoteFile(f"{snapshot.source}: {name}", url, snapshot.sizes[name], get_session, headers, HTTPError)


def _call_hub(source: str, call: Callable[[], T], name: str = "", tries: int = 0) -> T:
    """The result of a call to the hub; tried again where that may help, and told in one line where not."""
    from huggingface_hub import errors

    label = f"{source}: {name}" if name else source
    base: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # httpx's, whichever httpx it is
    result: list[T] = []
    for attempt in patiently(label, base, tries):
        with attempt:
            try:
                result.append(call())
            except errors.GatedRepoError:
                raise Refused(
                    f"{source}: is gated; ask for access on its page, and log in with `hf auth login`", 403
                ) from None
            except errors.RevisionNotFoundError:
                raise Refused(f"{source}: the hub has the model, but no such revision", 404) from None
            except errors.RepositoryNotFoundError:
                raise Refused(
                    f"{source}: there is no such folder, and the hub has no such model, or it is private; "
                    "log in with `hf auth login`", 404,
                ) from None  # fmt: skip
            except errors.RemoteEntryNotFoundError:
                raise Refused(f"{label} is not on the hub", 404) from None
            except errors.LocalEntryNotFoundError as error:  # the hub could not be reached half way
                raise ConnectionError(_line(error.__cause__ or error)) from None
            except errors.HfHubHTTPError as error:
                answer: Any = error.response
                raise refusal(label, int(answer.status_code), answer.headers) from None
        if attempt.done:
            break
    return result[0]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
