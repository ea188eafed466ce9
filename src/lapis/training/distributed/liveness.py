"""A process that is stopped, missing, or computes without an end ends the run of all, by name; none waits for hours.

Each process counts up a number in the store where they met, and looks at the numbers of the others. One that stands
still is stopped, or its machine is gone. Beside it each process tells how often it came a step forward (a block of the
model, a message, a reward, a megabyte read or written) and whether it waits for the others: one that does not wait, and
comes no step forward for `patience()` seconds while others wait for it, computes without an end; where nobody set that
time, a run whose pauses are long by nature gets longer. A process that has died shows at once, as a broken connection
(parallel.py).
"""

import atexit
import datetime
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from lapis.config import environment_number
from lapis.errors import TrainingError
from lapis.training.distributed.forward import place, step_forward, waits

PATIENCE = "LAPIS_PATIENCE"  # in the environment: seconds, of which the next line is the default
_PATIENCE = 600
_BEAT = 2.0  # seconds between two looks
_SILENCE = 20.0  # seconds after which a process counts as stopped
_ANSWER = 60.0  # seconds in which the store answers, where something listens at its port
_NOTE_AFTER = 5.0  # seconds after which it is told who is waited for at the start
_LONGEST = 20  # times the longest pause between two steps forward so far is none without an end, if no time was set
_GRACE = 4.0  # seconds that the others leave to the one that says it
_FIRST = 0.5  # seconds that they leave to the first process, to say what would end all of them
_OVER = "over"  # in the store: one process has ended the run, and says why
_TELLERS = "tellers"  # in the store: how many processes would say why
_ENDED = 1 << 40  # added to its number by a process that is done
_MEGABYTE = 1_000_000


def patience() -> int:
    """Seconds that a process may compute without a step forward while others wait, or be missing at the start."""
    return max(1, environment_number(PATIENCE, _PATIENCE))


def meet(rank: int, size: int, host: str, port: int) -> tuple[Store, int]:
    """Where all processes of a run have met.

    The store may have served an earlier round of them: torchrun --max-restarts keeps it, and the count of restarts that
    it gives differs between machines. So the first process numbers the round, and tells the number to each process that
    shows itself with a name that no other ever had; what an earlier round left there has another number.

    Args:
        rank: This process'.
        size: How many there are.
        host: Where the store is.
        port: Of the store.

    Returns:
        The store for their messages, and the number of the round.

    Raises:
        TrainingError: In the first process that is there, with the ranks that did not come in `patience()` seconds, or
            where another program has the port; the others end without a word. RuntimeError where the store cannot be
            made.
    """
    end, holds = time.monotonic() + patience(), rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    plain, turn, why = None, None, _missing([0], size, host, port)
    if holds:
        plain = _store(host, port, patience(), True)
    elif _somebody_listens(host, port, end):
        plain = _answering_store(host, port, min(patience(), _ANSWER))
        if plain is None:
            why = (
                f"train: {host}:{port}: what listens there is not the first process of this run: the port is in use; "
                "give torchrun another port: --master-port N"
            )
    if plain is not None:
        turn = plain.add("lapis/rounds", 1) if rank == 0 else _round_of_first(plain, rank, size, end)
    if plain is None or turn is None:
        if rank > 1 and os.environ.get("LOCAL_RANK", "0") != "0":  # one of each machine says it
            raise SystemExit(1)
        raise TrainingError(why)
    store = PrefixStore(_prefix(turn), plain)
    here = [f"at/{other}" for other in range(size)]
    store.set(here[rank], place())
    next_note = time.monotonic() + _NOTE_AFTER
    while absent := [other for other in range(size) if not store.check([here[other]])]:
        now = time.monotonic()
        first = rank == min(other for other in range(size) if other not in absent)
        if now > end:
            if first:
                raise TrainingError(_missing(absent, size, host, port))
            time.sleep(_GRACE)  # the store may be that one's
            raise SystemExit(1)
        if rank == 0:
            _tell_round(plain, absent, turn)
        if first and now > next_note:
            _note_waiting(absent, size, end - now)
            next_note = now + max(60.0, _NOTE_AFTER)
        time.sleep(0.05)
    return store, turn


def _prefix(turn: int) -> str:
    """Of the keys of a round in the store."""
    return f"lapis/{turn}"


def _tell_round(store: Store, ranks: list[int], turn: int) -> None:
    """The first process answers whoever has come. The names of an earlier round's may be among them: nobody listens."""
    for key in [f"lapis/came/{rank}" for rank in ranks]:
        if store.check([key]):
            store.set(f"lapis/round/{store.get(key).decode()}", str(turn))


def _round_of_first(store: Store, rank: int, size: int, end: float) -> int | None:
    """The number of the round that the first process tells this one; None where it does not by `end`."""
    name, next_note = uuid.uuid4().hex, time.monotonic() + _NOTE_AFTER
    store.set(f"lapis/came/{rank}", name)
    while not store.check([answer := f"lapis/round/{name}"]):
        now = time.monotonic()
        if now > end:
            return None
        if rank == 1 and now > next_note:
            _note_waiting([0], size, end - now)
            next_note = now + max(60.0, _NOTE_AFTER)
        time.sleep(0.05)
    return int(store.get(answer))


def _note_waiting(ranks: list[int], size: int, seconds: float) -> None:
    os.write(2, f"train: waiting for rank {_names(ranks)} of {size}, {seconds:.0f} seconds more\n".encode())


def _somebody_listens(host: str, port: int, end: float) -> bool:
    """Waits until something listens there. False where nothing does by `end` (of time.monotonic)."""
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())).close()
            return True
        except OSError:
            time.sleep(0.1)
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, nothing comes to standard error: torch prints its own stack before it raises what is told in a line."""
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _answering_store(host: str, port: int, seconds: float) -> Store | None:
    """The same as `_store`, for a port that somebody listens at; None where that is another program."""
    made: list[Store] = []

    def connect() -> None:
        with suppress(RuntimeError):
            made.append(_store(host, port, seconds, False))

    with _quiet():
        thread = threading.Thread(target=connect, daemon=True)  # torch waits for ever for one that is silent
        thread.start()
        thread.join(seconds)
    return made[0] if made else None


def _store(host: str, port: int, seconds: float, holds: bool) -> Store:
    """A connection to the store of this run. holds: this process has the store."""
    return TCPStore(
        host, port, is_master=holds, wait_for_workers=False, timeout=datetime.timedelta(seconds=seconds),
        multi_tenant=True,
    )  # fmt: skip


def _missing(ranks: list[int], size: int, host: str, port: int) -> str:
    return (
        f"train: rank {_names(ranks)} of {size} has not come to {host}:{port} in {patience()} seconds; start all of "
        f"them (the same torchrun command on every machine), or give them more time with {PATIENCE}=SECONDS"
    )


def _names(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


class ProcessWatch:
    """Over the processes of a run, from one of them. `start` begins it."""

    def __init__(self, rank: int, size: int, host: str, port: int, turn: int) -> None:
        self.rank, self.size = rank, size
        plain = _store(host, port, _SILENCE, False)  # the run's own connection may be waiting for something
        self.store = PrefixStore(_prefix(turn), plain)
        self.ended = threading.Event()
        self.left = threading.Event()  # whether this process has left the run
        self.answered = time.monotonic()  # when the store did
        self.broken = False  # whether a connection to another process is
        self.tells = False  # whether this process says why the run has ended
        self.last_good: Callable[[], Path | None] = lambda: None  # the newest checkpoint
        self.patience, self.forgiving = patience(), PATIENCE not in os.environ
        self.beats = threading.Thread(target=self._beat, daemon=True)
        self.guard = threading.Thread(target=self._guard, daemon=True)

    def start(self) -> None:
        self.beats.start()
        self.guard.start()

    def stop(self) -> None:
        """Says that this process is done, so that nobody misses it."""
        self.left.set()
        if self.ended.is_set():
            return
        self.ended.set()
        self.beats.join(1.0)
        if not self.beats.is_alive():
            try:
                self.store.add(self._key(self.rank), _ENDED)
            except RuntimeError:
                pass  # its holder has ended first

    def all_know(self) -> None:
        """Ends the watch without a word: every process has heard in one message that the run ends."""
        self.broken = True
        self.left.set()
        self.ended.set()

    def end_others(self) -> bool:
        """Has the other processes end without a word, since this one says why, and waits for them.

        The first one, which writes, is left to notice it as a broken connection, so that it can put things in order.
        Returns whether this process is the one that says it: where several fail alike, only the first of them does.
        """
        if self.broken:
            return True  # all have noticed by themselves
        if self.rank:
            time.sleep(_FIRST)
        others, until = {*range(1, self.size)} - {self.rank}, time.monotonic() + 2 * _BEAT
        try:
            self.tells = self.tells or self.store.add(_TELLERS, 1) == 1
            if self.tells:
                self.store.set(_OVER, str(self.rank))
                while time.monotonic() < until and any(self.store.add(self._key(rank), 0) < _ENDED for rank in others):
                    time.sleep(0.02)
        except RuntimeError:
            return True  # the store's holder has ended first
        return self.tells

    def is_over(self) -> bool:
        """Whether another process has ended the run, and says why."""
        try:
            return self.store.check([_OVER])
        except RuntimeError:
            return False

    def is_first_alive(self) -> bool:
        """Whether every process before this one has died; looks twice, with two beats between."""
        try:
            before = [self.store.add(self._key(rank), 0) for rank in range(self.rank)]
            time.sleep(2 * _BEAT + 0.5)
            return before == [self.store.add(self._key(rank), 0) for rank in range(self.rank)]
        except RuntimeError:  # the first process held the store
            return self.rank == 1

    def again(self) -> str:
        """How the run goes on."""
        newest = self.last_good()
        return f"run the same command again to go on from the last checkpoint{f', {newest}' if newest else ''}"

    def _key(self, rank: int) -> str:
        return f"alive/{rank}"

    def _beat(self) -> None:
        ranks = range(self.size)
        numbers, places = [-1] * self.size, [""] * self.size
        moved, forward, longest = ([time.monotonic()] * self.size, [time.monotonic()] * self.size, [0.0] * self.size)
        looked, known = time.monotonic(), _bytes_moved()
        try:
            while not self.ended.wait(_BEAT):
                if (amount := _bytes_moved()) > known + _MEGABYTE:
                    known = amount
                    step_forward()
                self.store.add(self._key(self.rank), 1)
                self.store.set(f"at/{self.rank}", place())
                now = time.monotonic()
                if now - looked > _SILENCE / 2:  # this one was stopped, all of them perhaps (Ctrl-Z)
                    moved, forward = [now] * self.size, [now] * self.size
                looked = now
                announced = [each.decode() for each in self.store.multi_get([f"at/{rank}" for rank in ranks])]
                for rank in ranks:
                    number = self.store.add(self._key(rank), 0)
                    if number != numbers[rank] or number >= _ENDED:
                        numbers[rank], moved[rank] = number, now
                    if announced[rank] != places[rank] or number >= _ENDED:
                        longest[rank] = max(longest[rank], 0.0 if waits(places[rank]) else now - forward[rank])
                        places[rank], forward[rank] = announced[rank], now
                self.answered = time.monotonic()
                if self.rank and not self.tells and self.store.check([_OVER]):
                    self.store.add(self._key(self.rank), _ENDED)
                    os._exit(1)
                silent = [rank for rank in ranks if now - moved[rank] > _SILENCE]
                if silent:
                    self._end(silent, f"has not answered for {_SILENCE:.0f} seconds: it is stopped, or its machine is "
                              "gone; end it, and")  # fmt: skip
                waiting = [rank for rank in ranks if waits(places[rank])]
                usual = [_LONGEST * pause if self.forgiving else 0.0 for pause in longest]
                stuck = [
                    rank for rank in ranks
                    if rank not in waiting and now - forward[rank] > max(self.patience, usual[rank])
                ]  # fmt: skip
                if stuck and waiting:
                    seconds = min(now - forward[rank] for rank in stuck)
                    self._end(stuck, f"computes, and has come no step forward for {seconds:.0f} seconds, while rank "
                              f"{_names(waiting)} waits for it; see what it computes (a reward, a source of data), "
                              f"give it more time with {PATIENCE}=SECONDS, or")  # fmt: skip
        except RuntimeError:
            self.ended.set()  # the store's holder has ended, which shows in all connections to it,
            if not self.left.wait(self.patience):  # to a process that comes to use one
                os._exit(1)

    def _guard(self) -> None:
        """The store itself is silent: the first process holds it, where torchrun does not."""
        looked = time.monotonic()
        while not self.ended.wait(_BEAT):
            now = time.monotonic()
            if now - looked > _SILENCE / 2:
                self.answered = now
            looked = now
            if now - self.answered > _SILENCE:
                self._end([0], f"has not answered for {_SILENCE:.0f} seconds: it is stopped, or its machine is gone; "
                          "end it, and")  # fmt: skip

    def _end(self, ranks: list[int], why: str) -> None:
        if self.rank == min(rank for rank in range(self.size) if rank not in ranks):
            os.write(2, f"lapis: train: rank {_names(ranks)} {why} {self.again()}\n".encode())
        else:
            time.sleep(_GRACE)
        os._exit(1)  # the main thread waits where nothing can wake it


def _bytes_moved() -> int:
    """Bytes that this process has read and written in all; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar:", "wchar:")))
    except (OSError, ValueError, IndexError):
        return 0


def watch_processes(rank: int, size: int, host: str, port: int, turn: int) -> ProcessWatch:
    """Begins to watch the processes of a run, which have met.

    Args:
        rank: This process'.
        size: How many there are.
        host: Where the store is.
        port: Of the store.
        turn: The round in which they met.

    Returns:
        The watch, which ends with `stop`, or when Python ends.
    """
    watch = ProcessWatch(rank, size, host, port, turn)
    watch.start()
    atexit.register(watch.stop)
    return watch
