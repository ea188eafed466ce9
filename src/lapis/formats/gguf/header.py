"""The header of a GGUF file, read by nothing that trusts it: every count, length and offset is checked first.

The file is described by the GGUF specification of the ggml project, versions 2 and 3: a magic, counts, key-value pairs,
descriptions of tensors, then their data, aligned. A count is believed only where the bytes for it are there, so a
header of a few bytes never asks for memory. Nothing is mapped. Left out, each refused by name: files of big-endian
machines, split files, arrays in arrays.
"""

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from lapis.errors import CheckpointError
from lapis.wording import format_count

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where the file does not say
LARGEST_ALIGNMENT = 1 << 16
LARGEST_STRING = 64_000_000  # bytes of one string
LARGEST_NAME = 1024  # bytes of a key or a tensor's name
MOST_DIMENSIONS = 4

# of values, by their number in the file: struct's letter
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# of tensors, by their number in the file: name, numbers in a block, bytes of a block
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: As the file spells it.
        type: "F16", "Q4_K", ... (TENSOR_TYPES).
        shape: Rows first, as everywhere else; the file has them the other way round.
        start: Byte in the file.
        nbytes: Of its data.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def rows(self) -> int:
        """How many runs of the last dimension it has; blocks never reach over the end of one."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows


@dataclass(frozen=True)
class GgufFile:
    """A file whose header was checked. fields: key -> int, float, bool, str, or a list of one kind of these."""

    path: Path
    version: int
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]
    size: int

    def read(self, tensor: GgufTensor, first: int, last: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The bytes of rows [first, last), shape [last - first, row_bytes]. Raises where the file has shrunk."""
        width = tensor.row_bytes
        with self.path.open("rb") as file:
            file.seek(tensor.start + first * width)
            raw = file.read((last - first) * width)
        if len(raw) < (last - first) * width:
            raise CheckpointError(f"{self.path}: changed while it was being read; run again when it is at rest")
        return np.frombuffer(raw, np.uint8).reshape(last - first, width)


def is_gguf(path: Path) -> bool:
    """Whether a regular file begins as a GGUF file does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """The checked header of a GGUF file. Its tensors' data is not read.

    Args:
        path: A regular file.

    Returns:
        Fields and tensors, all of whose data lies within the file.

    Raises:
        CheckpointError: For a file that is none, is cut, or whose header contradicts itself; what and where, in a line.
    """
    place = Path(path)
    if place.is_dir():
        raise CheckpointError(f"{place}: is a folder; give the .gguf file in it")
    if not place.is_file():
        raise CheckpointError(
            f"{place}: {'is not a regular file' if place.exists() else 'is missing'}; give a .gguf file"
        )
    try:
        with place.open("rb") as file:
            return _HeaderReader(place, file, os.fstat(file.fileno()).st_size).read()
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be read: {error.strerror}") from None


class _HeaderReader:
    """Takes one piece after the other, each only where the file has it."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.position = 0

    def read(self) -> GgufFile:
        if self.take(4, "the magic") != MAGIC:
            self.refuse("does not begin with GGUF; it is no GGUF file")
        version = int(self.scalar("I", "the version"))
        if version not in VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "is from a big-endian machine" if big else f"is GGUF version {version}"
            self.refuse(f"{what}; versions 2 and 3, little-endian, are read. Convert it again")
        tensors, pairs = int(self.scalar("Q", "counts")), int(self.scalar("Q", "counts"))
        self.expect(pairs, 8 + 1 + 4 + 1, "key-value pairs")
        self.expect(tensors, 8 + 1 + 4 + 8 + 4 + 8, "tensors")
        fields = self.read_fields(pairs)
        if fields.get("split.count", 1) not in (0, 1):
            self.refuse(f"is one of {fields['split.count']} parts; join them with llama-gguf-split --merge")
        alignment = fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
            self.refuse(f"general.alignment is {alignment!r:.40}; expected a power of two up to {LARGEST_ALIGNMENT}")
        entries = [self.read_tensor() for _ in range(tensors)]
        data = -(-self.position // alignment) * alignment
        listed = {name: self.place_tensor(name, kind, shape, offset, data, alignment)
                  for name, kind, shape, offset in entries}  # fmt: skip
        if len(listed) < len(entries):
            self.refuse(f"holds {format_count(len(entries) - len(listed), 'tensor')} under a name that another has")
        self.check_overlaps(listed)
        return GgufFile(self.path, version, fields, listed, self.size)

    def read_fields(self, count: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for _ in range(count):
            key = self.string("a key", LARGEST_NAME)
            if not key or not key.isprintable():
                self.refuse(f"a key is not printable text: {key!r:.60}")
            if key in fields:
                self.refuse(f"holds the key {key} twice")
            fields[key] = self.value(int(self.scalar("I", key)), key)
        return fields

    def read_tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.string("a tensor's name", LARGEST_NAME)
        if not name or not name.isprintable():
            self.refuse(f"a tensor's name is not printable text: {name!r:.60}")
        dimensions = int(self.scalar("I", name))
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            self.refuse(f"{name}: has {dimensions} dimensions; expected 1 to {MOST_DIMENSIONS}")
        shape = tuple(int(self.scalar("Q", name)) for _ in range(dimensions))[::-1]
        return name, int(self.scalar("I", name)), shape, int(self.scalar("Q", name))

    def place_tensor(
        self, name: str, kind: int, shape: tuple[int, ...], offset: int, data: int, alignment: int
    ) -> GgufTensor:
        if kind not in TENSOR_TYPES:
            known = ", ".join(sorted(entry[0] for entry in TENSOR_TYPES.values()))
            self.refuse(f"{name}: is of tensor type {kind}, which is not read here; known: {known}")
        type_name, block, width = TENSOR_TYPES[kind]
        if any(n < 1 for n in shape) or prod(shape) >= 1 << 62 or shape[-1] % block:
            self.refuse(f"{name}: {'x'.join(map(str, shape))} is no shape of {type_name}, whose blocks hold {block}")
        nbytes = prod(shape) // block * width
        if offset % alignment:
            self.refuse(f"{name}: its data begins at byte {offset}, which is not a multiple of {alignment}")
        if data + offset + nbytes > self.size:
            self.refuse(f"{name}: ends at byte {data + offset + nbytes:,} of {self.size:,}; truncated, fetch it again")
        return GgufTensor(name, type_name, shape, data + offset, nbytes)

    def check_overlaps(self, tensors: dict[str, GgufTensor]) -> None:
        end, before = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
            if tensor.start < end:
                self.refuse(f"{tensor.name} overlaps {before}")
            end, before = tensor.start + tensor.nbytes, tensor.name

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key, LARGEST_STRING)
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            self.refuse(f"{key}: is of value type {kind}, which there is not")
        return self.scalar(_SCALARS[kind], key)

    def array(self, key: str) -> list[Any]:
        kind, count = int(self.scalar("I", key)), int(self.scalar("Q", key))
        if kind == _STRING:
            self.expect(count, 8, f"texts of {key}")
            return [self.string(key, LARGEST_STRING) for _ in range(count)]
        if kind not in _SCALARS:
            self.refuse(f"{key}: is an array of type {kind}, which is not read here")
        letter = _SCALARS[kind]
        self.expect(count, struct.calcsize(letter), f"entries of {key}")
        raw = self.take(count * struct.calcsize(letter), key)
        values: list[Any] = np.frombuffer(raw, np.dtype("<" + letter)).tolist()
        return values

    def string(self, what: str, most: int) -> str:
        length = int(self.scalar("Q", what))
        if length > most:
            self.refuse(f"{what}: claims a text of {length:,} bytes; the limit is {most:,}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            self.refuse(f"{what}: is not UTF-8 at byte {self.position - length + error.start}")

    def scalar(self, letter: str, what: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize(letter), what))[0]

    def expect(self, count: int, least: int, what: str) -> None:
        """Refuses a count of things for which the rest of the file is too short, `least` bytes each."""
        if count * least > self.size - self.position:
            self.refuse(f"claims {count:,} {what} in {self.size:,} bytes; truncated or damaged, fetch it again")

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            self.refuse(
                f"{what}: needs {count:,} bytes where {self.size - self.position:,} are left; truncated, fetch it again"
            )
        raw = self.file.read(count)
        if len(raw) < count:
            self.refuse("changed while it was being read; run again when it is at rest")
        self.position += count
        return raw

    def refuse(self, why: str) -> NoReturn:
        shown = why if why.isprintable() else "".join(c if c.isprintable() else "?" for c in why)
        raise CheckpointError(f"{self.path}: {shown}")
