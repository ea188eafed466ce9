"""What the engine is asked for, and what it says of it: an output tensor, its kernel, the figures of one run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

import torch

from lapis.checkpoint.tensor_file import header_bytes
from lapis.weights.engine.sources import Source
from lapis.weights.engine.tiles import Buffer, Tile, read_checksum, spans


@dataclass(frozen=True)
class Kernel:
    """How a tensor is computed.

    apply(tile, state) -> (result, delta): float32 vectors; delta is what was added to the tensor that is being changed,
    or None where that means nothing. passes: functions (tile, state) -> partial that see every tile before `apply`
    does; after pass i, fold(i, partials in the order of tiles, state) -> state. rows: tiles hold whole rows.
    whole: one tile holds the whole tensor; memory then grows with the largest one.
    """

    apply: Callable[[Tile, Any], tuple[torch.Tensor, torch.Tensor | None]]
    passes: tuple[Callable[[Tile, Any], Any], ...] = ()
    fold: Callable[[int, list[Any], Any], Any] | None = None
    rows: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Output:
    """One tensor to write. kernel None copies the bytes of the first source.

    patch(first, last, values): overwrites parts of elements [first, last), given in the output's dtype, after rounding,
    and returns the checksum of what it has read for that (engine/tiles.py).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    kernel: Kernel | None = None
    patch: Callable[[int, int, torch.Tensor], int] | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class Figures:
    """What the engine saw of one tensor: sums of squares of the delta and of its rounding error; NaN and Inf."""

    delta_sq: float = 0.0
    error_sq: float = 0.0
    nonfinite: int = 0
    has_delta: bool = False

    @property
    def lost(self) -> float | None:
        """Share of the delta lost to rounding: |rounded - exact| / |delta|; None where there is no delta."""
        if not self.has_delta:
            return None
        return sqrt(self.error_sq / self.delta_sq) if self.delta_sq else 0.0


@dataclass
class Account:
    """What a run did. figures: by tensor. digests, sizes: sha256 and bytes of each file written.

    findings: whether what came from servers is what they list.
    """

    figures: dict[str, Figures]
    digests: dict[str, str]
    sizes: dict[str, int]
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_resumed: int = 0
    findings: list[str] = field(default_factory=list)


def unchanged(tile: Tile, _state: Any) -> tuple[torch.Tensor, None]:
    """`Kernel.apply` that only rounds to the output's dtype."""
    return tile.inputs[0], None


def read_again(outputs: Sequence[Output], head: int, first: int, last: int) -> int:
    """The checksum of what bytes [first, last) of a file were made from, which are whole tiles; the head is none."""
    total, offset, buffer = 0, head, Buffer()
    for output in outputs:
        kernel, item = output.kernel, output.dtype.itemsize
        if offset < last and offset + output.nbytes > first:
            for a, b in spans(output.shape, rows=bool(kernel and kernel.rows), whole=bool(kernel and kernel.whole)):
                if first <= offset + a * item < last:
                    for number, source in enumerate(output.sources if kernel else output.sources[:1]):
                        values = buffer.of(b - a, source.dtype)
                        source.read(a, b, buffer.bytes((b - a) * source.dtype.itemsize))
                        total += read_checksum(source, values, number, a)
                    if output.patch:
                        total += output.patch(a, b, buffer.of(b - a, output.dtype))
        offset += output.nbytes
    return total


def disk_bytes(files: Mapping[str, Sequence[Output]]) -> int:
    """How much of the disk the files of a job need, in bytes, with room for what lies beside the weights."""
    heads = sum(len(header_bytes({o.name: ("U8", o.shape) for o in each}, {})) for each in files.values())
    return sum(output.nbytes for outputs in files.values() for output in outputs) + heads + (64 << 20)
