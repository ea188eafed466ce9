"""The folder of a tour: claimed by its settings, worked in by one process, with findings and page once they are whole.

    findings = completed(out, record, lambda screen: story.tell())

The seconds of all sittings are noted apart from the findings, which are the same at any pace. Leaves out what a tour
does: the parts whose files are there are not done again by whoever does them.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lapis.checkpoint.commit import commit_file
from lapis.checkpoint.staging import disk_errors, try_lock
from lapis.errors import OutputError
from lapis.tour.clock import Screen, on_terminal
from lapis.tour.page import page
from lapis.tour.setup.machine import Machine

SECONDS = ".seconds"  # the note of how long all sittings took together


def completed(out: Path, record: Mapping[str, Any], tell: Callable[[Screen], dict[str, Any]]) -> dict[str, Any]:
    """The findings of the tour in a folder, which is run, or gone on with, unless it is done.

    Args:
        out: The folder.
        record: The settings; another tour's folder is refused.
        tell: Runs the tour and returns its findings.

    Raises:
        OutputError: For a folder that is another tour's, or no tour's, or in which another process is at work.
    """
    claim(out, record)
    result, report = out / "tour.json", out / "report.html"
    with _locked(out):
        if not result.exists():
            ended = _sitting(out, tell) | {"report": str(report), "folder": str(out)}
            with commit_file(result) as path:
                path.write_text(json.dumps(ended, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        findings: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if not report.exists():
            with commit_file(report) as path:
                path.write_text(page(findings), encoding="utf-8")
    return findings | {"seconds": _seconds(out)}


def claim(out: Path, record: Mapping[str, Any]) -> None:
    """Makes the folder, or finds in it a tour with the same settings."""
    note = out / ".tour"
    before = read_note(note)
    if isinstance(before, dict):
        other = [f"{key} was {before.get(key)}" for key, value in record.items() if before.get(key) != value]
        if other:
            raise OutputError(f"{out}: holds another tour ({', '.join(other)}); give another --out, or remove it")
    elif out.exists() and any(not entry.name.startswith((note.name, f".{note.name}.")) for entry in out.iterdir()):
        why = "its .tour cannot be read" if note.exists() else "is no tour"
        raise OutputError(f"{out}: exists already and {why}; give another --out")
    else:
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        write_note(note, record)


def settled_machine(out: Path) -> Machine | None:
    """What the tour in a folder computes with, as settled when it began; None where that is still to be done."""
    settled = read_note(out / ".machine")
    known = isinstance(settled, dict) and set(settled) == {entry.name for entry in fields(Machine)}
    return Machine(**settled) if known else None


def settle_machine(out: Path, machine: Machine) -> None:
    """Notes what the tour computes with."""
    write_note(out / ".machine", asdict(machine))


def read_note(path: Path) -> Any:
    """The JSON of a note; None where there is none, or only a piece of one."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def write_note(path: Path, value: Any) -> None:
    """A note in place of an earlier one."""
    with commit_file(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(value))


def _sitting(out: Path, tell: Callable[[Screen], dict[str, Any]]) -> dict[str, Any]:
    """One call of a tour, to its end or to where it is stopped; its seconds are added to those of earlier ones."""
    earlier, started, screen = _seconds(out), time.monotonic(), on_terminal()
    try:
        return tell(screen)
    finally:
        screen.close()
        with suppress(OSError, OutputError):  # without it a rerun only counts fewer seconds
            write_note(out / SECONDS, earlier + time.monotonic() - started)


def _seconds(out: Path) -> float:
    noted = read_note(out / SECONDS)
    return float(noted) if isinstance(noted, int | float) else 0.0


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """No other tour works in the folder meanwhile."""
    handle = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not try_lock(handle):
            raise OutputError(f"{out}: another tour is at work in it; wait for it, or give another --out")
        yield
    finally:
        os.close(handle)
