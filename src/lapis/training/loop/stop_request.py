"""Ctrl-C and SIGTERM as a wish that the loop asks for, so that a run stops between two steps and saves."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Wish:
    """stop: the name of the signal that came, or None."""

    stop: str | None = None


@contextmanager
def interruptible() -> Iterator[Wish]:
    """While inside, the first SIGINT or SIGTERM sets `wish.stop`; a second SIGINT interrupts at once.

    In a thread other than the main one signals cannot be caught, and are left alone.
    """
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if wish.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        wish.stop = signal.Signals(number).name

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
