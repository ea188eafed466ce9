"""Ctrl-C and SIGTERM as a request to stop: obeyed at once where nothing would be lost, else after the step.

with stop_requests() as request:
    with request.at_once():      # measuring, gradients, rollouts, evaluation: nothing of it is saved
        ...                      # StopSignal is raised here as soon as the signal comes
    update_weights()             # here the signal only sets request.signal
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal(BaseException):
    """A signal came while nothing was done that a checkpoint would hold. Not an Exception, so that no code in between
    takes it for a fault of its own."""


class StopRequest:
    """The signal that asks a run to stop. signal: its name, or None while there is none."""

    signal: str | None = None

    def __init__(self, *, immediate: bool = True) -> None:
        self._allowed, self._immediate = immediate, False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While inside, a signal raises StopSignal; on entry too, where one came before."""
        if not self._allowed:
            yield
            return
        before, self._immediate = self._immediate, True
        try:
            if self.signal:
                raise StopSignal
            yield
        finally:
            self._immediate = before

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.signal:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal = signal.Signals(number).name
        if self._immediate:
            raise StopSignal


@contextmanager
def stop_requests(*, immediate: bool = True) -> Iterator[StopRequest]:
    """While inside, the first SIGINT or SIGTERM is a request to stop; a second SIGINT interrupts.

    In a thread other than the main one signals cannot be caught, and are left alone.

    Args:
        immediate: Whether `at_once` raises. Not in a run of several processes, which must stop at the same place.
    """
    request = StopRequest(immediate=immediate)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
