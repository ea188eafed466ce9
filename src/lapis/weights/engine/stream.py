"""The engine: tensors in, tensors out, tile by tile, in memory that does not grow with the model.

An output file's header is known before any weight is read, so the file is laid out in full and filled in order. A few
threads each take the next tile: read the inputs' bytes into buffers of their own, widen to float32, compute, round once
to the output's dtype. Finished tiles are hashed and written in order while they are still in the cache, which gives the
manifest's sha256 and the journal's checkpoints for one pass. A method that needs figures of the whole tensor (a norm, a
threshold) declares passes; these run over the same tiles before its result does.

Memory: THREADS x TILE x (4 x inputs + 20) bytes, whatever the model's size; a row longer than a tile makes the tile
one row. Methods with passes keep up to twice HOLD bytes of inputs besides, so that these are read once; from servers
AHEAD bytes are on their way (ahead.py). Leaves out: what is computed, and where to write (checkpoint/commit.py).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, prod
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from lapis.checkpoint.tensor_file import dtype_name, finite, header_bytes
from lapis.errors import CheckpointError
from lapis.weights.engine.ahead import Reads, ahead
from lapis.weights.engine.downloads import Downloads
from lapis.weights.engine.journal import Crc32, Journal, Progress
from lapis.weights.engine.outputs import Account, Figures, Kernel, Output, read_again
from lapis.weights.engine.sources import COMPUTABLE
from lapis.weights.engine.tiles import THREADS, Buffer, Held, Reader, Tile, dot, one_thread_each, read_checksum, spans
from lapis.weights.engine.writer import Writer
from lapis.wording import format_count

__all__ = ["Account", "Figures", "Kernel", "Output", "stream"]

RECORD = 64 << 20  # bytes of output between two lines of the journal
METADATA = {"format": "pt"}  # of the files, unless the caller has another
HOLD = 256 << 20  # bytes of one tensor's inputs that are kept between its passes; larger ones are read in each


def stream(
    files: dict[str, Sequence[Output]],
    folder: Path,
    journal: Journal,
    *,
    metadata: dict[str, str] | None = None,
    allow_nonfinite: bool = False,
    every_tile: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Account:
    """Writes safetensors files (name -> tensors in order) into `folder`, going on from the journal.

    every_tile: Each tile is written and noted at once, so that none is fetched again after a kill.
    progress(done, total) is called in bytes of output, and its `source(role, done, total)`, where it has that, in bytes
    of each source on a server. Raises CheckpointError for NaN or Inf in what is read or written, unless
    allow_nonfinite, which counts them.
    """
    run = _Streaming(files, folder, journal, metadata or METADATA, allow_nonfinite, every_tile, progress)
    with one_thread_each():
        return run()


def stream_part(
    file: str,
    outputs: Sequence[Output],
    folder: Path,
    at: int,
    *,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Account, int]:
    """Writes tensors into a file that is laid out, from byte `at` on. Returns what was done, and the bytes' CRC-32."""
    run = _Streaming({file: outputs}, folder, None, METADATA, allow_nonfinite, False, progress, at)
    with one_thread_each():
        account = run()
    return account, int(account.digests[file], 16)


@dataclass
class _File:
    """An output file on its way. pending: tiles that are computed but wait for an earlier one."""

    name: str
    writer: Writer
    start: int
    progress: Progress
    pending: dict[int, tuple["_Task", "Buffer", Figures, int]] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    recorded: int = 0
    end: int = 0


@dataclass
class _Sweep:
    """A tensor's state between its passes: partial results, and how many tiles a pass still lacks."""

    partials: list[list[Any]]
    left: list[int]
    ready: list[threading.Event]
    held: Held | None
    state: Any = None


@dataclass(frozen=True)
class _Task:
    output: Output
    first: int
    last: int
    file: _File
    offset: int  # in the file
    sweep: _Sweep | None
    step: int  # the pass; -1 computes and writes
    number: int

    @property
    def size(self) -> int:
        """Bytes of output."""
        return (self.last - self.first) * self.output.dtype.itemsize

    def reads(self) -> Reads:
        """What of its sources was not read and held by an earlier pass."""
        if self.sweep is not None and self.sweep.held is not None and self.step != 0:
            return ()
        sources = self.output.sources if self.output.kernel else self.output.sources[:1]
        return [(source, self.first, self.last) for source in sources]


class _Streaming:
    def __init__(
        self,
        files: dict[str, Sequence[Output]],
        folder: Path,
        journal: Journal | None,
        metadata: dict[str, str],
        allow_nonfinite: bool,
        every_tile: bool,
        progress: Callable[[int, int], None] | None,
        at: int | None = None,
    ) -> None:
        """journal, at: one of the two. at: where the tensors of the one file begin, which has its header already."""
        self.journal, self.allow_nonfinite, self.report = journal, allow_nonfinite, progress
        self.every_tile, self.downloads = every_tile, Downloads(getattr(progress, "source", None))
        self.lock = threading.Lock()
        self.failure: BaseException | None = None
        self.free: SimpleQueue[Buffer] = SimpleQueue()
        self.spare: SimpleQueue[Buffer] = SimpleQueue()
        self.figures = {output.name: Figures() for outputs in files.values() for output in outputs}
        self.account = Account(self.figures, {}, {})
        self.files = [self._prepare(name, outputs, folder, metadata, at) for name, outputs in files.items()]
        self.total = sum(file.end for file in self.files) - (at or 0)
        self.done = sum(file.progress.done for file in self.files) - (at or 0)
        if journal is not None:
            journal.settle()
            self.downloads.restore(journal.digests)
            self.account.bytes_resumed = journal.resumed_bytes
        self.outputs = list(files.values())
        self.tasks = ahead(self._tasks(), _Task.reads)

    def __call__(self) -> Account:
        workers: list[threading.Thread] = []
        for _ in range(3 * THREADS):
            self.free.put(Buffer())
        try:
            for _ in range(THREADS):
                worker = threading.Thread(target=self._work, daemon=True)
                worker.start()
                workers.append(worker)
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.2)
        except BaseException as error:  # Ctrl-C: let the threads leave what they write whole
            self.failure = self.failure or error
            for worker in workers:
                worker.join()
        finally:
            self.downloads.forget()
            for file in self.files:
                file.writer.close()
                if self.journal and file.progress.done > file.recorded:  # stopped: a rerun goes on from the last tile
                    self.journal.record(file.name, file.progress, file.changed)
        if self.failure:
            raise self.failure
        self.account.digests = {file.name: file.progress.sha256.hexdigest() for file in self.files}
        self.account.sizes = {file.name: file.end for file in self.files}
        self.account.findings = self.downloads.findings()
        return self.account

    def _prepare(
        self, name: str, outputs: Sequence[Output], folder: Path, metadata: dict[str, str], at: int | None
    ) -> _File:
        """Lays the file out in full, or finds how far an earlier run came."""
        if self.journal is None:
            assert at is not None
            end = at + sum(output.nbytes for output in outputs)
            writer = Writer(folder / name, end, at, within=True)
            return _File(name, writer, at, Progress(at, Crc32()), recorded=at, end=end)
        head = header_bytes({o.name: (dtype_name(o.dtype), o.shape) for o in outputs}, metadata)
        progress = self.journal.progress(name, partial(read_again, outputs, len(head)))
        end = len(head) + sum(output.nbytes for output in outputs)
        blocks = self.journal.blocks(name) if self.every_tile else None
        writer = Writer(folder / name, end, progress.done, blocks=blocks)
        offset = len(head)
        for output in outputs:
            left = offset + output.nbytes - max(offset, progress.done)
            offset += output.nbytes
            self.downloads.add(output, max(0, left) / max(1, output.nbytes))
        if progress.done == 0:
            writer.write(head)
            progress.sha256.update(head)
            progress.done = len(head)
        for tensor, numbers in progress.figures.items():
            self.figures[tensor] = Figures(*numbers)
        return _File(name, writer, len(head), progress, recorded=progress.done, end=end)

    def _tasks(self) -> Iterator[_Task]:
        """Every tile in the order of the files; a tensor's passes run before the tensor ahead of it is computed."""
        waiting: list[_Task] = []
        for file, outputs in zip(self.files, self.outputs, strict=True):
            offset = file.start
            for output in outputs:
                passes, writes = self._tensor_tasks(file, output, offset)
                offset += output.nbytes
                yield from passes
                yield from waiting
                waiting = writes
        yield from waiting

    def _tensor_tasks(self, file: _File, output: Output, offset: int) -> tuple[list[_Task], list[_Task]]:
        kernel, item = output.kernel, output.dtype.itemsize
        every = spans(output.shape, rows=bool(kernel and kernel.rows), whole=bool(kernel and kernel.whole))
        todo = [span for span in every if offset + span[1] * item > file.progress.done]
        steps = len(kernel.passes) if kernel and todo else 0
        sweep = None
        if steps:
            empty: list[list[Any]] = [[None] * len(every) for _ in range(steps)]
            size = sum(source.dtype.itemsize for source in output.sources) * prod(output.shape)
            held = Held(self.spare) if size <= HOLD else None
            sweep = _Sweep(empty, [len(every)] * steps, [threading.Event() for _ in range(steps)], held)
        passes = [
            _Task(output, first, last, file, 0, sweep, step, i)
            for step in range(steps)
            for i, (first, last) in enumerate(every)
        ]
        return passes, [_Task(output, a, b, file, offset + a * item, sweep, -1, 0) for a, b in todo]

    def _work(self) -> None:
        reader, spare = Reader(), Buffer()
        try:
            while self.failure is None:
                buffer = self._buffer()  # before the task: who holds the earliest tile can then always finish it
                with self.lock:
                    task = next(self.tasks, None)
                if task is None:
                    self.free.put(buffer)
                    return
                if task.step >= 0:
                    self.free.put(buffer)
                    self._reduce(task, reader)
                else:
                    self._produce(task, buffer, reader, spare)
        except BaseException as error:
            self.failure = self.failure or error

    def _await(self, event: threading.Event) -> None:
        while not event.wait(0.1):
            if self.failure:
                raise self.failure

    def _reduce(self, task: _Task, reader: Reader) -> None:
        sweep, kernel = task.sweep, task.output.kernel
        assert sweep is not None and kernel is not None
        if task.step:
            self._await(sweep.ready[task.step - 1])
        partial = kernel.passes[task.step](self._read(task, reader), sweep.state)
        with self.lock:
            sweep.partials[task.step][task.number] = partial
            sweep.left[task.step] -= 1
            last = sweep.left[task.step] == 0
        if last:
            if kernel.fold:
                sweep.state = kernel.fold(task.step, sweep.partials[task.step], sweep.state)
            sweep.partials[task.step] = []
            sweep.ready[task.step].set()

    def _produce(self, task: _Task, buffer: Buffer, reader: Reader, spare: Buffer) -> None:
        output, count = task.output, task.last - task.first
        values = buffer.of(count, output.dtype)
        figures = Figures()
        if output.kernel is None:
            read = output.sources[0].read(task.first, task.last, buffer.bytes(count * output.dtype.itemsize))
            inputs = read_checksum(output.sources[0], values, 0, task.first)
            if output.dtype in COMPUTABLE and not finite(values):
                figures.nonfinite = self._nonfinite(task, values)
        else:
            if task.sweep:
                self._await(task.sweep.ready[-1])
            tile, read = self._read(task, reader), 0
            inputs = reader.checksum
            if task.sweep and task.sweep.held:
                task.sweep.held.release(task.first)
            result, delta = output.kernel.apply(tile, task.sweep.state if task.sweep else None)
            values.copy_(result)
            if delta is None:
                sound = finite(values)
            else:
                figures.has_delta, figures.delta_sq = True, dot(delta, delta)
                if output.dtype is not torch.float32:
                    error = spare.of(count, torch.float32).copy_(values).sub_(result)
                    figures.error_sq = dot(error, error)
                    sound = isfinite(figures.error_sq)  # NaN or Inf in the result, or made by rounding, shows here
                else:
                    sound = finite(values)
                sound = sound and isfinite(figures.delta_sq)
            if not sound:
                figures.nonfinite = self._nonfinite(task, values)
                figures.delta_sq = figures.error_sq = 0.0
        if output.patch:
            inputs += output.patch(task.first, task.last, values)
        self._finish(task, buffer, figures, read, inputs)

    def _read(self, task: _Task, reader: Reader) -> Tile:
        output, held = task.output, task.sweep.held if task.sweep else None
        tile = reader.read(output.name, output.sources, task.first, task.last, output.shape, held)
        with self.lock:
            self.account.bytes_read += reader.taken()
        return tile

    def _nonfinite(self, task: _Task, values: torch.Tensor) -> int:
        """How many NaN and Inf an output tile holds; raises, naming the input that they came from, unless allowed."""
        count = int((~torch.isfinite(values)).sum())
        if count and not self.allow_nonfinite:
            for source in task.output.sources:
                buffer = Buffer()
                seen = buffer.of(task.last - task.first, source.dtype)
                source.read(task.first, task.last, buffer.bytes(seen.numel() * source.dtype.itemsize))
                if bad := int((~torch.isfinite(seen.float())).sum()):
                    where = f"{source.name} in {source.role} holds {bad:,} NaN or Inf"
                    break
            else:
                several = format_count(count, "result is", "results are")
                where = f"{task.output.name}: {several} NaN or too large for {task.output.dtype}"
            raise CheckpointError(f"{where} (elements {task.first:,} to {task.last:,}); --allow-nonfinite keeps them")
        return count

    def _buffer(self) -> Buffer:
        while True:
            try:
                return self.free.get(timeout=0.1)
            except Empty:
                if self.failure:
                    raise self.failure from None

    def _finish(self, task: _Task, buffer: Buffer, figures: Figures, read: int, inputs: int) -> None:
        """Hands on a tile to be hashed and written, in order: whoever brings the next one does all that wait."""
        file = task.file
        with self.lock:
            self.account.bytes_read += read
            self.account.bytes_written += task.size
            file.pending[task.offset] = (task, buffer, figures, inputs)
            if file.progress.done not in file.pending:
                return
            taken = file.pending.pop(file.progress.done)
        while True:
            task, buffer, figures, inputs = taken
            size, name = task.size, task.output.name
            file.progress.sha256.update(buffer.bytes(size))
            file.writer.write(buffer.bytes(size))
            self.free.put(buffer)
            total = self.figures[name]
            total.delta_sq += figures.delta_sq
            total.error_sq += figures.error_sq
            total.nonfinite += figures.nonfinite
            total.has_delta |= figures.has_delta
            file.changed[name] = [total.delta_sq, total.error_sq, total.nonfinite, total.has_delta]
            with self.lock:
                file.progress.done += size
                file.progress.inputs = (file.progress.inputs + inputs) % 2**64
                self.done += size
                if self.journal and (self.every_tile or file.progress.done - file.recorded >= RECORD):
                    states = self.downloads.states(task.output.sources, task.last)
                    self.journal.record(file.name, file.progress, file.changed, states)
                    file.recorded, file.changed = file.progress.done, {}
                if self.report:
                    self.report(self.done, self.total)
                    self.downloads.report()
                following = file.pending.pop(file.progress.done, None)
            if following is None:
                return
            taken = following
