"""Models on the Hugging Face hub: `owner/name` or `owner/name@revision` in the place of a folder.

huggingface_hub holds the token and the client and spells the cache; HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and
HF_HUB_OFFLINE mean what they mean everywhere. A revision is pinned to its commit when it is first looked up. Opening
reads config and headers (by ranges); a difference or a merge reads tensors by ranges; loading fetches whole files, each
of which is checked against what the hub lists (repository.py). Leaves out: uploading; anything but models.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lapis.checkpoint.files import contained, describe_absence
from lapis.checkpoint.hub.repository import (
    REVISION,
    Repository,
    cache_of,
    endpoint,
    fetch,
    list_files,
    remember,
    remembered,
    remote_file,
    safe_revision,
)
from lapis.checkpoint.remote.folder import is_address, open_folder
from lapis.checkpoint.remote.model import LARGEST, RemoteModel
from lapis.checkpoint.remote.ranges import RemoteFile
from lapis.checkpoint.remote.requests import Refused
from lapis.checkpoint.tensor_file import holds_adapter
from lapis.errors import CheckpointError

_ID = re.compile(rf"(?P<repo>[A-Za-z0-9_][\w.-]{{0,95}}/[A-Za-z0-9_][\w.-]{{0,95}})(?:@(?P<revision>{REVISION}))?")


@dataclass
class Snapshot(RemoteModel):
    """A model of the hub at one commit, and its folder in the cache."""

    repository: Repository

    @property
    def pinned(self) -> str:
        return f"{self.repository.name}@{self.repository.commit}"

    def fetch(self, name: str) -> Path:
        fetch(self.repository, name, None if name.endswith(".safetensors") else LARGEST)
        return contained(self.root, name)

    def unlisted(self, names: Sequence[str]) -> list[str]:
        files = self.repository.files
        return [name for name in names if name in files and not files[name].digest]

    def open_ranges(self, name: str) -> RemoteFile:
        return remote_file(self.repository, name)


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
        return _from_cache(source, repo, revision, f"{endpoint()}: {str(error).removeprefix(f'{source}: ')}")
    if revision != repository.commit:
        remember(repository, revision or "main")
    sizes = {name: file.size or 0 for name, file in repository.files.items()}
    return Snapshot(source, repository.root, sizes, repository)


def find_model(source: str | os.PathLike[str], index: str) -> RemoteModel:
    """The model on the hub, or at an address, that `source` names.

    Its config (and `index`, where it has one) are then here; an adapter of the hub is fetched whole.

    Raises:
        CheckpointError: Where `source` is neither.
    """
    if is_address(str(source)):
        folder = open_folder(str(source))
        for name in {"config.json", index} & folder.sizes.keys():
            folder.fetch(name)
        return folder
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
    """The folder with all that lies beside the weights of a model on a server; None where `source` is none."""
    if is_address(str(source)):
        folder = open_folder(str(source))
        folder.fetch_beside()
        return folder.root
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
    return Snapshot(source, cache_of("model", repo) / "snapshots" / commit, {}, repository, unasked=why)
