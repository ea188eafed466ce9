"""Kills a job, or lets a system call of it fail, at exactly the n-th call that touches files under a folder.

`build(folder)` compiles faults.c where there is a compiler; `Job` runs a command with it. Every call of a job can be
tried, so no window is too small to be hit.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("faults.c")
ERRORS = {
    "open": (errno.EIO, errno.EMFILE),
    "write": (errno.EIO, errno.ENOSPC),
    "fsync": (errno.EIO,),
    "rename": (errno.EIO, errno.EXDEV),
    "mkdir": (errno.EIO, errno.ENOSPC),
    "unlink": (errno.EIO,),
    "truncate": (errno.EIO,),
    "allocate": (errno.EOPNOTSUPP, errno.ENOSPC),
    "lock": (errno.ENOLCK, errno.EOPNOTSUPP),
}


def build(folder: Path) -> Path:
    """The library, compiled into `folder`; skips the test where there is no C compiler or no Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("aimed faults need a C compiler on Linux")
    library = folder / "faults.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


@dataclass(frozen=True)
class Job:
    """A command whose files lie under `folder`.

    Attributes:
        command: Arguments after the interpreter.
        folder: Where it runs, and whose calls count.
        library: What `build` gave.
    """

    command: Sequence[str]
    folder: Path
    library: Path

    def run(self, at: int = 0, code: int = 0, kinds: str = "") -> subprocess.CompletedProcess[str]:
        """Runs the command; at > 0 kills it (code 0) or fails it (an errno) at that call."""
        log = self.folder.parent / f"{self.folder.name}.calls"
        log.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "LD_PRELOAD": str(self.library),
            "FAULT_UNDER": str(self.folder),
            "FAULT_AT": str(at),
            "FAULT_ERRNO": str(code),
            "FAULT_LOG": str(log),
            "OMP_NUM_THREADS": "1",
            **({"FAULT_KINDS": kinds} if kinds else {}),
        }
        command = [sys.executable, *self.command]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    def calls(self) -> list[str]:
        """The kinds of the calls of the last run, in their order."""
        log = self.folder.parent / f"{self.folder.name}.calls"
        return log.read_text().split() if log.exists() else []


def was_killed(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode == -signal.SIGKILL


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its name in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}
