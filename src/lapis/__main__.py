"""python -m lapis, so that `torchrun -m lapis` works, and the `lapis` command."""

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line of this process.

    A signal that comes before or after the command itself finds nothing to be saved: it ends the process at once.
    """
    listened = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
    for number in listened:
        signal.signal(number, _stop)
    if "RANK" in os.environ:  # of several processes; where one has died the others say so, without frames of C++
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from lapis.processes import leave_current_folder

    leave_current_folder()
    from lapis.cli.main import main as run

    try:
        run()
    finally:
        for number in listened:
            signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":  # torchrun ends the others where the first has ended, and said why
        os.write(2, b"lapis: stopped\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
