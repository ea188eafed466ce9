"""The engine: a thread of its own that owns the models, each with its running batch.

    engine = Engine(models, rows=8, queue=64)
    engine.start(loop)                     streams are filled in this event loop
    (stream,) = engine.submit([order])     raises QueueFull
    async for chunk in stream: ...
    result = await engine.compute(name, lambda model: ...)    anything else with a model, between two steps

Knows nothing of HTTP. All public methods are for the event loop's thread; what computes runs in the engine's.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from lapis.errors import LapisError
from lapis.model.threads import settle_threads
from lapis.serving.engine.batch import RunningBatch
from lapis.serving.engine.grammar import Constraint, Grammars
from lapis.serving.engine.order import Chunk, Order, ReplyStream
from lapis.serving.engine.row import RunningRow
from lapis.serving.engine.served import ServedModel

Result = TypeVar("Result")


class QueueFull(LapisError):
    """No more requests can wait. seconds: after which it is worth another try."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {seconds} s")
        self.seconds = seconds


class Engine:
    """Models by name, and the thread that computes with them."""

    def __init__(self, models: Sequence[ServedModel], *, rows: int, queue: int) -> None:
        self.models = {served.name: served for served in models}
        self._queue = queue
        self._outgoing: list[tuple[ReplyStream, Chunk]] = []
        self._batches = {
            served.name: RunningBatch(served, rows, lambda stream, chunk: self._outgoing.append((stream, chunk)))
            for served in models
            if served.replies
        }
        self._grammars: dict[str, Grammars] = {}
        self._inbox: deque[RunningRow] = deque()
        self._work: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._settled = threading.Event()
        self._seconds_each, self._since_end, self._ended = 1.0, 0.0, 0  # from one reply's end to the next one's
        self._thread = threading.Thread(target=self._run, name="lapis-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- for the event loop

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread, and returns when it has measured how many threads are fastest.

        Args:
            loop: Streams are filled in it.
        """
        self._loop = loop
        self._thread.start()
        self._settled.wait()

    def stop(self) -> None:
        """Ends the thread after its current step; what runs is broken off."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def grammars(self, name: str) -> Grammars:
        """The grammars of a model; made when first needed, which takes a moment."""
        if name not in self._grammars:
            served = self.models[name]
            self._grammars[name] = Grammars(served.tokenizer, served.model.config.vocab)
        return self._grammars[name]

    def submit(self, orders: Sequence[Order]) -> list[ReplyStream]:
        """Puts orders into the queue; a stream for each.

        Raises:
            QueueFull: Where as many replies wait as may; then none of the orders is taken.
        """
        self._check_room(sum(order.replies for order in orders))
        streams = [ReplyStream(order) for order in orders]
        rows = [
            RunningRow(stream, i, self.models[stream.order.model], self._constraint(stream.order))
            for stream in streams
            for i in range(stream.order.replies)
        ]
        with self._wake:
            self._inbox += rows
            self._wake.notify()
        return streams

    async def compute(self, name: str, function: Callable[[ServedModel], Result]) -> Result:
        """What a function makes of a model, computed in the engine's thread between two steps.

        Args:
            name: Of the model.
            function: Should take a fraction of a second: replies stand still meanwhile.

        Raises:
            QueueFull: Where as much waits as may.
        """
        self._check_room(1)
        future: Future[Result] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self.models[name]))
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            self._work.append(work)
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def piece(self, name: str) -> int:
        """Tokens of a prompt that the model reads in a fraction of a second."""
        return self._batches[name].piece

    @property
    def waiting(self) -> int:
        """Rows and work that nobody has begun with."""
        return len(self._inbox) + len(self._work) + sum(len(batch.waiting) for batch in self._batches.values())

    def figures(self) -> dict[str, dict[str, int]]:
        """For each model: rows that run and wait, tokens read, shared and written so far."""
        return {
            name: {
                "running": len(batch.rows) + (batch.reading is not None),
                "waiting": len(batch.waiting),
                "read_tokens": batch.read_tokens,
                "shared_tokens": batch.shared_tokens,
                "written_tokens": batch.written_tokens,
            }
            for name, batch in self._batches.items()
        }

    def _constraint(self, order: Order) -> Constraint | None:
        grammar = order.shaping.grammar
        return self.grammars(order.model).constraint(grammar) if grammar else None

    def _check_room(self, more: int) -> None:
        """Raises QueueFull where so many more would be too many. Who finds the engine idle is always taken."""
        waiting, busy = self.waiting, any(batch.busy for batch in self._batches.values())
        free = sum(batch.slots.rows - len(batch.rows) for batch in self._batches.values())
        if (busy or waiting) and waiting + more > self._queue + free:
            raise QueueFull(waiting, max(1, min(60, math.ceil(waiting * self._seconds_each))))

    # -- the engine's own thread

    def _run(self) -> None:
        try:
            settle_threads(next(iter(self.models.values())).model.embed.weight.device)
        finally:
            self._settled.set()
        while self._wait():
            while self._work:
                self._work.popleft()()
            while self._inbox:
                row = self._inbox.popleft()
                self._batches[row.stream.order.model].waiting.append(row)
            start = time.perf_counter()
            for batch in self._batches.values():
                if batch.busy:
                    self._step(batch)
            self._hand_over()
            self._note_time(time.perf_counter() - start)

    def _wait(self) -> bool:
        """Until there is something to do; False where the engine is to end."""
        with self._wake:
            while not (self._stopping or self._inbox or self._work or any(b.busy for b in self._batches.values())):
                self._wake.wait()
            return not self._stopping

    def _step(self, batch: RunningBatch) -> None:
        """A step; where it fails whoever was in it is told, and the engine lives."""
        try:
            batch.step()
        except Exception as error:
            why = batch.served.hides(" ".join(str(error).split())) if isinstance(error, LapisError) else ""
            batch.abandon(why or f"the model could not compute this ({type(error).__name__})")

    def _hand_over(self) -> None:
        """Gives the event loop all chunks of a step at once."""
        if not self._outgoing:
            return
        chunks, self._outgoing = self._outgoing, []
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_deliver, chunks)
        except RuntimeError:  # the loop is closed: there is nobody left to be told
            self._stopping = True

    def _note_time(self, seconds: float) -> None:
        """Follows how long it takes until a place is free, as a moving average."""
        self._since_end += seconds
        ended = sum(batch.ended for batch in self._batches.values())
        if ended > self._ended:
            self._seconds_each += 0.2 * (self._since_end / (ended - self._ended) - self._seconds_each)
            self._ended, self._since_end = ended, 0.0


def _deliver(chunks: list[tuple[ReplyStream, Chunk]]) -> None:
    for stream, chunk in chunks:
        if not stream.cancelled:
            stream.put(chunk)
