"""float32 numbers in, byte planes compressed without loss out, and back.

The difference of two 16-bit numbers that lie near each other has few significant bits: of the four bytes of its float32
the lowest two are almost always zero, and the others are far from even. Each byte of a tile's numbers makes a plane,
and each plane is stored in the first of these ways that fits:

    nothing                 all zero
    s, positions, bytes     few are not zero: int32 positions, then the bytes there
    z, deflate              frequencies, and runs where there are many (zlib's Z_HUFFMAN_ONLY and Z_RLE)
    r, bytes                what does not shrink

The upper two planes together take few values, so that one byte says which: the third plane is then nothing, and the
fourth

    j, k, n, values, others, plane      k (one byte) values of two bytes, which the plane, stored as above, numbers from
                                        1; where it has 0 are, in their order, n (uint32) others

Decompressing is bounded by the number of elements, whatever a file says.
"""

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lapis.errors import CheckpointError

PLANES = 4
_FEW = 64  # one in so many is stored by its position
_OTHERS = 16  # at most one in so many is none of the values that a byte can name
_SAMPLE = 4  # one in so many numbers of a large tile is looked at to learn which values are frequent
_KNOWN = 255  # values of the upper two planes that a byte can name
_HEAD = struct.Struct("<cBI")
Plane = np.ndarray[tuple[int], np.dtype[np.uint8]]
Halves = np.ndarray[tuple[int], np.dtype[np.uint16]]


def pack(values: Tensor) -> tuple[bytes, list[int]]:
    """A float32 vector as one piece of bytes, and how many of them each of its planes takes."""
    halves = values.contiguous().numpy().view(np.uint16)
    low, high = (np.ascontiguousarray(halves[place::2]) for place in (0, 1))
    pieces = _pack_low(low)
    joint = _pack_joint(high)
    pieces += [b"", joint] if joint is not None else [_pack_plane(plane) for plane in _bytes_of(high)]
    return b"".join(pieces), [len(piece) for piece in pieces]


def _pack_low(halves: Halves) -> list[bytes]:
    """The lower two planes, which are zero but for a few numbers."""
    there = halves != 0
    if np.count_nonzero(there) * _FEW > len(halves):
        return [_pack_plane(plane) for plane in _bytes_of(halves)]
    places = np.flatnonzero(there)
    planes = _bytes_of(halves[places])
    return [_few(places[plane != 0], plane[plane != 0]) for plane in planes]


def _few(places: np.ndarray[tuple[int], Any], values: Plane) -> bytes:
    """A plane of which a few bytes are not zero."""
    return b"s" + bytes(places.astype("<i4").data) + bytes(values.data) if len(places) else b""


def _bytes_of(halves: Halves) -> tuple[Plane, Plane]:
    """The lower and the upper byte of each number."""
    return (halves & 255).astype(np.uint8), (halves >> 8).astype(np.uint8)


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
    raw = into[:count].numpy()
    planes, first = raw.view(np.uint8).reshape(-1, PLANES), 0
    for plane, size in enumerate(sizes):
        piece = data[first : first + size]
        if piece[:1].tobytes() == b"j" and plane == PLANES - 1 and not sizes[plane - 1]:
            raw.view(np.uint16)[1::2] = _unpack_joint(piece, count)
        else:
            planes[:, plane] = _unpack_plane(piece, count)
        first += size


def _pack_joint(halves: Halves) -> bytes | None:
    """The upper two planes as one; None where they are too varied for that, or hold almost nothing."""
    if np.count_nonzero(halves) * _FEW <= len(halves):
        return None
    counts = np.bincount(halves[:: _SAMPLE if len(halves) > 1 << 16 else 1], minlength=1 << 16)
    known = np.flatnonzero(counts)
    known = np.sort(known[np.argsort(-counts[known], kind="stable")[:_KNOWN]]).astype("<u2")
    numbers = np.zeros(1 << 16, np.uint8)
    numbers[known] = np.arange(1, len(known) + 1)
    codes = numbers.take(halves)
    others = halves[codes == 0]
    if len(others) * _OTHERS > len(halves):
        return None
    head: bytes = _HEAD.pack(b"j", len(known), len(others))
    return b"".join([head, known.tobytes(), others.tobytes(), _pack_plane(codes)])


def _unpack_joint(data: memoryview, count: int) -> Halves:
    if len(data) < _HEAD.size:
        raise CheckpointError("a plane that is cut")
    _, known, others = _HEAD.unpack_from(data)
    first, end = _HEAD.size + 2 * known, _HEAD.size + 2 * (known + others)
    if len(data) < end:
        raise CheckpointError("a plane that is cut")
    values = np.zeros(1 << 8, np.uint16)
    values[1 : known + 1] = np.frombuffer(data[_HEAD.size : first], "<u2")
    codes = _unpack_plane(data[end:], count)
    result = values[codes]
    if others:
        places = np.flatnonzero(codes == 0)
        if len(places) != others:
            raise CheckpointError("planes with another number of rare values than they say")
        result[places] = np.frombuffer(data[first:end], "<u2")
    return result


def _pack_plane(plane: Plane) -> bytes:
    there = plane != 0
    present = np.count_nonzero(there)
    if present == 0:
        return b""
    if present * _FEW <= len(plane):
        places = np.flatnonzero(there)
        return _few(places, plane[places])
    runs = 2 * np.count_nonzero(plane[1:] == plane[:-1]) > len(plane)
    deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE if runs else zlib.Z_HUFFMAN_ONLY)
    packed = deflate.compress(plane.data) + deflate.flush()
    if len(packed) < len(plane):
        return b"z" + packed
    return b"r" + bytes(plane)


def _unpack_plane(data: memoryview, count: int) -> Plane:
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
