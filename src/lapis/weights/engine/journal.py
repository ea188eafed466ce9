"""What of an output is finished, so that a killed job goes on and gives the same bytes.

One line of JSON per finished stretch: the file, how many of its bytes are done from the start, the sha256 of those, and
the figures of the tensors in it. On a rerun the bytes are hashed again and compared, line by line; the last line that
agrees is where work goes on, with the hash already in hand for the manifest. Data need not reach the disk before its
line does: after a power cut the hash simply disagrees and that stretch is done again. Leaves out: what a job computes.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapis.checkpoint.staging import Staging

if TYPE_CHECKING:
    from hashlib import _Hash

NAME = ".journal.jsonl"
_BLOCK = 1 << 20


@dataclass
class Progress:
    """How far one file is: bytes done from its start, their running sha256, figures of its tensors so far."""

    done: int = 0
    sha256: "_Hash" = field(default_factory=hashlib.sha256)
    figures: dict[str, Any] = field(default_factory=dict)


class Journal:
    """The journal of one staging folder. job: a digest of everything that decides the output's bytes."""

    def __init__(self, staging: Staging, job: str) -> None:
        self.resumed_bytes = 0
        self._folder, self._path = staging.path, staging.root / NAME
        self._lines: dict[str, list[dict[str, Any]]] = {}
        lines = list(_read_lines(self._path))
        if lines and lines[0].get("job") == job:
            for line in lines[1:]:
                self._lines.setdefault(line["file"], []).append(line)
            end = sum(len(_dump(line)) for line in lines)
            os.truncate(self._path, end)  # a line that a kill cut in two
        else:
            for entry in self._folder.iterdir():  # a merge's of another recipe; the lock says that nobody works on it
                entry.unlink()
            self._path.write_bytes(_dump({"job": job}))
        self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def progress(self, file: str) -> Progress:
        """Where to go on with a file: the longest recorded stretch whose bytes are as they were."""
        lines, path = self._lines.get(file, []), self._folder / file
        result = Progress()
        if not lines or not path.is_file():
            return result
        running = hashlib.sha256()
        with path.open("rb") as data:
            position = 0
            figures: dict[str, Any] = {}
            for line in lines:
                while position < line["done"]:
                    block = data.read(min(_BLOCK, line["done"] - position))
                    if not block:
                        return result
                    running.update(block)
                    position += len(block)
                figures.update(line["figures"])
                if position != line["done"] or running.hexdigest() != line["sha256"]:
                    break
                result = Progress(position, running.copy(), dict(figures))
        self.resumed_bytes += result.done
        return result

    def record(self, file: str, progress: Progress, figures: dict[str, Any]) -> None:
        """Says that a file is finished up to progress.done; figures: those that changed since the last record."""
        line = {"file": file, "done": progress.done, "sha256": progress.sha256.hexdigest(), "figures": figures}
        os.write(self._handle, _dump(line))

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
        if not isinstance(line, dict) or _dump(line) != raw + b"\n" or not ({"job"} <= set(line) or "sha256" in line):
            return
        yield line
