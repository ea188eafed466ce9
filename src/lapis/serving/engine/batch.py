"""The running batch of one model: rows join when they have a slot and their prompt is read, and leave when they end.

A step reads a piece of one prompt, if one is to be read, and then gives every row its next token, so that a long prompt
holds nobody up for longer than a piece takes. A prompt that begins as one did before takes from there what was read.

Shapes: B rows, T tokens, V vocabulary.
"""

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from lapis.errors import LapisError
from lapis.generation.sampling import choose
from lapis.serving.engine.order import Chunk, ReplyStream
from lapis.serving.engine.row import GREEDY, RunningRow
from lapis.serving.engine.served import ServedModel
from lapis.serving.engine.slots import Slots

PIECE_SECONDS = 0.2  # that reading a piece of a prompt is to take
PIECE = (32, 2048)  # tokens of a piece, at least and at most

Send = Callable[[ReplyStream, Chunk], None]


class RunningBatch:
    """The rows of one model. All methods are for the engine's thread."""

    def __init__(self, served: ServedModel, rows: int, send: Send) -> None:
        self.served = served
        self.slots = Slots(served.model.config, rows, served.context, served.dtype, served.model.embed.weight.device)
        self.waiting: deque[RunningRow] = deque()
        self.rows: list[RunningRow] = []  # row i is in slot i
        self.reading: RunningRow | None = None
        self.read_tokens = self.shared_tokens = self.written_tokens = self.ended = 0
        self._send = send
        self.piece = 64
        # with this kind of rope a token's angle depends on the longest sequence, so none may share a pass
        self._together = served.model.config.rope.kind != "dynamic"

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.rows or self.reading)

    def step(self) -> None:
        """One piece of a prompt, and one token for each row."""
        self._drop()
        if self.reading is None and self.waiting and len(self.rows) < self.slots.rows:
            self._seat(self.waiting.popleft())
        if self.reading is not None:
            self._read(self.reading)
        if self.rows:
            self._write()

    def abandon(self, why: str) -> None:
        """Ends all that is under way with an error; who waits goes on waiting."""
        for row in [*self.rows, *([self.reading] if self.reading else [])]:
            self._send(row.stream, row.fail(why))
        self.rows, self.reading = [], None
        for slot in range(self.slots.rows):
            self.slots.clear(slot)

    def _drop(self) -> None:
        """Takes out whoever is gone."""
        if any(row.gone for row in self.waiting):
            self.waiting = deque(row for row in self.waiting if not row.gone)
        if self.reading is not None and self.reading.gone:
            self.reading = None
        for row in [row for row in self.rows if row.gone]:
            self._leave(row)

    def _seat(self, row: RunningRow) -> None:
        """Gives a row the first free slot, with as much of its prompt as any slot has."""
        tokens, first = row.prompt, len(self.rows)
        shared = [self.slots.shared(slot, tokens) for slot in range(self.slots.rows)]
        best = max(range(self.slots.rows), key=lambda slot: (shared[slot], slot))
        free = range(first, self.slots.rows)
        if best in free and shared[best] * 2 >= len(self.slots.held[best]):
            self.slots.swap(best, first)  # most of what it holds is of use
        else:
            oldest = min(free, key=lambda slot: self.slots.used[slot])
            self.slots.swap(oldest, first)
            source = first if best == oldest else oldest if best == first else best
            if shared[best] and source != first:
                self.slots.copy(source, first, shared[best])
        self.slots.cut(first, shared[best])
        row.slot = first
        if row.number == 0:  # what its siblings share with it has been counted
            row.stream.cached_tokens = shared[best]
        self.shared_tokens += shared[best]
        self.reading = row

    @torch.inference_mode()
    def _read(self, row: RunningRow) -> None:
        """Reads a piece of a prompt; after the last, the row has its first token and joins the others."""
        done = len(self.slots.held[row.slot])
        piece = row.prompt[done : done + self.piece]
        start = time.perf_counter()
        ids_1T = torch.tensor([piece], device=self.served.model.embed.weight.device)
        hidden_1TD = self.served.model.hidden(ids_1T, cache=self.slots.one(row.slot))
        self.slots.append(row.slot, piece)
        self.read_tokens += len(piece)
        if done + len(piece) < len(row.prompt):
            self._fit_piece(len(piece), time.perf_counter() - start)
            return
        logits_1V = self.served.model.head(hidden_1TD[:, -1])
        self.reading = None
        last = len(self.rows)
        self.slots.swap(row.slot, last)  # a row may have left while this one was read
        row.slot = last
        self.rows.append(row)
        self._give([row], logits_1V)

    def _fit_piece(self, tokens: int, seconds: float) -> None:
        fits = int(tokens * PIECE_SECONDS / max(seconds, 1e-6))
        self.piece = min(max(fits, self.piece // 2, PIECE[0]), self.piece * 2, PIECE[1])

    @torch.inference_mode()
    def _write(self) -> None:
        """The next token of each row."""
        model, rows = self.served.model, list(self.rows)
        ids_B1 = torch.tensor([[row.last] for row in rows], device=model.embed.weight.device)
        if len(rows) > 1 and self._together:
            cache = self.slots.first(len(rows))
            hidden_B1D = model.hidden(ids_B1, positions_BT=cache.positions_B1, cache=cache)
        else:
            passes = [model.hidden(ids_B1[i : i + 1], cache=self.slots.one(i)) for i in range(len(rows))]
            hidden_B1D = torch.cat(passes)
        for row in rows:
            self.slots.append(row.slot, [row.last])
        self._give(rows, model.head(hidden_B1D[:, -1]))

    def _give(self, rows: list[RunningRow], logits_BV: Tensor) -> None:
        """Chooses a token for each row, sends what that makes certain, and lets go of rows that end."""
        tokens = self._choose(rows, logits_BV)
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if isinstance(token, str):
                self._send(row.stream, row.fail(token))
                self._leave(row, clear=True)
                continue
            self.written_tokens += 1
            chunk = row.add(token, logits_BV[i : i + 1])
            if chunk is not None:
                self._send(row.stream, chunk)
                if chunk.reason:
                    self._leave(row)

    def _choose(self, rows: list[RunningRow], logits_BV: Tensor) -> list[int | str]:
        """A token for each row, or why there is none."""
        if all(row.greedy for row in rows):
            try:
                return [*choose(logits_BV, GREEDY, []).tolist()]
            except LapisError:
                pass  # one of them has no numbers; which one is seen below
        chosen: list[int | str] = []
        for i, row in enumerate(rows):
            try:
                chosen.append(row.choose(logits_BV[i : i + 1]))
            except LapisError as error:
                chosen.append(str(error))
        return chosen

    def _leave(self, row: RunningRow, clear: bool = False) -> None:
        """Takes a row out; the last one moves to its slot."""
        self.ended += 1
        if clear:
            self.slots.clear(row.slot)
        last = self.rows.pop()
        if last is not row:
            self.slots.swap(row.slot, last.slot)
            self.rows[row.slot], last.slot = last, row.slot
