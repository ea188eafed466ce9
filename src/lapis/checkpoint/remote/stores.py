"""Object stores by fsspec: `s3://`, `gs://` and whatever else it knows; its names, its credentials, our checks.

A store has no condition that all kinds of it take, so after each range the version of the file (its ETag, its
generation, or its time) is looked up again: bytes that came while it stayed the same are that version's.
"""

from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import Any

from lapis.checkpoint.remote.requests import AgainError, Refused
from lapis.errors import CheckpointError, MissingExtra

_VERSIONS = ("ETag", "etag", "generation", "VersionId", "LastModified", "updated", "mtime", "modified", "created")
_MOST = 1000  # files of a folder


class Store:
    """A folder in a store."""

    def __init__(self, address: str) -> None:
        self._address = address
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise MissingExtra("fsspec, which reads folders in object stores,", "remote") from None
        try:
            self._system, self._root = url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            kind, why = address.split(":", 1)[0], " ".join(str(error).split())[:100]
            raise MissingExtra(f"what reads {kind}:// ({why})", "remote") from None
        except ValueError as error:
            raise CheckpointError(f"{address}: {error}; give a folder, a hub id, or an address") from None

    def listing(self) -> dict[str, "StoredFile"]:
        """Its files with sizes and versions."""
        try:
            paths = [each["name"] for each in self._system.ls(self._root, detail=True) if each.get("type") == "file"]
            if len(paths) > _MOST:
                raise CheckpointError(f"{self._address}: holds {len(paths):,} files; give the folder of one model")
            with ThreadPoolExecutor(8) as pool:  # a listing spells versions in another way than what is asked later
                entries = list(pool.map(self._system.info, paths))
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self._address}: {_reason(error)}") from None
        files = [StoredFile(self._system, entry, self._address) for entry in entries]
        return {str(path).rsplit("/", 1)[-1]: file for path, file in zip(paths, files, strict=True)}


class StoredFile:
    """One file in a store.

    Attributes:
        name: For messages.
        size: Its bytes.
        version: What tells this state of it from others.
        delay: Not measured.
    """

    delay = inf

    def __init__(self, system: Any, entry: dict[str, Any], address: str) -> None:
        self._system, self._path = system, str(entry["name"])
        self.name = f"{address}: {self._path.rsplit('/', 1)[-1]}"
        self.size, self.version = int(entry.get("size") or 0), _version(entry)

    def read(self, first: int, buffer: memoryview) -> int:
        """Fills `buffer` with the bytes from `first` on; returns how many came."""
        try:
            data = self._system.cat_file(self._path, start=first, end=first + len(buffer))
            version, size = _version(now := self._system.info(self._path)), now.get("size")
        except (FileNotFoundError, PermissionError) as error:
            raise Refused(f"{self.name}: {_reason(error)}") from None
        except Exception as error:
            raise AgainError(_reason(error), None) from None
        if (version, size) != (self.version, self.size):
            raise Refused(f"{self.name}: changed on the server while it was being read; run again")
        if len(data) > len(buffer):
            raise Refused(f"{self.name}: the store sent {len(data):,} bytes where {len(buffer):,} were asked for")
        buffer[: len(data)] = data
        return len(data)


def _version(entry: dict[str, Any]) -> str:
    return next((str(entry[name]) for name in _VERSIONS if entry.get(name)), "")


def _reason(error: Exception) -> str:
    """Why a store did not answer, and what helps."""
    if isinstance(error, FileNotFoundError):
        return "there is no such folder or file; check the address"
    if isinstance(error, PermissionError):
        return "the store refuses access; log in as its own tools want it (aws configure, gcloud auth)"
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return f"the store does not answer: {text}; try later"
