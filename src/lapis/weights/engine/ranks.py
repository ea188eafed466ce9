"""Outputs written by several processes (checkpoint/sharing.py): each takes runs of tensors, and writes them in place.

A part is written by the one engine (stream.py); others know nothing of it before it is whole. The sha256 of a file
needs its bytes in order: one process for each file takes it while parts are done, between parts of its own. As it does
it compares a checksum of each part, so that what a power cut took from the disk is done again. Leaves out: what is
computed, and who commits (job.py).
"""

import hashlib
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import heappop, heappush
from math import prod
from pathlib import Path

from lapis.checkpoint.files import read_json
from lapis.checkpoint.sharing import PAUSE, SharedJob, errors_for_all, joined, put, raise_theirs, taken
from lapis.checkpoint.staging import BUILD, JOURNAL, disk_errors, note_once
from lapis.checkpoint.tensor_file import dtype_name, header_bytes
from lapis.weights.engine.journal import NAME
from lapis.weights.engine.outputs import Account, Figures, Output
from lapis.weights.engine.stream import METADATA, stream_part
from lapis.weights.engine.writer import Writer

PART = 64 << 20  # bytes of output that a process takes at a time, or one tensor
_BLOCK = 4 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TensorRun:
    """Tensors that lie behind each other in a file. at: of the first one's first byte."""

    file: str
    at: int
    outputs: list[Output]

    @property
    def end(self) -> int:
        return self.at + sum(output.nbytes for output in self.outputs)


def head_of(outputs: Sequence[Output]) -> bytes:
    return header_bytes({o.name: (dtype_name(o.dtype), o.shape) for o in outputs}, METADATA)


def parts_of(files: Mapping[str, Sequence[Output]]) -> list[TensorRun]:
    """All tensors in runs of at least PART bytes, in the order of the files."""
    parts = []
    for file, outputs in files.items():
        at, run = len(head_of(outputs)), list[Output]()
        for output in outputs:
            run.append(output)
            if sum(each.nbytes for each in run) >= PART:
                parts.append(TensorRun(file, at, run))
                at, run = parts[-1].end, []
        if run or not outputs:
            parts.append(TensorRun(file, at, run))
    return parts


def division(files: Mapping[str, Sequence[Output]], processes: int) -> dict[str, int]:
    """What the busiest of so many equally fast processes does: processes, parts, read_bytes, written_bytes."""
    loads = [(0, number, 0, 0) for number in range(processes)]  # bytes in all, process, parts, bytes read
    for part in parts_of(files):
        read = sum(prod(s.shape) * s.dtype.itemsize for output in part.outputs for s in output.sources)
        moved, number, parts, before = heappop(loads)
        heappush(loads, (moved + read + part.end - part.at, number, parts + 1, before + read))
    moved, _, parts, read = max(loads)
    return {"processes": processes, "parts": parts, "read_bytes": read, "written_bytes": moved - read}


def lay_out(files: Mapping[str, Sequence[Output]], staging: Path) -> None:
    """Writes the headers of the files, and reserves their space."""
    forget_alone(staging)
    for file, outputs in files.items():
        head = head_of(outputs)
        writer = Writer(staging / BUILD / file, len(head) + sum(output.nbytes for output in outputs))
        writer.write(head)
        writer.close()


def forget_alone(staging: Path) -> None:
    """Drops what one process alone had begun: its journal knows no parts."""
    if (staging / NAME).exists():
        note_once(f"{staging}: what one process had begun there is done anew by all")
        (staging / NAME).unlink()


def forget_digests(staging: Path) -> None:
    """What was hashed may have been lost since: a run that goes on reads it again."""
    for path in (staging / JOURNAL).glob("hash-*.json"):
        path.unlink()


def write_together(
    job: SharedJob, files: Mapping[str, Sequence[Output]], *, allow_nonfinite: bool, progress: Progress | None
) -> None:
    """Does parts until all are done, by this process and whoever else is at it."""
    with disk_errors(job.out), joined(job) as there:
        if there:
            with errors_for_all(job.journal):
                _Work(job, parts_of(files), allow_nonfinite, progress)()


def account_of(journal: Path, files: Mapping[str, Sequence[Output]]) -> Account:
    """What all processes did, from what they left in the journal."""
    figures = {output.name: Figures() for outputs in files.values() for output in outputs}
    account = Account(figures, {}, {})
    for number in range(len(parts_of(files))):
        done = read_json(journal / f"{number}.json")
        figures |= {name: Figures(*values) for name, values in done["figures"].items()}
        account.bytes_read += done["read"]
        account.bytes_written += done["written"]
    for number, (file, outputs) in enumerate(files.items()):
        account.digests[file] = read_json(journal / f"hash-{number}.json")["sha256"]
        account.sizes[file] = len(head_of(outputs)) + sum(output.nbytes for output in outputs)
    return account


class _Work:
    def __init__(
        self, job: SharedJob, parts: list[TensorRun], allow_nonfinite: bool, progress: Progress | None
    ) -> None:
        self.journal, self.build = job.journal, job.staging / BUILD
        self.parts, self.allow_nonfinite, self.report = parts, allow_nonfinite, progress
        self.total = sum(part.end - part.at for part in parts)

    def __call__(self) -> None:
        left = list(range(len(self.parts)))
        with _Hashing(self.journal, self.build, self.parts) as hashing:
            while left or not hashing.all_done():
                before = list(left)
                for number in before:
                    raise_theirs(self.journal)
                    if self._is_done(number) or self._take(number):
                        left.remove(number)
                        left += hashing.advance()
                left += hashing.advance()
                if left == before:
                    raise_theirs(self.journal)
                    time.sleep(PAUSE)

    def _is_done(self, number: int) -> bool:
        return (self.journal / f"{number}.json").exists()

    def _take(self, number: int) -> bool:
        """Does a part, unless another process is at it (False)."""
        with taken(self.journal, number) as mine:
            if not mine:
                return False
            if self._is_done(number):
                return True
            part = self.parts[number]
            before = sum(each.end - each.at for i, each in enumerate(self.parts) if self._is_done(i))

            def reached(done: int, _total: int) -> None:
                if self.report:
                    self.report(min(before + done, self.total), self.total)

            account, crc = stream_part(
                part.file, part.outputs, self.build, part.at, allow_nonfinite=self.allow_nonfinite, progress=reached
            )
            put(self.journal / f"{number}.json", {
                "crc": crc, "read": account.bytes_read, "written": account.bytes_written,
                "figures": {name: list(vars(seen).values()) for name, seen in account.figures.items()},
            })  # fmt: skip
            return True


class _Hashing:
    """The sha256 of each file, taken by one process while its parts are done; by another where that one dies."""

    def __init__(self, journal: Path, build: Path, parts: list[TensorRun]) -> None:
        self._journal, self._build, self._holding = journal, build, ExitStack()
        self._files = list(dict.fromkeys(part.file for part in parts))
        self._parts = {file: [(i, p) for i, p in enumerate(parts) if p.file == file] for file in self._files}
        self._file: int | None = None  # the one that this process hashes
        self._next = 0  # of its parts
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> "_Hashing":
        return self

    def __exit__(self, *_: object) -> None:
        self._holding.close()

    def all_done(self) -> bool:
        return all(self._done(file).exists() for file in range(len(self._files)))

    def advance(self) -> list[int]:
        """Hashes what can be. Returns the numbers of parts that are not what was written, and have to be done again."""
        while self._file is not None or self._take():
            assert self._file is not None
            parts = self._parts[self._files[self._file]]
            while self._next < len(parts):
                number, part = parts[self._next]
                if not (self._journal / f"{number}.json").exists():
                    return []
                crc = read_json(self._journal / f"{number}.json")["crc"]
                first = 0 if self._next == 0 else part.at
                if self._read(part, first) != crc:
                    note_once(f"{part.file}: bytes {part.at:,} to {part.end:,} are not what was written; done again")
                    (self._journal / f"{number}.json").unlink()
                    self._next, self._sha256 = 0, hashlib.sha256()
                    return [number]
                self._next += 1
            put(self._done(self._file), {"sha256": self._sha256.hexdigest()})
            self._holding.close()
            self._file = None
        return []

    def _done(self, file: int) -> Path:
        return self._journal / f"hash-{file}.json"

    def _take(self) -> bool:
        """Takes a file that nobody hashes."""
        for file in range(len(self._files)):
            if not self._done(file).exists():
                if self._holding.enter_context(taken(self._journal, f"hash-{file}")) and not self._done(file).exists():
                    self._file, self._next, self._sha256 = file, 0, hashlib.sha256()
                    return True
                self._holding.close()
        return False

    def _read(self, part: TensorRun, first: int) -> int:
        """Adds the bytes from `first` to the part's end to the digest; the checksum of those that are the part's."""
        crc = 0
        with (self._build / part.file).open("rb") as file:
            file.seek(first)
            head = file.read(part.at - first)
            self._sha256.update(head)
            left = part.end - part.at
            while left and (block := file.read(min(_BLOCK, left))):
                self._sha256.update(block)
                crc = zlib.crc32(block, crc)
                left -= len(block)
        return crc
