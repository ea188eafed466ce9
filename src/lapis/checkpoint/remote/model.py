"""What every model on a server is: names and sizes of its files, small ones on request, weights in ranges."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lapis.checkpoint.remote.ranges import RemoteFile
from lapis.checkpoint.tensor_file import Header

BESIDE = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")  # what may lie beside the weights and be of use
LARGEST = 200_000_000  # bytes of a file that is not weights


@dataclass
class RemoteModel(ABC):
    """A model at one version.

    Attributes:
        source: As a user calls it.
        root: The folder for what is fetched of it.
        sizes: Bytes of every file on the server.
        unasked: Why the server could not be asked, where what was fetched before is all there is.
    """

    source: str
    root: Path
    sizes: dict[str, int]
    unasked: str = field(default="", kw_only=True)
    _remote: dict[str, RemoteFile] = field(default_factory=dict, repr=False, kw_only=True)

    @property
    @abstractmethod
    def pinned(self) -> str:
        """What names this version of it, whatever the server has later, as far as it has such names."""

    @abstractmethod
    def fetch(self, name: str) -> Path:
        """A file, fetched and checked unless it is there."""

    @abstractmethod
    def unlisted(self, names: Sequence[str]) -> list[str]:
        """Those of some files for which the server lists no digest, so that nothing proves their bytes."""

    @abstractmethod
    def open_ranges(self, name: str) -> RemoteFile:
        """A file, to be read in ranges."""

    def remote(self, name: str) -> RemoteFile:
        """A file that is read in ranges; the same one each time."""
        if name not in self._remote:
            self._remote[name] = self.open_ranges(name)
        return self._remote[name]

    def header(self, name: str) -> Header:
        """The header of a weight file that is not here, by one or two ranges."""
        return self.remote(name).header(self.root / name)

    def here(self, name: str) -> bool:
        """Whether a file was fetched."""
        return os.path.lexists(self.root / name)

    def fetch_beside(self) -> None:
        """Everything that is not weights and may be of use: tokenizer, templates, configs."""
        for name, size in self.sizes.items():
            if name.endswith(BESIDE) and not name.startswith(".") and size <= LARGEST and name.count("/") < 2:
                self.fetch(name)

    def fetch_weights(self, names: Sequence[str]) -> None:
        """Whole weight files."""
        for name in names:
            self.fetch(name)
