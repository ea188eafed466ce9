"""A process that is stopped ends the run of all within half a minute, by name; no other waits for it for hours.

Each process counts up a number in the store where they met, and looks at the numbers of the others. One that stands
still is stopped, or its machine is gone: sends and receives to it would wait for as long as a save may take. One that
has died shows at once, as a broken connection (parallel.py). Leaves out: a process that computes for ever.
"""

import atexit
import datetime
import os
import threading
import time
from collections.abc import Callable

from torch._C._distributed_c10d import TCPStore

_BEAT = 2.0  # seconds between two looks
_SILENCE = 20.0  # seconds after which a process counts as stopped
_GRACE = 4.0  # seconds that the others leave to the one that says it
_ENDED = 1 << 40  # added to its number by a process that is done


class _Watch:
    def __init__(self, rank: int, size: int, host: str, port: int) -> None:
        self.rank, self.size = rank, size
        # a connection of its own: the run's may be waiting for something
        self.store = TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=_SILENCE)
        )
        self.ended = threading.Event()
        self.answered = time.monotonic()  # when the store did
        self.beats = threading.Thread(target=self._beat, daemon=True)
        self.guard = threading.Thread(target=self._guard, daemon=True)

    def start(self) -> None:
        self.beats.start()
        self.guard.start()

    def stop(self) -> None:
        """Says that this process is done, so that nobody misses it."""
        if self.ended.is_set():
            return
        self.ended.set()
        self.beats.join(1.0)
        if not self.beats.is_alive():
            try:
                self.store.add(self._key(self.rank), _ENDED)
            except RuntimeError:
                pass  # its holder has ended first

    def _key(self, rank: int) -> str:
        return f"lapis/alive/{rank}"

    def _beat(self) -> None:
        numbers = [-1] * self.size
        moved = [time.monotonic()] * self.size
        looked = time.monotonic()
        try:
            while not self.ended.wait(_BEAT):
                self.store.add(self._key(self.rank), 1)
                now = time.monotonic()
                if now - looked > _SILENCE / 2:  # this one was stopped, all of them perhaps (Ctrl-Z)
                    moved = [now] * self.size
                looked = now
                for rank in range(self.size):
                    number = self.store.add(self._key(rank), 0)
                    if number != numbers[rank] or number >= _ENDED:
                        numbers[rank], moved[rank] = number, now
                self.answered = time.monotonic()
                silent = [rank for rank in range(self.size) if now - moved[rank] > _SILENCE]
                if silent:
                    self._end(silent)
        except RuntimeError:
            self.ended.set()  # the store's holder has ended, which shows in all connections to it

    def _guard(self) -> None:
        """The store itself is silent: the first process holds it, where torchrun does not."""
        looked = time.monotonic()
        while not self.ended.wait(_BEAT):
            now = time.monotonic()
            if now - looked > _SILENCE / 2:
                self.answered = now
            looked = now
            if now - self.answered > _SILENCE:
                self._end([0])

    def _end(self, silent: list[int]) -> None:
        names = ", ".join(map(str, silent))
        if self.rank == min(rank for rank in range(self.size) if rank not in silent):
            line = (
                f"lapis: train: rank {names} has not answered for {_SILENCE:.0f} seconds: it is stopped, or its "
                "machine is gone; end it, and run the same command again to go on from the last checkpoint\n"
            )
            os.write(2, line.encode())
        else:
            time.sleep(_GRACE)
        os._exit(1)  # the main thread waits where nothing can wake it


def watch_processes(rank: int, size: int, host: str, port: int) -> Callable[[], None]:
    """Begins to watch the processes of a run, which have met.

    Args:
        rank: This process'.
        size: How many there are.
        host: Where the store is.
        port: Of the store.

    Returns:
        What ends the watch; it is also called when Python ends.
    """
    watch = _Watch(rank, size, host, port)
    watch.start()
    atexit.register(watch.stop)
    return watch.stop
