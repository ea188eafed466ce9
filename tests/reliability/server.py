"""A process that has imported lapis and torch once, and forks a child for each command that it is sent.

A trial then costs its own work and no imports. A line of JSON comes in for each command, {"arguments", "folder",
"environment", "seconds", "told"}, and a line {"status"} goes out; `told` is the stem of the files that get what the
command prints; arguments that begin with -c are Python. The process is started with the fault library in front of the
C library: what a command's environment arms strikes in its child alone.
"""

import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
import time
from typing import Any

import lapis

# what commands import besides, when they come to it
LATE = ("jinja2.sandbox", "safetensors.torch", "tokenizers", "torch.nn.attention", "torch.utils.checkpoint", "yaml",
        "torch.distributed", "torch._dynamo", "rich.progress", "plotly.graph_objects", "encodings.utf_8_sig",
        "getpass")  # fmt: skip


def import_all() -> None:
    for module in pkgutil.walk_packages(lapis.__path__, "lapis."):
        if not module.name.endswith(("__main__", "pattern_process", "evaluation.harness")):
            importlib.import_module(module.name)
    for name in (*LATE, *sys.argv[1:]):
        importlib.import_module(name)


def run(command: dict[str, Any]) -> None:
    """In the child: one command line, and the end of the process as Python would end it."""
    os.setsid()
    os.environ.update(command["environment"])
    os.chdir(command["folder"])
    for number, end in ((1, "out"), (2, "err")):
        handle = os.open(f"{command['told']}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, number)
        os.close(handle)
    status = 0
    try:
        if command["arguments"][0] == "-c":
            exec(command["arguments"][1], {"__name__": "__main__"})
        else:
            importlib.import_module("lapis.cli.main").main(command["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait(child: int, seconds: float) -> int | None:
    """The child's status, negative for a signal; None where it was still running, and was killed."""
    end, pause = time.monotonic() + seconds, 0.001
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)


def main() -> None:
    import_all()
    gc.collect()
    gc.freeze()  # children share these pages
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            run(command)
        print(json.dumps({"status": wait(child, command["seconds"])}), file=replies, flush=True)


if __name__ == "__main__":
    main()
