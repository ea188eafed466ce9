"""Standard output and standard error as a command needs them: a full or closed one is no traceback, whatever prints.

What is printed to standard output is what was asked for: where it cannot be shown, the command ends with `NotShown`.
Standard error holds progress and notes: where it cannot take them, work goes on without.
"""

import errno
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from lapis.errors import OutputError


class NotShown(OutputError):
    """Standard output takes nothing more."""

    def __init__(self, error: OSError) -> None:
        if error.errno == errno.EPIPE:
            super().__init__("standard output: its reader has left; the rest was not shown")
        else:
            super().__init__(f"standard output: {error.strerror}; the rest was not shown, send it to another place")


class _Stream(ABC):
    """A text stream with another way of failing. The rest is the stream's own."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._attempt(lambda: self._stream.write(text), len(text))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._flush, 0)

    def _flush(self) -> int:
        self._stream.flush()
        return 0

    @abstractmethod
    def _attempt(self, act: Any, otherwise: int) -> int:
        """What `act` gives; where the stream takes nothing, `otherwise`."""


class CheckedOutput(_Stream):
    """Standard output: raises NotShown, once; what comes after that goes nowhere."""

    _lost = False

    def _attempt(self, act: Any, otherwise: int) -> int:
        if self._lost:
            return otherwise
        try:
            return int(act())
        except OSError as error:
            self._lost = True
            discard(self._stream)
            raise NotShown(error) from None


class QuietErrors(_Stream):
    """Standard error: never raises."""

    def _attempt(self, act: Any, otherwise: int) -> int:
        try:
            return int(act())
        except OSError:
            return otherwise


def discard(stream: IO[str]) -> None:
    """What the stream still holds and is given goes to the null device, so that nothing fails when Python ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def standard_streams() -> Iterator[None]:
    """While inside, printing fails as this file says.

    Raises:
        OutputError: Standard output is closed: before any work, since nobody would see what comes of it.
    """
    closed = [number for number in range(3) if not _is_open(number)]
    for _ in closed:  # else the next file that is opened becomes standard output, and is printed into
        os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None or 1 in closed:
        raise OutputError("standard output is closed; send it to a file, or to /dev/null")
    sys.stdout, sys.stderr = CheckedOutput(sys.stdout), QuietErrors(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
