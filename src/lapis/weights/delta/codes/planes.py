"""float32 numbers in, byte planes compressed without loss out, and back.

The difference of two 16-bit numbers that lie near each other has few significant bits: of the four bytes of its float32
the lowest two are almost always zero, and the others are far from even. Each byte of a tile's numbers makes a plane,
and each plane is stored in the first of these ways that fits:

    nothing                 all zero
    s, positions, bytes     few are not zero: int32 positions, then the bytes there
    z, deflate              runs and frequencies (zlib's Z_RLE, which is the smallest and the fastest here)
    r, bytes                what does not shrink

Decompressing is bounded by the number of elements, whatever a file says.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lapis.errors import CheckpointError

PLANES = 4
_FEW = 64  # one in so many is stored by its position


def pack(values: Tensor) -> tuple[bytes, list[int]]:
    """A float32 vector as one piece of bytes, and how many of them each of its planes takes."""
    raw = values.contiguous().numpy().view(np.uint8).reshape(-1, PLANES)
    pieces = [_pack_plane(np.ascontiguousarray(raw[:, plane])) for plane in range(PLANES)]
    return b"".join(pieces), [len(piece) for piece in pieces]


def unpack(data: memoryview, sizes: Sequence[int], count: int, into: Tensor) -> None:
    """The reverse of `pack`.

    Args:
        data: The piece of bytes.
        sizes: What each plane takes of it.
        count: Of numbers.
        into: float32, at least `count` long.

    Raises:
        CheckpointError: For bytes that `pack` cannot have made.
    """
    if len(sizes) != PLANES or min(sizes) < 0 or sum(sizes) != len(data):
        raise CheckpointError("planes that do not fill their piece")
    raw = into[:count].numpy().view(np.uint8).reshape(-1, PLANES)
    first = 0
    for plane, size in enumerate(sizes):
        raw[:, plane] = _unpack_plane(data[first : first + size], count)
        first += size


def _pack_plane(plane: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> bytes:
    present = np.count_nonzero(plane)
    if present == 0:
        return b""
    if present * _FEW <= len(plane):
        places = np.flatnonzero(plane).astype("<i4")
        return b"s" + bytes(places.data) + bytes(plane[places].data)
    deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
    packed = deflate.compress(plane.data) + deflate.flush()
    if len(packed) < len(plane):
        return b"z" + packed
    return b"r" + bytes(plane)


def _unpack_plane(data: memoryview, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    if not data:
        return np.zeros(count, np.uint8)
    kind, body = data[:1].tobytes(), data[1:]
    if kind == b"z":
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            plain = inflate.decompress(body, count + 1)
        except zlib.error as error:
            raise CheckpointError(f"a plane that does not inflate ({error})") from None
        if len(plain) != count or not inflate.eof or inflate.unused_data:
            raise CheckpointError(f"a plane of another length than {count:,}")
        return np.frombuffer(plain, np.uint8)
    if kind == b"r" and len(body) == count:
        return np.frombuffer(body, np.uint8)
    if kind == b"s" and len(body) % 5 == 0:
        present = len(body) // 5
        places = np.frombuffer(body[: 4 * present], "<i4")
        if present and (places[0] < 0 or places[-1] >= count or (np.diff(places) <= 0).any()):
            raise CheckpointError("a plane with a position that it has not")
        result = np.zeros(count, np.uint8)
        result[places] = np.frombuffer(body[4 * present :], np.uint8)
        return result
    raise CheckpointError("a plane of an unknown kind")
