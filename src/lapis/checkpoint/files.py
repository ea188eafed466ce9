"""Small files of a checkpoint: the contained path opener, and strict JSON.

Every file is untrusted. A path is opened only when it is a regular file inside the root (or the blobs of the hub's
cache, which is where a snapshot's links lead).
"""

import os
import stat
from pathlib import Path
from typing import Any

from lapis.errors import CheckpointError
from lapis.parsing import ParseError, parse_json, quoted

JSON_LIMIT = 96_000_000  # bytes; large tokenizers are near 40 MB


def contained(root: Path, relative: str) -> Path:
    """The real path of a regular file inside `root`, or CheckpointError.

    Refuses absolute paths, "..", links that lead outside, FIFOs and devices. In a hub cache (root is
    `models--x/snapshots/rev`) links into `models--x/blobs` are allowed, since that is how the cache is built.
    """
    if relative.startswith(("/", "\\")) or ".." in Path(relative).parts or "\0" in relative:
        raise CheckpointError(f'{root}: the path "{relative}" leads outside of the folder; refused')
    path = root / relative
    real = Path(os.path.realpath(path))
    allowed = [Path(os.path.realpath(root))]
    if root.parent.name == "snapshots":
        allowed.append(Path(os.path.realpath(root.parent.parent / "blobs")))
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f'{root}: "{relative}" is a link that leads outside of the folder; refused')
    try:
        mode = real.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{root}: {relative} is missing; give a folder that has it") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is not a regular file; put the file itself there")
    return real


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written again or replaced; the change time (ctime) is the system's own."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_at(path: Path, offset: int, buffer: memoryview, opened: tuple[int, ...]) -> bool:
    """Fills `buffer` with a file's bytes from `offset` on; read and never mapped, so that a cut file is no crash.

    Returns:
        False where the file ends early, or is another than when it had the stamp `opened`.

    Raises:
        OSError: Where it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < len(buffer):
            now = os.preadv(handle, [buffer[done:]], offset + done)
            if now == 0:
                return False
            done += now
        return stamp(os.fstat(handle)) == opened
    finally:
        os.close(handle)


def describe_absence(source: str | os.PathLike[str]) -> str:
    """Why there is no folder, and what helps: for messages, after the path and a colon."""
    if not os.fspath(source):
        return "the name is empty; give a folder"
    if not os.path.exists(source):
        return f"there is no such {'file' if str(source).endswith('.gguf') else 'folder'}; give a folder"
    if str(source).endswith(".gguf"):
        return f"is a GGUF file; make a model folder of it with: lapis import {source} --out DIR"
    return "is a file; give the folder that holds it"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; CheckpointError as `read_json` raises it, and for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {quoted(value)}, not an object; fetch the file again")
    return value


def read_json(path: Path) -> Any:
    """A JSON file; CheckpointError with line and column where it is damaged, names a key twice, or is not UTF-8."""
    try:
        with path.open("rb") as file:
            raw = file.read(JSON_LIMIT + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > JSON_LIMIT:
        raise CheckpointError(f"{path}: more than {JSON_LIMIT:,} bytes of JSON, which is the limit")
    try:
        return parse_json(raw)
    except ParseError as error:
        raise CheckpointError(f"{path}: {error}; fetch the file again") from None
