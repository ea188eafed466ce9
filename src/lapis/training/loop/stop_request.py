"""Ctrl-C and SIGTERM as a request that the loop reads between two steps, so that a run stops there and saves."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """The signal that asks a run to stop. signal: its name, or None while there is none."""

    signal: str | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While inside, the first SIGINT or SIGTERM sets `signal` of the request; a second SIGINT interrupts at once.

    In a thread other than the main one signals cannot be caught, and are left alone.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number).name

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
