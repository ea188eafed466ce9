"""How the difference of one tensor is stored: the parts that it becomes, and the way there and back, span by span.

A code is known by a name, which the file's description gives for each tensor:

    planes      every bit of the float32 difference, compressed (planes.py); part "sizes": of each tile's planes
    blocks8     8 bits for a number, and a factor for 64 (bits.py); part "scales"
    blocks4     4 bits for a number, the same
    signs       1 bit for a number, and a factor for a row; part "scales"
    low-rank    parts "A" [rank, columns] and "B" [rows, rank], whose product B A it is (factors.py); no payload
    plain       float32: vectors and scalars, which are small

The payload is a part whose name is empty. Leaves out: files (file.py, writing.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from lapis.errors import CheckpointError
from lapis.weights.delta.codes.bits import BLOCK, block_bytes, from_blocks, from_signs, to_blocks, to_signs
from lapis.weights.delta.codes.factors import low_rank
from lapis.weights.delta.codes.planes import PLANES, pack, unpack
from lapis.weights.engine.sources import as_bytes, columns_of
from lapis.weights.engine.tiles import TILE, spans

Shape = tuple[int, ...]
Parts = dict[str, tuple[str, Shape | None]]
"""Part -> dtype by its name in safetensors, and shape; None: one dimension, as long as it turns out."""

Read = Callable[[str, int, int], Tensor]
"""read(part, first, last): elements of a part, flattened."""


@dataclass(frozen=True)
class Encoded:
    """What one span becomes: bytes for each part, and the numbers that these stand for (None: the span itself)."""

    parts: dict[str, bytes | memoryview]
    decoded: Tensor | None = None


class Code(Protocol):
    """One way of storing a float32 tensor."""

    @property
    def name(self) -> str:
        """As a file's description has it."""
        ...

    def parts(self, shape: Shape) -> Parts:
        """In the order in which they lie in the file."""
        ...

    def spans(self, shape: Shape) -> list[tuple[int, int]]:
        """The pieces of the flattened tensor that are encoded one by one."""
        ...

    def encode(self, values: Tensor, shape: Shape, name: str) -> Encoded:
        """One span."""
        ...

    def decode(self, read: Read, shape: Shape, first: int, last: int) -> Tensor:
        """Elements [first, last) of the flattened tensor, as float32."""
        ...


@dataclass(frozen=True)
class Planes:
    """Without loss."""

    name: str = "planes"

    def parts(self, shape: Shape) -> Parts:
        return {"": ("U8", None), "sizes": ("I32", (_tiles(shape), PLANES))}

    def spans(self, shape: Shape) -> list[tuple[int, int]]:
        return spans(shape)

    def encode(self, values: Tensor, shape: Shape, name: str) -> Encoded:
        data, sizes = pack(values)
        return Encoded({"": data, "sizes": as_bytes(torch.tensor(sizes, dtype=torch.int32))})

    def decode(self, read: Read, shape: Shape, first: int, last: int) -> Tensor:
        result, count = torch.empty(last - first), prod(shape)
        sizes = read("sizes", 0, _tiles(shape) * PLANES).view(-1, PLANES).tolist()
        if any(min(row) < 0 for row in sizes):
            raise CheckpointError("planes of a negative size")
        ends = [0, *accumulate(map(sum, sizes))]
        for tile in range(first // TILE, -(-last // TILE)):
            start, end = tile * TILE, min((tile + 1) * TILE, count)
            data = as_bytes(read("", ends[tile], ends[tile + 1]))
            if first <= start and end <= last:
                unpack(data, sizes[tile], end - start, result[start - first : end - first])
            else:
                whole = torch.empty(end - start)
                unpack(data, sizes[tile], end - start, whole)
                begin, stop = max(first, start), min(last, end)
                result[begin - first : stop - first] = whole[begin - start : stop - start]
        return result


@dataclass(frozen=True)
class Blocks:
    """bits: 4 or 8 for a number."""

    bits: int

    @property
    def name(self) -> str:
        return f"blocks{self.bits}"

    def parts(self, shape: Shape) -> Parts:
        count = prod(shape)
        return {"": ("U8", (block_bytes(count, self.bits),)), "scales": ("BF16", (-(-count // BLOCK),))}

    def spans(self, shape: Shape) -> list[tuple[int, int]]:
        return spans(shape)

    def encode(self, values: Tensor, shape: Shape, name: str) -> Encoded:
        codes, factors = to_blocks(values, self.bits)
        decoded = from_blocks(codes, factors, len(values), self.bits)
        return Encoded({"": as_bytes(codes.contiguous()), "scales": as_bytes(factors)}, decoded)

    def decode(self, read: Read, shape: Shape, first: int, last: int) -> Tensor:
        start, end = first // BLOCK, -(-last // BLOCK)
        stop = min(end * BLOCK, prod(shape))
        codes = read("", start * BLOCK * self.bits // 8, block_bytes(stop, self.bits))
        values = from_blocks(codes, read("scales", start, end), stop - start * BLOCK, self.bits)
        return values[first - start * BLOCK : last - start * BLOCK]


@dataclass(frozen=True)
class Signs:
    """One bit for a number."""

    name: str = "signs"

    def parts(self, shape: Shape) -> Parts:
        return {"": ("U8", (shape[0], -(-columns_of(shape) // 8))), "scales": ("F32", (shape[0],))}

    def spans(self, shape: Shape) -> list[tuple[int, int]]:
        return spans(shape, rows=True)

    def encode(self, values: Tensor, shape: Shape, name: str) -> Encoded:
        columns = columns_of(shape)
        bits, factors = to_signs(values.view(-1, columns))
        decoded = from_signs(bits, factors, columns).view(-1)
        return Encoded({"": as_bytes(bits.contiguous()), "scales": as_bytes(factors)}, decoded)

    def decode(self, read: Read, shape: Shape, first: int, last: int) -> Tensor:
        columns = columns_of(shape)
        start, end, width = first // columns, -(-last // columns), -(-columns // 8)
        bits = read("", start * width, end * width).view(-1, width)
        values = from_signs(bits, read("scales", start, end), columns).view(-1)
        return values[first - start * columns : last - start * columns]


@dataclass(frozen=True)
class Factors:
    """rank: At most; a smaller matrix has less. dtype: of the two factors."""

    rank: int
    dtype: str
    name: str = "low-rank"

    def parts(self, shape: Shape) -> Parts:
        rank = min(self.rank, *shape)
        return {"A": (self.dtype, (rank, shape[1])), "B": (self.dtype, (shape[0], rank))}

    def spans(self, shape: Shape) -> list[tuple[int, int]]:
        return spans(shape, whole=True)

    def encode(self, values: Tensor, shape: Shape, name: str) -> Encoded:
        stored = torch.bfloat16 if self.dtype == "BF16" else torch.float32
        b_OK, a_KI = (factor.to(stored).contiguous() for factor in low_rank(values.view(shape), self.rank, name))
        return Encoded({"A": as_bytes(a_KI), "B": as_bytes(b_OK)}, (b_OK.float() @ a_KI.float()).view(-1))

    def decode(self, read: Read, shape: Shape, first: int, last: int) -> Tensor:
        rank, columns = min(self.rank, *shape), shape[1]
        start, end = first // columns, -(-last // columns)
        a_KI = read("A", 0, rank * columns).float().view(rank, columns)
        b_RK = read("B", start * rank, end * rank).float().view(-1, rank)
        return (b_RK @ a_KI).view(-1)[first - start * columns : last - start * columns]


@dataclass(frozen=True)
class Plain:
    """float32 as it is."""

    name: str = "plain"

    def parts(self, shape: Shape) -> Parts:
        return {"": ("F32", shape)}

    def spans(self, shape: Shape) -> list[tuple[int, int]]:
        return spans(shape)

    def encode(self, values: Tensor, shape: Shape, name: str) -> Encoded:
        return Encoded({"": as_bytes(values.contiguous())})

    def decode(self, read: Read, shape: Shape, first: int, last: int) -> Tensor:
        return read("", first, last)


def _tiles(shape: Shape) -> int:
    """How many tiles `spans` cuts a tensor into; a number, for the shape may be a hostile file's."""
    return -(-prod(shape) // TILE)


def code_for(bits: str, rank: int | None, dtype: str, shape: Shape) -> Code:
    """What a tensor is stored by.

    Args:
        bits: "exact", "8", "4" or "1".
        rank: In place of bits.
        dtype: Of the chat model's tensor, by its name in safetensors.
        shape: Of the difference.
    """
    if bits == "exact" and rank is None:
        return Planes()
    if len(shape) < 2 or prod(shape) == 0 or (rank is not None and len(shape) > 2):
        return Plain()
    if rank is not None:
        return Factors(rank, "BF16" if dtype in ("BF16", "F16") else "F32")
    return Signs() if bits == "1" else Blocks(int(bits))


def code_named(name: str, shape: Sequence[int], parts: dict[str, tuple[str, Shape]]) -> Code | None:
    """The code that a file gives for a tensor; None where there is none of that name for such a shape.

    Args:
        name: Of the code.
        shape: Of the difference.
        parts: What the file holds of the tensor.
    """
    if name in ("signs", "low-rank") and (len(shape) < 2 or 0 in shape):
        return None
    if name == "low-rank":
        dtype, factor = parts.get("A", ("", ()))
        return Factors(factor[0], dtype) if len(shape) == 2 and len(factor) == 2 and factor[0] > 0 else None
    known: dict[str, Code] = {code.name: code for code in (Planes(), Blocks(8), Blocks(4), Signs(), Plain())}
    return known.get(name)
