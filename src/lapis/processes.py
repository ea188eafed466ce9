"""How Python is started beside this process: arguments in, a command and an environment out.

The folder that a command is run in is often one that a model or a corpus was downloaded to, so nothing is imported from
there: a `tokenizers.py` beside a text must never run.
"""

import os
import sys
from pathlib import Path

import lapis

SOURCE = Path(os.path.realpath(lapis.__file__)).parents[1]


def python(*arguments: str) -> list[str]:
    """The command that runs a script, or -c and a program, without the current folder on the import path."""
    return [sys.executable, "-P", *arguments]


def process_environment(whole: bool = True) -> dict[str, str]:
    """The variables for such a process, with the import path of this one.

    Args:
        whole: All of this process; else none but those that a library may need to load, so that no token or key is
            among them.
    """
    few = ("TZ", "SYSTEMROOT", "LD_LIBRARY_PATH")
    given = os.environ if whole else {name: os.environ[name] for name in few if name in os.environ}
    return {**given, "PYTHONPATH": os.pathsep.join(place for place in sys.path if not _is_here(place))}


def leave_current_folder() -> None:
    """Takes the current folder, which `python -m` puts first, off this process's own import path."""
    if not sys.flags.safe_path and sys.path and _is_here(sys.path[0]):
        del sys.path[0]


def _is_here(place: str) -> bool:
    """Whether a place on the import path is the current folder, and not where lapis itself lies."""
    real = os.path.realpath(place)
    return not place or (real == os.path.realpath(".") and real != str(SOURCE))
