"""Kills a command, or lets a system call of it fail, at exactly the n-th call that touches files under a folder.

`build(folder)` compiles faults.c where there is a compiler; `Forks` runs commands with it, each in a fork of one
process (server.py) that has imported everything; `Job` judges what came of them. Every call of a job can be tried, so
no window is too small to be hit.
"""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lapis.checkpoint.commit import MANIFEST, verify
from lapis.language.card.card import write_card

SOURCE, SERVER = Path(__file__).with_name("faults.c"), Path(__file__).with_name("server.py")
HALF = -1  # a read or a write does half of what it was to do
CHANGING = (
    "open",
    "direct",
    "write",
    "fsync",
    "rename",
    "exchange",
    "mkdir",
    "unlink",
    "truncate",
    "allocate",
    "chmod",
)
ERRORS: dict[str, tuple[int, ...]] = {
    "open": (errno.EIO, errno.EMFILE, errno.ENOSPC),
    "direct": (errno.EINVAL, errno.EOPNOTSUPP),
    "look": (errno.EIO, errno.EMFILE),
    "read": (errno.EIO, HALF),
    "write": (errno.EIO, errno.ENOSPC, errno.EINVAL, HALF),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EINVAL, errno.ENOSYS),
    "rename": (errno.EIO, errno.EXDEV, errno.ENOSPC),
    "exchange": (errno.EIO, errno.EINVAL, errno.ENOSYS),
    "mkdir": (errno.EIO, errno.ENOSPC),
    "unlink": (errno.EIO,),
    "truncate": (errno.EIO, errno.EINVAL),
    "allocate": (errno.EIO, errno.ENOSPC, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL),
    "lock": (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL),
    "chmod": (errno.EPERM, errno.EOPNOTSUPP),
}
CARD, DRAWN_FROM_CARD = "card.json", ("card.json", "index.html", "README.md")
CLOCKED = "characters_per_second"  # the one score of a card that a clock gives


def build(folder: Path) -> Path:
    """The library, compiled into `folder`; skips the test where there is no C compiler or no Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("aimed faults need a C compiler on Linux")
    library = folder / "faults.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


@dataclass(frozen=True)
class Ended:
    """How a command ended. status: None where it hung and was killed."""

    status: int | None
    shown: str
    told: str

    @property
    def was_killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Forks:
    """A server with the fault library in front of its C library.

    scratch: a folder whose calls never count. modules: what it imports besides lapis.
    """

    def __init__(self, library: Path, scratch: Path, modules: Sequence[str] = ()) -> None:
        self.scratch = scratch
        self.runs = 0
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER), *modules],
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: Sequence[str], folder: Path, seconds: float = 60, **environment: object) -> Ended:
        """Runs `lapis ARGUMENTS` in `folder`."""
        stem = self.scratch / "command"
        command = {
            "arguments": list(arguments),
            "folder": str(folder),
            "environment": {name: str(value) for name, value in environment.items()},
            "seconds": seconds,
            "told": str(stem),
        }
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(command) + "\n")
        self._server.stdin.flush()
        status = json.loads(self._server.stdout.readline())["status"]
        self.runs += 1
        texts = [Path(f"{stem}.{end}").read_text(errors="replace") for end in ("out", "err")]
        return Ended(status, *texts)

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()


class OutOfTime(Exception):
    """The rest of the trials is for another call."""


@dataclass
class Job:
    """A command that reads `place`/inputs, and is run in `place`/work.

    Attributes:
        name: For people.
        arguments: Of the command line.
        place: The folder whose calls count.
        forks: What runs it.
        outputs: What it makes in its folder; none for commands that only look.
        old: What lies there before it runs, by output; empty, unless it overwrites.
        seconds: After which it hangs.
        loose: Names of files, and of folders, that hold times and nothing else that matters.
        grows: An output is a working folder, whose parts appear one after the other, each of them whole.
        wrong: What was found, one line each.
        kills: Trials that ended in a kill.
        errors: Trials in which an error was injected.
        skip: Trials that were made by an earlier call.
        until: When no further trial is begun (time.monotonic).
        tried: Trials, with those that were skipped.
    """

    name: str
    arguments: Sequence[str]
    place: Path
    forks: Forks
    outputs: Sequence[str] = ("out",)
    old: Mapping[str, Path] = field(default_factory=dict)
    seconds: float = 60.0
    loose: Sequence[str] = ()
    grows: bool = False
    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    errors: int = 0
    skip: int = 0
    until: float = math.inf
    tried: int = 0

    def __post_init__(self) -> None:
        self.folder = self.place / "work"
        self.log = self.forks.scratch / "calls"
        self.before = {name: self.content(path) for name, path in self.old.items()}
        self.prepare()
        done = self.run()
        assert done.status == 0, f"{self.name}: {done.told}"
        self.after = self.seen()
        assert set(self.after) == set(self.outputs), f"{self.name}: {sorted(self.after)}"

    def is_due(self) -> bool:
        """Before each trial: whether it is to be made. Raises OutOfTime."""
        if self.tried >= self.skip and time.monotonic() > self.until:
            raise OutOfTime
        self.tried += 1
        return self.tried > self.skip

    def prepare(self) -> None:
        """An empty folder, but for old outputs."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name, path in self.old.items():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, self.folder / name)  # type: ignore[operator]

    def run(self, at: int = 0, code: int = 0, kinds: Sequence[str] = (), **more: object) -> Ended:
        """Runs the command; with `at` it is killed (code 0) or a call of it fails (an errno); -1 is every call."""
        armed = {"FAULT_UNDER": f"{self.place}/", "FAULT_AT": at, "FAULT_ERRNO": code, **more}
        if kinds:
            armed["FAULT_KINDS"] = ",".join(kinds)
        return self.forks.run(self.arguments, self.folder, self.seconds, **armed)

    def calls(self, kinds: Sequence[str] = ()) -> list[tuple[str, str]]:
        """(kind, path) of every call of an undisturbed run."""
        self.log.unlink(missing_ok=True)
        self.prepare()
        done = self.run(kinds=kinds, FAULT_LOG=self.log)
        assert done.status == 0, f"{self.name}: {done.told}"
        return self.logged()

    def logged(self) -> list[tuple[str, str]]:
        """(kind, path) of what the run before wrote to the log."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(kind, path) for kind, _, path in (line.partition(" ") for line in lines)]

    def seen(self) -> dict[str, Any]:
        """The outputs that are visible."""
        return {name: self.content(self.folder / name) for name in self.outputs if (self.folder / name).exists()}

    def content(self, path: Path) -> dict[str, Any]:
        """What is to be equal, by name: digests of files; of a card all but the speed, and that its page shows it."""
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        names = {p: p.relative_to(path).as_posix() if path.is_dir() else p.name for p in files}
        loose = {MANIFEST, *self.loose}
        return {name: _content(p) for p, name in names.items() if not loose & {p.name, *Path(name).parts}}

    def kill(self, number: int, second: int = 0, kinds: Sequence[str] = CHANGING) -> None:
        """Killed at a call: what is visible is old or new, and the same command then gives the new.

        second: the call at which the rerun is killed as well.
        """
        if not self.is_due():
            return
        self.prepare()
        killed = self.run(number, kinds=kinds)
        where = f"{self.name}: killed at call {number}"
        if killed.status == 0:
            return  # fewer calls than in the first run
        if not killed.was_killed:
            self.wrong.append(f"{where}: ended with {killed.status}: {killed.told[-300:]}")
            return
        self.kills += 1
        if second:
            again = self.run(second, kinds=kinds)
            self.kills += again.was_killed
            where += f", then at call {second}"
        self._rerun(where, self.visible(where))

    def fail(self, number: int, code: int, kind: str) -> None:
        """A call that fails: one line or none, nothing wrong to be seen, and the same command then gives the new."""
        if self.is_due():
            self.prepare()
            self.fail_from_here(number, code, kind)

    def fail_from_here(self, number: int, code: int, kind: str) -> None:
        """The same, in the folder as it is."""
        ended = self.run(number, code, [kind])
        self.errors += 1
        what = "does half" if code == HALF else f"fails with {errno.errorcode[code]}"
        where = f"{self.name}: {kind} {number} {what}"
        whole = self.visible(where)
        lines = [line for line in ended.told.splitlines() if line.startswith("lapis: ")]
        if ended.status not in (0, 1) or "Traceback" in ended.told:
            last = ended.told.strip().splitlines()[-1:] or [""]
            self.wrong.append(f"{where}: ended with {ended.status}: {last[0][:200]}")
        elif ended.status == 1 and len(lines) != 1:
            self.wrong.append(f"{where}: status 1 with {len(lines)} lines: {ended.told[-300:]}")
        if ended.status == 0 and not whole:
            self.wrong.append(f"{where}: status 0 without its output: {ended.told[-200:]}")
        if ended.status != 0 and whole and self.outputs:
            self.wrong.append(f"{where}: status {ended.status} with a complete output: {ended.told[-200:]}")
        if ended.status != 0 or self._left():
            self._rerun(where, whole)

    def visible(self, where: str) -> bool:
        """Whether the new output is there, whole; what is neither old nor new is wrong."""
        seen = self.seen()
        for name in self.outputs:
            if self.grows:
                shown = {part: value for part, value in seen.get(name, {}).items() if "/." not in f"/{part}"}
                right = all(self.after[name].get(part) == value for part, value in shown.items())
            else:
                right = seen.get(name) in (self.before.get(name), self.after[name])
            if not right:
                self.wrong.append(f"{where}: shows another {name}: {_difference(seen.get(name), self.after[name])}")
        return seen == self.after

    def _rerun(self, where: str, whole: bool) -> None:
        again = self.run()
        if again.status != 0 and not (whole and "exists already" in again.told):
            self.wrong.append(f"{where}: the rerun ended with {again.status}: {again.told[-300:]}")
            return
        seen = self.seen()
        if seen != self.after:
            different = [_difference(seen.get(name), self.after[name]) for name in self.outputs]
            self.wrong.append(f"{where}: the rerun gives other bytes: {different}")
        for name in self.outputs:
            out = self.folder / name
            if (out / MANIFEST).is_file() and (bad := verify(out)):
                self.wrong.append(f"{where}: the manifest is wrong: {bad}")
        if left := self._left():
            self.wrong.append(f"{where}: the rerun leaves {left}")

    def _left(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if path.name.startswith(".")]


def _content(path: Path) -> Any:
    card = path.parent / CARD
    if not card.is_file() or path.name not in DRAWN_FROM_CARD:
        return sha256(path.read_bytes()).hexdigest()
    value = json.loads(card.read_bytes())
    if path.name == CARD:
        return _without(CLOCKED, value)
    with tempfile.TemporaryDirectory() as place:
        write_card(Path(place), value)
        return "drawn from its card" if (Path(place) / path.name).read_bytes() == path.read_bytes() else "other"


def _without(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without(key, part) for name, part in value.items() if name != key}
    return [_without(key, part) for part in value] if isinstance(value, list) else value


def _difference(seen: Any, wanted: Any) -> str:
    if not isinstance(seen, dict) or not isinstance(wanted, dict):
        return f"{type(seen).__name__}"
    return ", ".join(sorted(n for n in {*seen, *wanted} if seen.get(n) != wanted.get(n)))


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its name in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


def kill_each(job: Job, step: int = 1, last: int = 0, twice: bool = False) -> None:
    """Kills a job at every `step`-th call, and at each of its `last` calls; `twice`: the rerun somewhere too."""
    count = len(job.calls(CHANGING))
    for number in sorted({*range(1, count + 1, step), *range(max(1, count - last + 1), count + 1)}):
        job.kill(number, 1 + number * 7 % count if twice else 0)


def fail_each(job: Job, step: int = 1) -> None:
    """Lets the calls of a job fail, each with every error of its kind; of all these trials every `step`-th."""
    kinds = [kind for kind, _ in job.calls(tuple(ERRORS))]
    trials = [
        (number, code, kind) for kind, codes in ERRORS.items() for number in range(1, kinds.count(kind) + 1)
        for code in codes
    ]  # fmt: skip
    for number, code, kind in trials[::step]:
        job.fail(number, code, kind)
