"""The bytes of data files, decompressed as they are read: suffix(path), at(path, number), OpenedFile(path).

.gz and .zst are decompressed in bounded memory, and one that ends too early is an error. What the bytes mean is in
records.py and corpus.py.
"""

import gzip
import io
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from lapis.errors import DataError, MissingExtra

PIECE = 1 << 20  # bytes that are read at once
KINDS = (".txt", ".md", ".jsonl", ".json", ".parquet")
RECORDS = (".jsonl", ".json", ".parquet")  # the kinds that hold records, not plain text
PRESSED = (".gz", ".zst")


def cache_folder() -> Path:
    """The folder of what was made from data, for later runs: $LAPIS_CACHE, by default ~/.cache/lapis."""
    return Path(os.environ.get("LAPIS_CACHE") or "~/.cache/lapis").expanduser()


def suffix(path: Path) -> str:
    """The kind of a file, whether it is compressed or not: ".txt", ".jsonl", ..."""
    return Path(path.stem).suffix.lower() if pressed(path) else path.suffix.lower()


def pressed(path: Path) -> bool:
    """True for a file that is compressed as a whole."""
    return path.suffix.lower() in PRESSED


def at(path: Path, number: int) -> str:
    """Where something stands, for an error: "FILE line 3"; "row 3" in a parquet file, "item 3" in a JSON array."""
    return f"{path} {({'.parquet': 'row', '.json': 'item'}).get(suffix(path), 'line')} {number}"


class OpenedFile:
    """A file, decompressed where need be, whose damage is a DataError. read and readline as of a binary file.

    first, last: only the bytes from the one to before the other, of a file that is not compressed; None = to its end.
    """

    def __init__(self, path: Path, first: int = 0, last: int | None = None) -> None:
        self.path = path
        self.first = first
        self.left = None if last is None else last - first

    def __enter__(self) -> "OpenedFile":
        try:
            self.file: BinaryIO = self.path.open("rb")
            self.file.seek(self.first)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        self.stream: Any = self.file
        if self.path.suffix.lower() == ".gz":
            self.stream = io.BufferedReader(gzip.GzipFile(fileobj=self.file), PIECE)
        elif self.path.suffix.lower() == ".zst":
            self.stream = io.BufferedReader(_Zstd(self.file), PIECE)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, size: int) -> bytes:
        return self._checked(self.stream.read, size)

    def readline(self, size: int) -> bytes:
        return self._checked(self.stream.readline, size)

    def _checked(self, call: Any, size: int) -> bytes:
        try:
            got: bytes = call(size if self.left is None else min(size, self.left))
        except EOFError:
            raise DataError(f"{self.path}: the gzip stream ends too early; it is truncated, fetch it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self.path}: not gzip, or damaged: {error}; fetch it again") from None
        except OSError as error:
            raise DataError(f"{self.path}: {_damage(error)}") from None
        if self.left is not None:
            self.left -= len(got)
        return got


def _damage(error: OSError) -> str:
    if error.errno is not None:
        return f"cannot be read: {error.strerror}"
    if "runcated" in str(error):
        return "the zstd stream ends too early; it is truncated, fetch it again"
    return f"not zstd, or damaged: {str(error).splitlines()[0]}; fetch it again"


class _Zstd(io.RawIOBase):
    """A zstd stream (one frame or several) as a raw file."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import pyarrow
        except ImportError:
            raise MissingExtra("reading .zst: pyarrow", "data") from None
        self.stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = self.stream.read(len(buffer))
        buffer[: len(got)] = got
        return len(got)
