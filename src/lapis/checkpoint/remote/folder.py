"""Model folders on web servers and in object stores: `https://host/folder`, `s3://bucket/folder`, `gs://...`.

Weights are read in ranges and kept nowhere; small files go to a folder of this process. What tells one version of a
file from another is looked up when the folder is opened, and every answer must agree with it. A folder that lapis wrote
has a manifest, whose sizes and sha256 are compared. A web server lists no files, so the names that a model has are
asked for.
"""

import atexit
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from lapis.checkpoint.commit import MANIFEST
from lapis.checkpoint.files import contained, read_json
from lapis.checkpoint.remote.connections import HttpFile
from lapis.checkpoint.remote.model import LARGEST, RemoteModel
from lapis.checkpoint.remote.ranges import ByteRanges, RemoteFile
from lapis.checkpoint.remote.requests import call_patiently
from lapis.checkpoint.remote.stores import Store
from lapis.checkpoint.tensor_file import INDEX, SHARD_NAME, SINGLE
from lapis.errors import CheckpointError
from lapis.parsing import quoted

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]{1,20}://\S+")
_NAMES = (
    "config.json", INDEX, SINGLE, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "preprocessor_config.json", "processor_config.json", "README.md",
    "LICENSE", MANIFEST,
)  # fmt: skip


class Versioned(ByteRanges, Protocol):
    """A file at one version: what tells this state of it from others; "" where nothing does."""

    version: str


def is_address(source: str) -> bool:
    """Whether a name is an address of a folder on a server."""
    return _ADDRESS.fullmatch(source) is not None and not source.startswith("file:")


def open_folder(source: str) -> "RemoteFolder":
    """The model folder at an address.

    Raises:
        CheckpointError: In one line, where it cannot be reached or is not there.
        MissingExtra: Where a library for that kind of address is not installed.
    """
    address = source.rstrip("/")
    web = WebFolder(address) if address.startswith(("http://", "https://")) else None
    listing: dict[str, Versioned] = {**(web.listing() if web else Store(address).listing())}
    if not listing:
        raise CheckpointError(f"{source}: there is no such folder, or nothing of a model in it; check the address")
    folder = RemoteFolder(source, _place(source), {name: each.size for name, each in listing.items()}, listing)
    if INDEX in listing and web is not None:
        folder.add(web.shards(read_json(folder.fetch(INDEX))))
    folder.read_manifest()
    return folder


@dataclass
class RemoteFolder(RemoteModel):
    """A model folder at an address, as it was when it was opened."""

    listing: dict[str, Versioned]
    _sha256: dict[str, str] = field(default_factory=dict)

    @property
    def pinned(self) -> str:
        return self.source

    def add(self, more: Mapping[str, Versioned]) -> None:
        """Files that the index names."""
        self.listing.update(more)
        self.sizes |= {name: each.size for name, each in more.items()}

    def read_manifest(self) -> None:
        """Takes up sizes and digests of a folder that lapis wrote."""
        if MANIFEST not in self.listing:
            return
        value = read_json(self.fetch(MANIFEST))
        entries = value.get("files") if isinstance(value, dict) else None
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
            if name not in self.listing or not (isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)):
                continue
            if size != self.sizes[name]:
                raise CheckpointError(
                    f"{self.source}: {name} has {self.sizes[name]:,} bytes, and {MANIFEST} says {quoted(size)}; upload "
                    "the folder again"
                )
            self._sha256[name] = digest

    def fetch(self, name: str) -> Path:
        place, listed = self.root / name, self.listing.get(name)
        if os.path.lexists(place):
            return place
        if listed is None:
            raise CheckpointError(f"{self.source}: has no {name:.200}")
        if name.endswith(".safetensors"):
            raise CheckpointError(
                f"{self.source}: is read in ranges; what runs a model, or writes all of it anew, wants it here: fetch "
                "the folder, and give its path"
            )
        if listed.size > LARGEST:
            raise CheckpointError(f"{self.source}: {name} has {listed.size:,} bytes; none of its kind has {LARGEST:,}")
        data = self.remote(name).fetch(0, listed.size)
        if (digest := self._sha256.get(name)) and hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{self.source}: {name} has other bytes than {MANIFEST} lists; upload it again")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        return contained(self.root, name)

    def unlisted(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.listing and name not in self._sha256]

    def open_ranges(self, name: str) -> RemoteFile:
        listed = self.listing[name]
        return RemoteFile(listed, self._sha256.get(name, ""), f"{listed.version} {listed.size}")


class WebFolder:
    """A folder on a web server."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.username or parts.password or parts.query or parts.fragment or not parts.hostname:
            shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
            raise CheckpointError(f"{shown}: give the address of a folder, without a user, a password, ? or #")
        self._address = address

    def listing(self) -> dict[str, HttpFile]:
        """Its files, as far as their names are a model's."""
        return self._known(_NAMES)

    def shards(self, index: Any) -> dict[str, HttpFile]:
        """The weight files that an index names and the server has."""
        names = index.get("weight_map") if isinstance(index, dict) else None
        listed = {str(name) for name in names.values()} if isinstance(names, dict) else set()
        return self._known(sorted(name for name in listed if SHARD_NAME.fullmatch(name)))

    def _known(self, names: Sequence[str]) -> dict[str, HttpFile]:
        with ThreadPoolExecutor(8) as pool:
            return {name: each for name, each in zip(names, pool.map(self._look, names), strict=True) if each}

    def _look(self, name: str) -> HttpFile | None:
        """A file with its size and version; None where there is none."""
        file = HttpFile(f"{self._address}: {name}", f"{self._address}/{quote(name)}", 0, {})
        there = False

        def ask() -> None:
            nonlocal there
            there = file.look()

        call_patiently(file.name, ask)
        return file if there else None


@cache
def _scratch() -> Path:
    """Where this process keeps small files of folders on servers; gone at its end."""
    place = Path(tempfile.mkdtemp(prefix="lapis-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _place(source: str) -> Path:
    name = re.sub(r"[^\w.-]+", "_", source.split("://", 1)[1])[-100:]
    place = Path(tempfile.mkdtemp(dir=_scratch())) / (name.strip(".") or "model")
    place.mkdir()
    return place
