"""Models on the Hugging Face hub: `owner/name` or `owner/name@revision` in the place of a folder.

huggingface_hub holds the token and the client and spells the cache; HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and
HF_HUB_OFFLINE mean what they mean everywhere. A revision is pinned to its commit when it is first looked up. Opening
reads config and headers (by ranges); a difference or a merge reads tensors by ranges; loading fetches whole files, each
of which is checked against what the hub lists (repository.py). Leaves out: uploading; anything but models.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lapis.checkpoint.files import contained, describe_absence
from lapis.checkpoint.hub.repository import (
    REVISION,
    Repository,
    cache_of,
    fetch,
    list_files,
    remember,
    remembered,
    remote_file,
    safe_revision,
)
from lapis.checkpoint.remote.ranges import RemoteFile
from lapis.checkpoint.remote.requests import Refused
from lapis.checkpoint.tensor_file import Header, holds_adapter
from lapis.errors import CheckpointError

_ID = re.compile(rf"(?P<repo>[A-Za-z0-9_][\w.-]{{0,95}}/[A-Za-z0-9_][\w.-]{{0,95}})(?:@(?P<revision>{REVISION}))?")
BESIDE = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")  # what may lie beside the weights and be of use
LARGEST = 200_000_000  # bytes of a file that is not weights


@dataclass
class Snapshot:
    """A model at one commit. root: its folder in the cache; sizes: bytes of every file on the hub."""

    source: str
    repository: Repository
    root: Path
    sizes: dict[str, int]
    _remote: dict[str, RemoteFile] = field(default_factory=dict, repr=False)

    @property
    def pinned(self) -> str:
        """What names this state of it, whatever the hub has later."""
        return f"{self.repository.name}@{self.repository.commit}"

    def here(self, name: str) -> bool:
        """Whether a file is in the cache."""
        return os.path.lexists(self.root / name)

    def fetch(self, name: str) -> Path:
        """A file, downloaded into the cache and checked unless it is there."""
        fetch(self.repository, name, None if name.endswith(".safetensors") else LARGEST)
        return contained(self.root, name)

    def fetch_beside(self) -> None:
        """Everything that is not weights and may be of use: tokenizer, templates, configs."""
        for name, size in self.sizes.items():
            if name.endswith(BESIDE) and not name.startswith(".") and size <= LARGEST and name.count("/") < 2:
                self.fetch(name)

    def fetch_weights(self, names: Sequence[str]) -> None:
        """Whole weight files."""
        for name in names:
            self.fetch(name)

    def unlisted(self, names: Sequence[str]) -> list[str]:
        """Those of some files for which the hub lists no digest, so that nothing proves their bytes."""
        files = self.repository.files
        return [name for name in names if name in files and not files[name].digest]

    def remote(self, name: str) -> RemoteFile:
        """A file to be read in ranges."""
        if name not in self._remote:
            self._remote[name] = remote_file(self.repository, name)
        return self._remote[name]

    def header(self, name: str) -> Header:
        """The header of a weight file that is not in the cache, by one or two ranges."""
        return self.remote(name).header(self.root / name)


def hub_id(source: str) -> tuple[str, str | None] | None:
    """(owner/name, revision) where `source` is written like a hub id and no such folder, nor the owner's, is here."""
    match = _ID.fullmatch(source)
    if match is None or (match["revision"] and not safe_revision(match["revision"])) or os.path.lexists(source):
        return None
    if match["revision"] is None and os.path.isdir(source.split("/")[0]):
        return None  # "runs/base" beside a folder "runs" is a path that is mistyped
    return match["repo"], match["revision"]


def public_names(sources: Iterable[str]) -> list[str]:
    """The ids of those models that are of the hub, as a model card names what a model was made from.

    Args:
        sources: What a user called them; folders of this machine are nobody else's business.
    """
    return [identity[0] for source in sources if (identity := hub_id(source))]


def shown_name(source: str) -> str:
    """What a model is called where others read it: its id on the hub, or the last part of a folder's name."""
    return source if hub_id(source) else Path(source).name


def open_snapshot(source: str, repo: str, revision: str | None) -> Snapshot:
    """The model at the commit that the revision (default: the main branch) has now; offline, that of the cache.

    Raises CheckpointError, in one line, where hub and cache do not have it, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return _from_cache(source, repo, revision, "HF_HUB_OFFLINE is set")
    try:
        repository = list_files(source, "model", repo, revision, tries=3)
    except Refused:
        raise
    except CheckpointError as error:
        return _from_cache(source, repo, revision, str(error).removeprefix(f"{source}: "))
    if revision != repository.commit:
        remember(repository, revision or "main")
    sizes = {name: file.size or 0 for name, file in repository.files.items()}
    return Snapshot(source, repository, repository.root, sizes)


def find_model(source: str | os.PathLike[str], index: str) -> Snapshot:
    """The hub's model that `source` names, with its config (and `index`, where it has one) in the cache.

    An adapter is fetched whole. Raises CheckpointError where `source` is no hub id either.
    """
    identity = hub_id(str(source))
    if identity is None:
        raise CheckpointError(f"{source}: {describe_absence(source)}")
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


def _from_cache(source: str, repo: str, revision: str | None, why: str) -> Snapshot:
    """What the cache has of a revision, when the hub cannot be asked."""
    commit = remembered("model", repo, revision)
    if commit is None:
        raise CheckpointError(
            f"{source}: there is no such folder, and the cache of the hub does not hold it ({why}); give a folder"
        )
    repository = Repository(source, "model", repo, commit, {})
    return Snapshot(source, repository, cache_of("model", repo) / "snapshots" / commit, {})
