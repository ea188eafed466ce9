"""A folder of steps: each is done once, done again when what it read has changed, and refused when edited by hand.

    steps = Steps(out)
    folder = steps.run("start", settings, after=["tokenizer"], make=lambda folder, overwrite: ...)

A note beside the steps says what a step was made from. It is written before the step begins, so that a kill at any
moment leaves a step that is whole or not there. A step that was stopped goes on, unless what it reads has changed: then
what is there of it is removed. Leaves out what the steps are (adapt.py).
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lapis.checkpoint.commit import commit_file
from lapis.checkpoint.staging import give_up, is_made, staging_of
from lapis.errors import OutputError

NOTES = ".steps"
Stamps = dict[str, list[int]]


class Steps:
    """The steps of one folder. done: Name -> folder, in the order in which they were run. tell: Called with a line
    where something that was half done is removed."""

    def __init__(self, out: Path, tell: Callable[[str], None] = lambda line: None) -> None:
        self.out, self.tell = out, tell
        self.done: dict[str, Path] = {}
        self._keys: dict[str, str] = {}

    def run(
        self, name: str, settings: Mapping[str, Any], after: Sequence[str], make: Callable[[Path, bool], None]
    ) -> Path:
        """The folder of a step, made now unless it is there.

        Args:
            name: Of the step, and of its folder.
            settings: All that decides the result besides the steps before it, as JSON.
            after: Steps that it reads.
            make: Writes the folder; its second argument says whether an older one is replaced.

        Raises:
            OutputError: Where the folder was not made here, or was changed since.
        """
        folder = self.out / name
        if os.path.lexists(folder) and not folder.is_dir():
            raise OutputError(f"{folder}: is a file in the place of a step; remove it to have the step made")
        parts = [name, settings, [self._keys[step] for step in after]]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        note = self._read(name)
        exists = is_made(folder)
        if exists and not note:
            raise OutputError(f"{folder}: exists, and is no step of this adaptation; remove it, or give another --out")
        stopped = exists and note["stamps"] is None
        if stopped and note["key"] == key and stamps_of(folder) != note["replaces"]:  # the step was whole already
            self._write(name, key, stamps_of(folder))
        elif exists and not stopped and (changed := _changed(note["stamps"], stamps_of(folder))):
            raise OutputError(
                f"{folder}: {changed} was changed since it was written; remove the folder to have it made again"
            )
        elif not exists or stopped or note["key"] != key:
            before = stamps_of(folder) if exists else None
            if note and (note["key"] != key or note.get("removing")) and staging_of(folder).is_dir():
                self.tell(f"{name}: begins anew, since what it reads or a setting has changed since it was stopped")
                self._write(name, key, None, before, removing=True)  # which a kill may cut short
                give_up(folder)
            self._write(name, key, None, before)
            make(folder, exists)
            self._write(name, key, stamps_of(folder))
        self.done[name], self._keys[name] = folder, key
        return folder

    def _read(self, name: str) -> dict[str, Any]:
        path = self.out / NOTES / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _write(
        self, name: str, key: str, stamps: Stamps | None, replaces: Stamps | None = None, *, removing: bool = False
    ) -> None:
        note = {"key": key, "stamps": stamps, "replaces": replaces, **({"removing": True} if removing else {})}
        with commit_file(self.out / NOTES / f"{name}.json", overwrite=True) as path:
            path.write_text(json.dumps(note), encoding="utf-8")


def stamps_of(folder: Path) -> Stamps:
    """Size and time of change of every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _changed(before: Stamps | None, after: Stamps) -> str:
    """The first file that differs; "" where none does."""
    if before is None:
        return ""
    names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    return names[0] if names else ""
