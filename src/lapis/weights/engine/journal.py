"""What of an output is finished, so that a killed job goes on and gives the same bytes.

The first line names the job and its input files. Then one line of JSON per finished stretch: the file, how many of its
bytes are done from the start, the sha256 of those, a checksum of the inputs' bytes that they were made from, and the
figures of the tensors in it. On a rerun the bytes are hashed again and compared, line by line; the last line that
agrees is where work goes on, with the hash already in hand for the manifest. Where an input is not the file that it was
(its inode or a time is another) its bytes are read and compared as well: a copy is gone on with, another model is not.
Data need not reach the disk before its line does: after a power cut the hash simply disagrees and that stretch is done
again. Leaves out: what a job computes.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lapis.checkpoint.staging import Staging
from lapis.weights.engine.writer import recover

NAME = ".journal.jsonl"
_BLOCK = 1 << 20
_BLOCKS = ".journal-blocks-"


Identity = list[list[Any]]
"""Role and path of each input file, and its inode, size and times (checkpoint/store.py)."""


class Digest(Protocol):
    """A running digest, such as hashlib's."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


class Crc32:
    """zlib's CRC-32 as a running digest: enough to see that bytes are those that were written."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:x}"


@dataclass
class Progress:
    """How far one file is: bytes done from its start, their running sha256, figures of its tensors so far.

    inputs: the checksum of the bytes that were read for it.
    """

    done: int = 0
    sha256: "Digest" = field(default_factory=hashlib.sha256)
    figures: dict[str, Any] = field(default_factory=dict)
    inputs: int = 0


class Journal:
    """The journal of one staging folder.

    job: a digest of everything that decides the output's bytes besides the inputs' values. inputs: which files those
    are; `moved` names the ones that are not the files that an earlier run has read.
    """

    def __init__(self, staging: Staging, job: str, inputs: Identity | None = None) -> None:
        self.resumed_bytes = 0
        self.moved: list[str] = []
        self.dropped = False  # whether an earlier run had done more than can be used
        self.digests: dict[str, list[Any]] = {}  # of files on servers, as far as what is gone on with was made of them
        self._folder, self._path = staging.path, staging.root / NAME
        self._lines: dict[str, list[dict[str, Any]]] = {}
        self._head = {"job": job, "inputs": inputs or []}
        lines = list(_read_lines(self._path))
        if lines and lines[0].get("job") == job:
            for line in lines[1:]:
                self._lines.setdefault(line["file"], []).append(line)
            before = [list(entry) for entry in lines[0].get("inputs", [])]
            self.moved = [str(entry[1]) for entry in self._head["inputs"] if entry not in before]
            end = sum(len(_dump(line)) for line in lines)
            os.truncate(self._path, end)  # a line that a kill cut in two
        else:
            for entry in self._folder.iterdir():  # a merge's of another recipe; the lock says that nobody works on it
                entry.unlink()
            for entry in staging.root.glob(f"{_BLOCKS}*"):
                entry.unlink()
            self._path.write_bytes(_dump(self._head))
        self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    @staticmethod
    def inputs_of(staging: Staging) -> Identity:
        """The inputs of the job that was interrupted there; nothing where there is none."""
        head = next(_read_lines(staging.root / NAME), {})
        return [list(entry) for entry in head.get("inputs", [])]

    def blocks(self, file: str) -> Path:
        """Where what is on its way to a file is kept (engine/writer.py)."""
        return self._path.with_name(f"{_BLOCKS}{file}")

    def progress(self, file: str, read_inputs: Callable[[int, int], int]) -> Progress:
        """Where to go on with a file: the longest recorded stretch whose bytes are as they were.

        read_inputs(first, last): the checksum of what bytes [first, last) of the file are made from; called where the
        inputs are not the files that they were.
        """
        lines, path = self._lines.get(file, []), self._folder / file
        self._lines[file] = []
        result = Progress()
        if not lines or not path.is_file():
            return result
        recover(path, self.blocks(file))
        running = hashlib.sha256()
        with path.open("rb") as data:
            position = inputs = 0
            figures: dict[str, Any] = {}
            for line in lines:
                begin = position
                while position < line["done"]:
                    block = data.read(min(_BLOCK, line["done"] - position))
                    if not block:
                        break
                    running.update(block)
                    position += len(block)
                if position != line["done"] or running.hexdigest() != line["sha256"]:
                    break
                if self.moved:
                    inputs = (inputs + read_inputs(begin, position)) % 2**64
                    if inputs != line["inputs"]:
                        break
                figures.update(line["figures"])
                self.digests.update(line.get("digests", {}))
                result = Progress(position, running.copy(), dict(figures), line["inputs"])
                self._lines[file].append(line)
        self.dropped |= len(self._lines[file]) < len(lines)
        self.resumed_bytes += result.done
        return result

    def settle(self) -> None:
        """Writes down what is gone on with, where that is less than there was or was made from other files."""
        if not self.moved and not self.dropped:
            return
        aside = self._path.with_name(f"{NAME}.new")
        aside.write_bytes(b"".join(map(_dump, [self._head, *(line for each in self._lines.values() for line in each)])))
        os.replace(aside, self._path)
        os.close(self._handle)
        self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def record(
        self, file: str, progress: Progress, figures: dict[str, Any], digests: dict[str, list[Any]] | None = None
    ) -> None:
        """Says that a file is finished up to progress.done.

        Args:
            file: Its name.
            progress: How far it is.
            figures: Those that changed since the last record.
            digests: States of digests of files on servers, as `Downloads.states` gives them.
        """
        line = {"file": file, "done": progress.done, "sha256": progress.sha256.hexdigest(), "figures": figures,
                "inputs": progress.inputs}  # fmt: skip
        if digests:
            line["digests"] = digests
        left = memoryview(_dump(line))
        while left:
            left = left[os.write(self._handle, left) :]

    def close(self) -> None:
        os.close(self._handle)


def _dump(line: dict[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal, up to the first that is cut or damaged."""
    if not path.is_file():
        return
    for raw in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(raw)
        except ValueError:
            return
        known = isinstance(line, dict) and (
            "job" in line or {"file", "done", "sha256", "figures", "inputs"} <= set(line)
        )
        if not known or _dump(line) != raw + b"\n":
            return
        yield line
