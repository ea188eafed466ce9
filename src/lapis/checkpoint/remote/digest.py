"""The sha256 of a file that is read in pieces, in nearly the order in which they lie, and by more than one process.

Bytes are hashed as they are read; what comes early waits, a little of it. The state at each place can be written down
and taken up by a later run, which Python's own hashes cannot do: OpenSSL's are used directly, where Python brings it as
a library. Elsewhere a file that was read in two runs is not checked, and a line says so.
"""

import ctypes
import hashlib
import threading
from collections import OrderedDict
from functools import cache
from typing import Any

WAITING = 16 << 20  # bytes that came early and wait
STATES = 256  # places whose state is remembered

_CONTEXT = 112  # bytes of OpenSSL's SHA256_CTX: 8 words of state, 2 of length, 16 of data, 2 counts


class FileDigest:
    """The sha256 of a file of `size` bytes; at: how many of them, from the first on, it has seen. Thread-safe.

    lost: Why it can never see all of them; "" while it can.
    """

    def __init__(self, size: int) -> None:
        self.at, self.size, self.lost = 0, size, ""
        self._lock = threading.Lock()
        self._hash: Any = _Resumable() if _openssl() else hashlib.sha256()
        self._early: dict[int, bytearray] = {}
        self._states: OrderedDict[int, bytes] = OrderedDict()

    def update(self, first: int, piece: memoryview) -> None:
        """The bytes of the file from `first` on; those that were seen already are passed over."""
        with self._lock:
            if self.lost:
                return
            if first > self.at:
                self._early[first] = bytearray(piece)
                if sum(map(len, self._early.values())) > WAITING:
                    self.lost, self._early = "not all of it was read, or not in its order", {}
                return
            self._take(first, piece)
            while early := [place for place in self._early if place <= self.at]:
                self._take(early[0], memoryview(self._early.pop(early[0])))

    def drop_early(self) -> None:
        """Forgets what came early: samples of here and there, whose ends are no places that a rerun goes on from."""
        with self._lock:
            self._early = {}

    def _take(self, first: int, piece: memoryview) -> None:
        new = piece[self.at - first :]
        if not new:
            return
        self._hash.update(new)
        self.at += len(new)
        if isinstance(self._hash, _Resumable):
            self._states[self.at] = self._hash.state
            if len(self._states) > STATES:
                self._states.popitem(last=False)

    def hexdigest(self) -> str | None:
        """The digest, once all bytes were seen."""
        with self._lock:
            return self._hash.hexdigest() if self.at == self.size and not self.lost else None

    @property
    def why(self) -> str:
        """Why there is no digest."""
        return self.lost or "not all of it was read"

    def state(self, place: int) -> str | None:
        """What `restore` takes, for the first `place` bytes; None where it is not known."""
        with self._lock:
            state = self._states.get(place)
        return state.hex() if state else None

    def restore(self, place: int, state: str | None) -> None:
        """Goes on from what an earlier run has seen; without its state the digest is lost."""
        raw = _bytes(state)
        with self._lock:
            self._early = {}
            if _openssl() and raw is not None and isinstance(place, int) and 0 <= place <= self.size:
                self._hash, self.at = _Resumable(raw), place
            else:
                self.lost = "it was read in two runs"


def _bytes(state: str | None) -> bytes | None:
    try:
        raw = bytes.fromhex(state or "")
    except ValueError:
        return None
    return raw if len(raw) == _CONTEXT else None


class _Resumable:
    """OpenSSL's SHA256_*, whose state is plain memory."""

    def __init__(self, state: bytes | None = None) -> None:
        self._context = ctypes.create_string_buffer(_CONTEXT)
        if state is None:
            _openssl().SHA256_Init(self._context)
        else:
            ctypes.memmove(self._context, state, _CONTEXT)

    @property
    def state(self) -> bytes:
        return self._context.raw

    def update(self, piece: memoryview) -> None:
        if piece.readonly:
            data: Any = bytes(piece)
        else:
            data = (ctypes.c_char * len(piece)).from_buffer(piece)
        _openssl().SHA256_Update(self._context, data, ctypes.c_size_t(len(piece)))

    def hexdigest(self) -> str:
        """Of what was seen so far; the state stays as it is."""
        copy, digest = ctypes.create_string_buffer(self.state, _CONTEXT), ctypes.create_string_buffer(32)
        _openssl().SHA256_Final(digest, copy)
        return digest.raw.hex()


@cache
def _openssl() -> Any:
    """The library that Python's own hashes come from; None where it cannot be reached, or counts otherwise."""
    try:
        import _hashlib

        library = ctypes.CDLL(_hashlib.__file__)
        library.SHA256_Init, library.SHA256_Update, library.SHA256_Final  # noqa: B018
    except (ImportError, OSError, AttributeError):
        return None
    context, digest = ctypes.create_string_buffer(2 * _CONTEXT), ctypes.create_string_buffer(32)
    library.SHA256_Init(context)
    library.SHA256_Update(context, b"abc", ctypes.c_size_t(3))
    if any(context.raw[_CONTEXT:]):
        return None
    library.SHA256_Final(digest, context)
    return library if digest.raw == hashlib.sha256(b"abc").digest() else None
