"""How commands end where the system fails them: one line, no traceback, and 0 where what was asked for is there."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lapis.checkpoint.commit import verify
from lapis.cli.main import main
from lapis.cli.system_errors import MEANINGS, system_error
from lapis.errors import OutputError

LAPIS = [sys.executable, "-m", "lapis"]


def lapis(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*LAPIS, *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False, **options)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("lapis: "), done.stderr
    return done.stderr


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven\n" * 30)
    return path


@pytest.mark.parametrize("arguments", [["inspect", "gpt2"], ["inspect", "gpt2", "--json"], ["--help"]])
def test_a_full_standard_output(arguments: Sequence[str]) -> None:
    with open("/dev/full", "w") as full:
        done = lapis(*arguments, stdout=full)
    assert done.returncode == 1 and "standard output: No space left on device" in one_line(done)


@pytest.mark.parametrize("arguments", [["inspect", "gpt2"], ["inspect", "gpt2", "--json"], ["--help"]])
def test_a_reader_that_leaves(arguments: Sequence[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = lapis(*arguments, stdout=writer)
    os.close(writer)
    assert done.returncode == 1 and "its reader has left" in one_line(done)


def test_a_closed_standard_output_is_refused_before_work(tmp_path: Path, text: Path) -> None:
    arguments = ["tokenizer", "train", text, "--vocab", "270", "--out", tmp_path / "out"]
    done = lapis(*arguments, preexec_fn=lambda: os.close(1))
    assert done.returncode == 1 and "standard output is closed" in one_line(done)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_written_is_status_0_whoever_reads(tmp_path: Path, text: Path) -> None:
    with open("/dev/full", "w") as full:
        arguments = ["tokenizer", "train", text, "--vocab", "270", "--out", tmp_path / "out", "--json"]
        done = lapis(*arguments, stdout=full)
    assert done.returncode == 0 and "is complete; standard output: No space left" in done.stderr
    assert verify(tmp_path / "out") == []


def test_a_full_or_closed_standard_error_stops_no_work(tmp_path: Path, text: Path) -> None:
    for name, closed in (("full", False), ("closed", True)):
        command = [*LAPIS, "tokenizer", "train", str(text), "--vocab", "270", "--out", str(tmp_path / name), "--json"]
        with open("/dev/full", "w") as full:
            close = (lambda: os.close(2)) if closed else None
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, preexec_fn=close, timeout=120)
        assert done.returncode == 0 and json.loads(done.stdout)["vocab"] == 270


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported(tmp_path: Path, number: signal.Signals) -> None:
    """At several moments of the second that `lapis eval` needs for its imports."""
    for delay in (0.15, 0.35, 0.6, 0.9):
        process = subprocess.Popen(
            [*LAPIS, "eval", str(tmp_path / "none"), "--text", "none"], stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        time.sleep(delay)
        process.send_signal(number)
        error_text = process.communicate(timeout=60)[1]
        ended = (process.returncode, error_text)
        if process.returncode == -number and "/lapis/" not in error_text:
            continue  # Python itself had hardly begun
        if "there is no such folder" in error_text:
            assert ended == (1, f"lapis: {tmp_path / 'none'}: there is no such folder; give a folder\n")
            break  # too late: the work was done
        assert ended == (128 + number, "lapis: stopped\n")


def test_a_signal_behind_an_error_leaves_its_line(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """torchrun ends the first process by SIGTERM as soon as another has ended, also while it says why."""

    def refuses(*_: Any, **__: Any) -> None:
        try:
            raise OutputError("out: the disk is full; make room")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("lapis.cli.main.make_app", lambda: refuses)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1 and capfd.readouterr().err == "lapis: out: the disk is full; make room\n"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_process_says_that_all_are_stopped(rank: str) -> None:
    """torchrun ends the others by SIGTERM where the first has refused, which it has said; some still import."""
    interrupted = (
        "import os, signal, lapis.cli.main as m; m.make_app = lambda: lambda *_, **__: os.kill(os.getpid(), 15)"
    )
    for script in ("from lapis.__main__ import _stop; _stop(15, None)", f"{interrupted}; m.main([])"):
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "RANK": rank}, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (143, "" if rank == "1" else "lapis: stopped\n")


def test_wrong_usage_is_said_by_the_first_process(tmp_path: Path) -> None:
    """All that torchrun started read the same command; the others end when the first has had its time to say it."""
    ended = [lapis("train", tmp_path, "--gpus", "many", env={**os.environ, "RANK": rank}) for rank in ("0", "1")]
    line = 'lapis: Invalid value for --gpus: unable to convert "many" into int. (see lapis train --help)\n'
    assert [(done.returncode, done.stderr) for done in ended] == [(2, line), (2, "")]


@pytest.mark.parametrize(
    ("words", "helps"), [("merg", "lapis"), ("delta foo", "lapis delta"), ("delta show", "lapis delta show")]
)
def test_wrong_usage_names_the_help_of_its_command(words: str, helps: str) -> None:
    done = lapis(*words.split())
    assert done.returncode == 2 and one_line(done).endswith(f" (see {helps} --help)\n")


def test_too_few_open_files(text: Path) -> None:
    script = (
        "import resource, lapis.cli.main, lapis.cli.data\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        f"lapis.cli.main.main(['data', 'show', {str(text)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "Too many open files; the limit of open files is reached" in one_line(done)


def test_a_line_has_what_where_meaning_and_remedy(tmp_path: Path) -> None:
    for number, meaning in MEANINGS.items():
        line = system_error(OSError(number, os.strerror(number), str(tmp_path / "x")))
        assert line == f"{tmp_path / 'x'}: {os.strerror(number)}; {meaning}"
        assert "; " in meaning or " or " in meaning or "check" in meaning or "free" in meaning
    both = OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b")
    assert str(system_error(both)).startswith("a -> b: Invalid cross-device link; ")


def test_an_error_without_a_path_names_the_one_in_hand(tmp_path: Path) -> None:
    def read(path: Path) -> bytes:
        with path.open("rb") as file:
            os.close(file.fileno())
            return file.read()

    (tmp_path / "model").write_bytes(b"x")
    try:
        read(tmp_path / "model")
    except OSError as error:
        assert str(system_error(error)).startswith(f"{tmp_path / 'model'}: Bad file descriptor; ")


def test_memory_depth_and_libraries_of_other_languages() -> None:
    asked = RuntimeError("[enforce fail at alloc_cpu.cpp:130] DefaultCPUAllocator: can't allocate memory: you tried "
                         "to allocate 4000 bytes. Error code 12 (Cannot allocate memory)")  # fmt: skip
    assert "out of memory (4000 bytes more were needed); free some" in str(system_error(asked))
    assert "out of memory; free some" in str(system_error(MemoryError()))
    assert "nested too deeply" in str(system_error(RecursionError("maximum recursion depth exceeded")))
    full = system_error(Exception("I/O error: No space left on device (os error 28)"))
    assert "No space left on device; the disk or the quota is full" in str(full)
    assert system_error(ValueError("a bug")) is None and system_error(RuntimeError("a bug")) is None


def test_ctrl_c_while_an_object_ends_is_not_lost() -> None:
    """Python prints what is raised there and goes on, so the signal is raised once more."""
    script = """
import os, signal, time
from lapis.cli import main
class Reader:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
def work():
    Reader()
    time.sleep(20)
    print("went on")
with main._stop_signals():
    try:
        work()
    except KeyboardInterrupt:
        print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("stopped\n", "")
