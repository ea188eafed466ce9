"""A delta that lies on the disk: opened, checked, and read tensor by tensor.

    DIR/delta.safetensors       the differences; __metadata__ holds format, version, and the description below
    DIR/config.json, tokenizer.json, chat_template.jinja, generation_config.json, ...       the chat model's
    DIR/lapis-manifest.json     size and sha256 of each file, which are compared before anything is applied

The description is JSON: bits or rank, which base (its source, and a sha256 of the values of all its weights but rows of
tokens), which chat model, its licence, the template's tokens, and for each tensor its name, shape, dtype, code
(codes/code.py) and relative error. The parts of a tensor lie in the file under NAME, or NAME:part:

    NAME, NAME:scales, ...      the difference, as its code has it; for a tensor of tokens the rows that differ alone
    NAME:ids                    which rows (ids of the chat model's tokenizer) these are
    NAME:template               the chat model's own rows of the template's tokens
    :sample                     the first numbers of some of the base's matrices, to tell its descendants by

Files are untrusted: whatever the description says must fit the header, part by part, before a number is read.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.commit import MANIFEST, sha256_of
from lapis.checkpoint.files import contained, describe_absence, read_json, read_object, stamp
from lapis.checkpoint.tensor_file import BITS, DELTA, TensorInfo, read_header, torch_dtype
from lapis.errors import CheckpointError
from lapis.families import find
from lapis.parsing import ParseError, parse_json, quoted
from lapis.text.tokenizer.vocabulary import Vocabulary, open_vocabulary
from lapis.weights.delta.codes.code import Code, Shape, code_named
from lapis.weights.engine.sources import as_bytes

FORMAT, VERSION = "lapis-delta", 2
_READ = ("1", "2")  # 1: no two planes were ever stored as one
SAMPLE = ":sample"
_FREE = ("README.md", ".gitattributes", MANIFEST)  # what may be edited


@dataclass(frozen=True)
class DeltaTensor:
    """One tensor of the chat model.

    Attributes:
        name: On disk, in the chat model.
        shape: There.
        dtype: There, by its name in safetensors.
        code: How its difference is stored; None where it is not.
        rows: For a tensor of tokens, how many rows have a difference; None for others.
        template: Whether the chat model's own rows of the template's tokens are stored.
        relative_error: |stored - exact| / |exact|.
        relative_norm: |exact| / |base|.
    """

    name: str
    shape: Shape
    dtype: str
    code: Code | None
    rows: int | None = None
    template: bool = False
    relative_error: float = 0.0
    relative_norm: float = 0.0

    @property
    def stored(self) -> Shape:
        """The shape of the difference as it is stored."""
        return self.shape if self.rows is None else (self.rows, *self.shape[1:])

    def part(self, part: str) -> str:
        """The name of a part in the file."""
        return f"{self.name}:{part}" if part else self.name


@dataclass(frozen=True)
class DeltaFile:
    """An opened delta; `open_delta` makes it.

    Attributes:
        source: What the user typed.
        root: The folder.
        description: What the file says of itself.
        weights: Its parts, to read from.
        tensors: By name on disk in the chat model.
        template: The template's tokens, in the order of their rows.
    """

    source: str
    root: Path
    description: Mapping[str, Any]
    weights: Checkpoint
    tensors: Mapping[str, DeltaTensor]
    template: list[str]

    @property
    def bits(self) -> str:
        """What a user calls it: exact, 8 bits, 4 bits, 1 bit or rank R."""
        rank, bits = self.description.get("rank"), self.description.get("bits")
        return f"rank {rank}" if rank else "exact" if bits == "exact" else f"{bits} bit{'s' * (bits != '1')}"

    @property
    def base_sha256(self) -> str:
        """Of the values of the base's weights."""
        return str(self.description["base"]["weights_sha256"])

    @cached_property
    def model(self) -> Checkpoint:
        """The chat model as far as headers go: config, names and shapes, and the files beside; no weight can be read
        from it."""
        config = read_object(contained(self.root, "config.json"))
        place = self.root / DELTA
        index = {
            name: TensorInfo(place, tensor.dtype, tensor.shape, 0, prod(tensor.shape) * BITS[tensor.dtype] // 8)
            for name, tensor in self.tensors.items()
        }
        return Checkpoint(self.source, self.root, config, find(config), index, {})

    @cached_property
    def words(self) -> Vocabulary | None:
        """The chat model's vocabulary."""
        return open_vocabulary(self.model)

    def to_json(self) -> dict[str, Any]:
        """What it holds and loses; the keys are those of the description, with a line for each tensor."""
        lines = [
            {
                "name": each.name, "shape": list(each.shape), "code": each.code.name if each.code else None,
                "rows": each.rows, "template": each.template, "relative_error": each.relative_error,
                "relative_norm": each.relative_norm,
            }
            for each in self.tensors.values()
        ]  # fmt: skip
        keys = ("lapis", "bits", "rank", "embeddings", "base", "chat", "license", "template_tokens", "end_tokens")
        described = {key: self.description.get(key) for key in keys}
        return {"source": self.source, "bytes": stored_bytes(self), **described, "errors": lines}

    def difference(self, role: str, name: str) -> "Difference":
        """The stored difference of a tensor."""
        return Difference(role, self, self.tensors[name])

    def ids(self, name: str) -> list[int]:
        """Which rows of a tensor of tokens have a difference."""
        ids: list[int] = self.weights.read(self.tensors[name].part("ids")).tolist()
        return ids

    def check_bytes(self) -> None:
        """Compares every file with the manifest.

        Raises:
            CheckpointError: Where one is missing or changed.
        """
        path = self.root / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{self.root}: {MANIFEST} is missing, which says what its files are; fetch it again")
        listed = read_json(contained(self.root, MANIFEST))
        files = listed.get("files") if isinstance(listed, dict) else None
        if not isinstance(files, dict) or DELTA not in files:
            raise CheckpointError(f"{path}: does not list {DELTA}; fetch it again")
        for name, entry in files.items():
            if name in _FREE:
                continue
            digest = entry.get("sha256") if isinstance(entry, dict) else None
            actual = sha256_of(contained(self.root, name))
            if actual != digest:
                raise CheckpointError(
                    f"{self.root}: {name} is not what was written: its sha256 is {actual[:12]}..., in {MANIFEST} "
                    f"{quoted(digest)[:13]}...; fetch it again"
                )


class Difference:
    """A stored difference as a source of float32 (engine/sources.py)."""

    def __init__(self, role: str, file: DeltaFile, tensor: DeltaTensor) -> None:
        self.role, self.name, self.shape = role, tensor.name, tensor.stored
        self.dtype = torch.float32
        self._file, self._tensor = file, tensor
        self._whole: dict[str, torch.Tensor] = {}

    def read(self, first: int, last: int, into: memoryview) -> int:
        values = torch.frombuffer(into, dtype=torch.float32) if last > first else torch.empty(0)
        taken = 0

        def read(part: str, start: int, end: int) -> torch.Tensor:
            nonlocal taken
            name = self._tensor.part(part)
            info = self._file.weights.info(name)
            if not 0 <= start <= end <= info.elements:
                raise CheckpointError("parts that are shorter than they should be")
            if part in ("sizes", "A"):  # read whole, for each span
                if part not in self._whole:
                    self._whole[part] = self._file.weights.read_range(name, start, end)
                    taken += self._whole[part].nbytes
                return self._whole[part]
            taken += (end - start) * BITS[info.dtype] // 8
            return self._file.weights.read_range(name, start, end)

        assert self._tensor.code is not None
        try:
            values.copy_(self._tensor.code.decode(read, self.shape, first, last))
        except CheckpointError as error:
            raise CheckpointError(f"{self._file.root / DELTA}: {self.name}: {error}; fetch it again") from None
        return taken


def open_delta(source: str | os.PathLike[str]) -> DeltaFile:
    """Opens a delta: header and description are read and checked, no number is.

    Args:
        source: A folder that `lapis delta extract` wrote.

    Raises:
        CheckpointError: For a folder that holds none, a newer format, or parts that do not fit what is said of them.
    """
    root = Path(source)
    if not os.path.isdir(root):
        raise CheckpointError(f"{source}: {describe_absence(source)}")
    if not os.path.lexists(root / DELTA):
        raise CheckpointError(
            f"{source}: holds no {DELTA}; make one with: lapis delta extract --base B --chat C --out D"
        )
    path = contained(root, DELTA)
    header = read_header(path)
    if header.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is no delta of lapis; its format is {quoted(header.metadata.get('format'))}")
    version = header.metadata.get("version", "")
    if version not in _READ:
        if version.isascii() and version.isdigit() and len(version) < 9 and int(version) > VERSION:
            raise CheckpointError(f"{path}: has format {version}, and this lapis reads {VERSION}; take a newer lapis")
        raise CheckpointError(f"{path}: its format's version is {quoted(version)}; expected {VERSION}")
    try:
        description = parse_json(header.metadata.get("delta", ""))
    except ParseError as error:
        raise CheckpointError(f"{path}: its description is damaged: {error}; fetch it again") from None
    weights = Checkpoint(str(source), root, {}, None, header.tensors, {DELTA: header}, [], {path: stamp(path.stat())})
    try:
        tensors, template = _read_description(description, header.tensors)
    except _Misfit as error:
        raise CheckpointError(f"{path}: {error}; fetch it again") from None
    return DeltaFile(str(source), root, description, weights, tensors, template)


class _Misfit(Exception):
    """The description does not fit the header."""


def _read_description(value: Any, held: Mapping[str, TensorInfo]) -> tuple[dict[str, DeltaTensor], list[str]]:
    if not isinstance(value, dict):
        raise _Misfit("its description is no object")
    for role in ("base", "chat"):
        if not isinstance(value.get(role), dict) or not isinstance(value[role].get("source"), str):
            raise _Misfit(f"its description does not say what {role} is")
    if not isinstance(value["base"].get("weights_sha256"), str):
        raise _Misfit("its description has no digest of its base")
    rank, bits = value.get("rank"), value.get("bits")
    if not (_count(rank) and rank) and bits not in ("exact", "8", "4", "1"):
        raise _Misfit(f"bits is {quoted(bits)} and rank {quoted(rank)}")
    template = value.get("template_tokens")
    if not isinstance(template, list) or not all(isinstance(token, str) for token in template):
        raise _Misfit("template_tokens is no list of texts")
    listed = value.get("tensors")
    if not isinstance(listed, dict) or not listed:
        raise _Misfit("it lists no tensors")
    parts: dict[str, dict[str, tuple[str, Shape]]] = {}
    for name, info in held.items():
        stem, _, part = name.rpartition(":") if ":" in name else (name, "", "")
        parts.setdefault(stem, {})[part] = info.dtype, info.shape
    sample = parts.pop("", {})
    names = value.get("sample")
    if not isinstance(names, list) or not all(isinstance(n, str) and n in listed for n in names):
        raise _Misfit("sample is no list of its tensors")
    if set(sample) != {SAMPLE[1:]} or sample[SAMPLE[1:]][0] != "BF16" or sample[SAMPLE[1:]][1][:1] != (len(names),):
        raise _Misfit("its sample of the base is not what the description says")
    tensors = {name: _read_tensor(name, entry, parts.pop(name, {}), len(template)) for name, entry in listed.items()}
    if parts:
        raise _Misfit(f"{next(iter(parts)):.200} belongs to no tensor of its description")
    return tensors, template


def _read_tensor(name: str, entry: Any, parts: dict[str, tuple[str, Shape]], tokens: int) -> DeltaTensor:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_count, shape)) or prod(shape) >= 2**60:
        raise _Misfit(f"{name:.200} has the shape {quoted(shape)}")
    dtype, rows, template = entry.get("dtype"), entry.get("rows"), entry.get("template", False)
    if not isinstance(dtype, str) or dtype not in BITS or torch_dtype(dtype) is None or not isinstance(template, bool):
        raise _Misfit(f"{name:.200} has the dtype {quoted(dtype)}")
    if rows is not None and not (_count(rows) and shape and rows <= shape[0]):
        raise _Misfit(f"{name:.200} has {quoted(rows)} rows of {quoted(shape)}")
    stored = (rows, *shape[1:]) if rows is not None else tuple(shape)
    expected: dict[str, tuple[str, Shape | None]] = {}
    code = None
    if (named := entry.get("code")) is not None:
        code = code_named(named, stored, parts) if isinstance(named, str) else None
        if code is None:
            raise _Misfit(f"{name:.200} is stored by {quoted(named)}, which is not known for {quoted(shape)}")
        expected |= code.parts(stored)
        if rows is not None:
            expected["ids"] = "I32", (rows,)
    elif rows is not None:
        raise _Misfit(f"{name:.200} has rows and no code")
    if template:
        expected["template"] = dtype, (tokens, *shape[1:])
    for part in expected.keys() | parts.keys():
        want, have = expected.get(part), parts.get(part)
        fits = want and have and want[0] == have[0] and (len(have[1]) == 1 if want[1] is None else want[1] == have[1])
        if not fits:
            raise _Misfit(f"{name:.200}: its part {quoted(part)} is {quoted(have)}; expected {quoted(want)}")
    errors = [entry.get(key, 0.0) for key in ("relative_error", "relative_norm")]
    if not all(isinstance(error, (int, float)) and not isinstance(error, bool) for error in errors):
        raise _Misfit(f"{name:.200} has the errors {quoted(errors)}")
    return DeltaTensor(name, tuple(shape), dtype, code, rows, template, *map(float, errors))


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**60


def stored_bytes(file: DeltaFile) -> int:
    """Bytes of all parts together."""
    return sum(info.nbytes for info in file.weights.index.values())


def part_bytes(parts: Mapping[str, tuple[str, Shape | None]]) -> int:
    """Bytes of the parts whose length is known beforehand."""
    return sum(prod(shape) * BITS[dtype] // 8 for dtype, shape in parts.values() if shape is not None)


def as_part(values: torch.Tensor) -> bytes:
    """A tensor's bytes."""
    return bytes(as_bytes(values.contiguous())) if values.numel() else b""
