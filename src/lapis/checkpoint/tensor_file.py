"""Files of tensors in the safetensors format: dtypes, headers, and the one writer.

A header is believed only after every length, name and offset in it has been checked against the file, before anything
is allocated. Leaves out: which files make up a model (opening.py), and files that are filled tile by tile
(weights/engine/).
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapis.errors import CheckpointError
from lapis.parsing import ParseError, parse_json, quoted

if TYPE_CHECKING:
    import torch

HEADER_LIMIT = 64_000_000  # bytes; that of the largest known model file is under 1 MB
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DELTA = "delta.safetensors"  # of a folder that holds a difference (weights/delta/)
SHARD_NAME = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_MODEL = re.compile(r"model\.safetensors(\.index\.json)?")

# bits of one element by the format's own names
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def holds_adapter(names: Iterable[str]) -> bool:
    """Whether a folder's files are an adapter's: its config and no weights of a model.

    A config.json and the files of a trainer may lie beside.
    """
    listed = list(names)
    weights = any(_MODEL.fullmatch(name) or SHARD_NAME.fullmatch(name) for name in listed)
    return "adapter_config.json" in listed and not weights


def holds_delta(names: Iterable[str]) -> bool:
    """Whether a folder's files are a delta's, and no model's."""
    listed = list(names)
    return DELTA in listed and not any(_MODEL.fullmatch(name) or SHARD_NAME.fullmatch(name) for name in listed)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. start, end: byte offsets from the beginning of the file. dtype: the format's name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A checked safetensors header. size: bytes of the file. raw: the header's own bytes, for digests."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int
    raw: bytes


@cache
def torch_dtype(name: str) -> "torch.dtype | None":
    """The torch dtype for a safetensors dtype name; None where torch has none that can be computed with."""
    import torch

    return {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
        "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
        "U64": torch.uint64, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
    }.get(name)  # fmt: skip


@cache
def dtype_name(dtype: "torch.dtype") -> str:
    """The safetensors name of a torch dtype."""
    for name in BITS:
        if torch_dtype(name) is dtype:
            return name
    raise CheckpointError(f"{dtype} has no place in a safetensors file")


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file. Reads the header's bytes only.

    Args:
        path: Of the file.

    Raises:
        CheckpointError: Naming file and tensor, for a file that is cut, a length beyond it, duplicate or unprintable
            names, unknown dtypes, shapes that do not fit their bytes, overlaps, holes, and trailing bytes.
    """
    try:
        with path.open("rb") as file:

            def read(first: int, last: int) -> bytes:
                file.seek(first)
                return file.read(last - first)

            return parse_header(path, os.fstat(file.fileno()).st_size, read)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def parse_header(path: Path, size: int, read: Callable[[int, int], bytes]) -> Header:
    """As `read_header`, for a file of `size` bytes of which read(first, last) gives a part. path: what it is called."""
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes; too short to be safetensors, fetch it again")
    length = int.from_bytes(read(0, 8), "little")
    if length > HEADER_LIMIT:
        raise CheckpointError(f"{path}: gives its header as {length:,} bytes; the limit is {HEADER_LIMIT:,}")
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: gives its header as {length:,} bytes but has {size:,} in all; truncated, fetch it again"
        )
    raw = read(8, 8 + length)
    try:
        entries = parse_json(raw)
    except ParseError as error:
        raise CheckpointError(f"{path}: the header is damaged: {error}; fetch the file again") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header is a {type(entries).__name__}, not an object")
    metadata = entries.pop("__metadata__", {}) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map names to text")
    tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_layout(path, tensors, 8 + length, size)
    return Header(tensors, metadata, size, raw)


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], least: int = 0
) -> bytes:
    """The first bytes of a safetensors file that holds `tensors` (name -> dtype name, shape) in this order.

    Tensors follow one another without holes. Padded with spaces to a multiple of 8, so that data is aligned, and to
    `least` bytes.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * max(-len(raw) % 8, least - 8 - len(raw))
    return len(raw).to_bytes(8, "little") + raw


def write_tensors(path: Path, tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors that are in memory as one file, in the order of their names.

    Args:
        path: The file to write.
        tensors: By name, of any shape, dtype and device.
        metadata: For the header's `__metadata__`.

    Raises:
        OSError: For a full disk.
    """
    ordered = {name: tensors[name].detach() for name in sorted(tensors)}
    stream_tensors(path, {name: (t.dtype, tuple(t.shape)) for name, t in ordered.items()}, ordered.values(), metadata)


def stream_tensors(
    path: Path,
    shapes: Mapping[str, tuple["torch.dtype", tuple[int, ...]]],
    tensors: Iterable["torch.Tensor"],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """As `write_tensors`, for tensors that are made one after the other, so that one at a time is held.

    Args:
        path: The file to write.
        shapes: Name -> dtype and shape, in the order in which `tensors` gives them.
        tensors: The values, each in the dtype and shape that `shapes` names.
        metadata: For the header's `__metadata__`.

    Raises:
        OSError: For a full disk.
    """
    import torch

    with path.open("wb") as file:
        spelled = {name: (dtype_name(dtype), shape) for name, (dtype, shape) in shapes.items()}
        file.write(header_bytes(spelled, metadata or {}))
        for tensor in tensors:
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def finite(values: "torch.Tensor") -> bool:
    """Whether a vector is free of NaN and Inf; its sum tells, and is far cheaper than looking at each element."""
    import torch

    wide = values.dtype in (torch.bfloat16, torch.float32)  # sums of others overflow; a sum in another dtype is slower
    total = float(values.sum() if wide else values.sum(dtype=torch.float32))
    return abs(total) < float("inf") or bool(torch.isfinite(values).all())


def read_tensors(path: Path) -> dict[str, "torch.Tensor"]:
    """The reverse of `write_tensors`; each tensor in memory of its own, so that the file may be deleted.

    Raises CheckpointError for a file that is damaged, or cut while it is read: it is read and never mapped.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    try:
        with path.open("rb", buffering=0) as file:
            for name, info in read_header(path).tensors.items():
                dtype = torch_dtype(info.dtype)
                if dtype is None:
                    raise CheckpointError(f"{path}: {name} is {info.dtype}, which cannot be computed with here")
                tensor = torch.empty(info.elements, dtype=dtype)
                buffer, done = tensor.view(torch.uint8).numpy().data, 0
                while done < info.nbytes:
                    now = os.preadv(file.fileno(), [buffer[done:]], info.start + done)
                    if not now:
                        raise CheckpointError(f"{path}: was cut while it was read; {name} ends early")
                    done += now
                tensors[name] = tensor.view(info.shape)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return tensors


def _tensor_info(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    shown = name if name.isprintable() and name else repr(name[:80])
    if shown != name or len(name) > 1024:
        raise CheckpointError(f"{path}: a tensor's name is not printable text: {shown[:80]}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {name}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{path}: {name}: unknown dtype {quoted(dtype)}; known: {', '.join(BITS)}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(_is_count(n) for n in shape):
        raise CheckpointError(f"{path}: {name}: {quoted(shape)} is not a shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise CheckpointError(f"{path}: {name}: data_offsets {quoted(offsets)} are not two offsets")
    first, last = offsets
    bits = prod(shape) * BITS[dtype]
    if bits % 8 or last - first != bits // 8:
        raise CheckpointError(
            f"{path}: {name}: {'x'.join(map(str, shape)) or 'a scalar'} of {dtype} is {-(-bits // 8):,} bytes, "
            f"but data_offsets hold {last - first:,}"
        )
    return TensorInfo(path, dtype, tuple(shape), data + first, data + last)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], data: int, size: int) -> None:
    position, before = data, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < position:
            raise CheckpointError(f"{path}: {name} overlaps {before}")
        if info.start > position:
            raise CheckpointError(f"{path}: a hole of {info.start - position:,} bytes before {name}")
        position, before = info.end, name
    if position > size:
        raise CheckpointError(f"{path}: {before} ends at byte {position:,} of {size:,}; truncated, fetch it again")
    if position < size:
        raise CheckpointError(f"{path}: {size - position:,} bytes after the last tensor belong to none")
