"""Several processes give the weights of one, only the first writes, and what goes wrong is told once."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lapis.config import dump_yaml, load_yaml, override
from lapis.model.load import load
from lapis.training.loop.progress import Silent
from lapis.training.run import read_settings, run

YAML = """
objective: causal
new: {dim: 32, layers: 2, heads: 4, ffn_dim: 48, tied: true}
tokenizer: tok
data: texts.jsonl
context: 32
out: out
steps: 50
batch: 8
lr: 0.003
threads: 1
precision: float32
compile: "off"
log_every: 1
sample_every: 0
"""


@pytest.fixture
def place(data_folder: Path) -> Path:
    (data_folder / "run.yaml").write_text(YAML)
    return data_folder


def free_port() -> int:
    with socket.socket() as result:
        result.bind(("localhost", 0))
        return int(result.getsockname()[1])


def start(
    place: Path, size: int, *settings: str, port: int | None = None, command: Sequence[str] = (),
    ranks: Sequence[int] | None = None, **more: str,
) -> list["subprocess.Popen[str]"]:  # fmt: skip
    """The processes, in the environment that torchrun gives them, with `more`; ranks: those that come at all."""
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
              "MASTER_PORT": str(port or free_port()), **more}  # fmt: skip
    command = [sys.executable, *(command or ["-m", "lapis", "train", "run.yaml", *settings])]
    return [
        subprocess.Popen(command, cwd=place, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                         stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for rank in (range(size) if ranks is None else ranks)
    ]  # fmt: skip


def finish(processes: list["subprocess.Popen[str]"]) -> list[str]:
    return [process.communicate(timeout=100)[1] for process in processes]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_processes_then_another_number_have_ones_loss(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    run(read_settings(override(load_yaml("run.yaml"), ["out=one"]), "run.yaml"), watch=Silent())
    two = start(place, 2)
    errors = finish(two)
    assert [process.returncode for process in two] == [0, 0], errors
    assert losses(place / "out") == pytest.approx(losses(place / "one"), abs=1e-5)
    for name, weight in load("one").state_dict().items():
        torch.testing.assert_close(load("out").state_dict()[name], weight, rtol=1e-4, atol=1e-5)


COMPILED = """
import functools, sys, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # all but the C++ compiler, which takes a minute
from lapis.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"], file=sys.stderr)
"""


def test_blocks_that_are_shared_out_run_compiled(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    run(read_settings(override(load_yaml("run.yaml"), ["out=one", "steps=3"]), "run.yaml"), watch=Silent())
    two = start(place, 2, command=["-c", COMPILED, "train", "run.yaml", "steps=3", "shard=full", "compile=on"])
    errors = finish(two)
    assert [process.returncode for process in two] == [0, 0], errors
    assert all(int(error.split("graphs:")[1]) > 0 for error in errors), errors
    assert losses(place / "out") == pytest.approx(losses(place / "one"), abs=1e-5)


PACED = """
import sys
from lapis.training.loop import loop
loop.measure_speed = lambda *_: {"threads": 1, "precision": "float32", "compile": False, "seconds_per_token": 1.0}
from lapis.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("size", "expected"), [(1, "4:16 for a step, 8:32 left"), (2, "2:08 for a step, 4:16 left")])
def test_a_step_of_two_processes_is_expected_in_half_the_time(place: Path, size: int, expected: str) -> None:
    processes = start(place, size, command=["-c", PACED, "train", "run.yaml", "steps=2", "shard=none"])
    errors = finish(processes)
    assert [process.returncode for process in processes] == [0] * size, errors
    assert f"train: step 1 of 2: about {expected}" in errors[0], errors


def test_two_processes_end_within_the_limits_of_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    birds = [json.dumps({"text": f"Birds sing {i} songs over the sea."}) for i in range(40)]
    Path("birds.jsonl").write_text("\n".join(birds) + "\n")
    settings = {**load_yaml("run.yaml"), "data": "birds.jsonl", "out": "birds"}
    run(read_settings(settings, "run.yaml"), watch=Silent())
    del settings["new"]
    settings |= {"model": "birds", "data": "texts.jsonl", "valid": {"birds": "birds.jsonl"}, "eval_every": 2,
                 "limits": {"birds/bits_per_byte": "30%"}, "out": "one", "ema": 0.5}  # fmt: skip
    result = run(read_settings(settings, "run.yaml"), watch=Silent())
    Path("run.yaml").write_text(dump_yaml({**settings, "out": "out"}))
    two = start(place, 2)
    errors = finish(two)
    assert [process.returncode for process in two] == [0, 0], errors
    facts = json.loads(Path("out/training.json").read_text())
    assert result.ended and facts["steps"] == result.steps < 50 and facts["best_step"] == result.best_step
    for name, weight in load("one").state_dict().items():
        torch.testing.assert_close(load("out").state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def stopped(place: Path, size: int, *settings: str) -> list[str]:
    """Starts processes, ends the last of them by SIGTERM when a checkpoint of theirs is there, and what all said."""
    before = checkpoints(place)
    processes = start(place, size, *settings)
    while checkpoints(place) <= before:
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.01)
    processes[-1].terminate()
    errors = finish(processes)
    assert [process.returncode for process in processes] == [1] * size
    return errors


def checkpoints(place: Path) -> set[str]:
    return {path.name for path in (place / ".out.lapis" / ".journal").glob("step-*")}


def test_fault_67_stopped_twice_and_resumed_by_other_processes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to one of two processes stops both at one step; one goes on and is stopped, two finish: one's curve."""
    monkeypatch.chdir(place)
    settings = ["save_every=5", "steps=200", "keep=100"]
    errors = stopped(place, 2, *settings)
    assert "stopped by SIGTERM after step" in errors[0] and "Run the same command again" in errors[0]
    assert errors[1] == ""  # told once
    stopped(place, 1, *settings)
    newest = max((place / ".out.lapis" / ".journal").glob("step-*"), key=lambda path: int(path.name[5:]))
    for name in ("model", "optimizer"):  # of which each process reads one
        content = bytearray((newest / f"{name}.safetensors").read_bytes())
        content[-1] ^= 1
        (newest / f"{name}.safetensors").write_bytes(content)
    last = start(place, 2, *settings)
    errors = finish(last)
    assert [process.returncode for process in last] == [0, 0], errors
    assert f"{newest} is damaged (model.safetensors, optimizer.safetensors); falling back" in errors[0], errors
    run(read_settings(override(load_yaml("run.yaml"), [*settings, "out=one"]), "run.yaml"), watch=Silent())
    assert losses(place / "out") == pytest.approx(losses(place / "one"), abs=1e-5)


def test_a_port_in_use_and_a_missing_file_are_one_line(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        both = start(place, 2, port=int(taken.getsockname()[1]), LAPIS_PATIENCE="5")
        errors = finish(both)
    assert [process.returncode for process in both] == [1, 1], errors
    for error in errors:
        assert "the port is in use; give torchrun another port" in error and error.count("\n") == 1, error


def test_fault_69_a_process_that_dies_ends_all(place: Path) -> None:
    """SIGKILL to either of two: the other sees the broken connection, and says how to go on, once."""
    runs = {}
    for rank in (0, 1):
        runs[rank] = start(place, 2, f"out=dies{rank}", "save_every=5", "steps=100000")
    for rank, processes in runs.items():
        while not list((place / f".dies{rank}.lapis" / ".journal").glob("step-*/state.json")):
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.05)
        processes[rank].kill()
    for rank, processes in runs.items():
        error_text = processes[1 - rank].communicate(timeout=30)[1]
        processes[rank].communicate()
        lines = [line for line in error_text.splitlines() if line.startswith("lapis: ")]
        assert processes[1 - rank].returncode == 1 and "Traceback" not in error_text, error_text
        again = (
            f"run the same command again to go on from the last checkpoint, {place}/.dies{rank}.lapis/.journal/step-"
        )
        assert len(lines) == 1 and again in lines[0], lines


def test_fault_69_a_stopped_process_ends_all_by_name(place: Path) -> None:
    """SIGSTOP to either of two processes: the other ends by itself, and says in one line which one it was."""
    runs = {}
    for rank in (0, 1):  # both at once, since each waits out the silence
        folder = f"out{rank}"
        runs[rank] = start(place, 2, f"out={folder}", "save_every=5", "steps=100000")
    for rank, processes in runs.items():
        while not list((place / f".out{rank}.lapis" / ".journal").glob("step-*/state.json")):
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.05)
        processes[rank].send_signal(signal.SIGSTOP)
    for rank, processes in runs.items():
        error_text = processes[1 - rank].communicate(timeout=100)[1]
        processes[rank].kill()
        processes[rank].communicate()
        lines = [line for line in error_text.splitlines() if line.startswith("lapis: ")]
        assert processes[1 - rank].returncode == 1 and len(lines) == 1 and "Traceback" not in error_text, error_text
        assert (
            f"rank {rank} has not answered for" in lines[0]
            and f"from the last checkpoint, {place}/.out{rank}." in lines[0]
        )


def test_fault_69_a_process_that_computes_for_ever_ends_all(place: Path) -> None:
    """It answers, so nothing but the steps that it does not come forward shows it."""
    script = (
        "import os, time\nfrom lapis.config import load_yaml\nfrom lapis.errors import LapisError\n"
        "from lapis.training.objectives.supervised.next_token import Causal\n"
        "from lapis.training.run import read_settings, run\n"
        "prepare, calls = Causal.prepare, []\n"
        "def stuck(self, model, batch):\n"
        "    calls.append(1)\n"
        "    while os.environ['RANK'] == '1' and len(calls) == 20:\n        time.sleep(0.001)\n"
        "    return prepare(self, model, batch)\n"
        "Causal.prepare = stuck\n"
        "run(read_settings(load_yaml('run.yaml'), 'run.yaml'))\n"
    )
    processes = start(place, 2, command=["-c", script], LAPIS_PATIENCE="10")
    errors = finish(processes)
    assert [process.returncode for process in processes] == [1, 1], errors
    lines = [line for error in errors for line in error.splitlines() if line.startswith("lapis: ")]
    assert len(lines) == 1 and "Traceback" not in "".join(errors), errors
    assert "rank 1 computes, and has come no step forward for" in lines[0] and "while rank 0 waits" in lines[0]
    assert "LAPIS_PATIENCE=SECONDS" in lines[0] and "go on from the last checkpoint" in lines[0]


def test_fault_69_processes_that_never_come_are_named(place: Path) -> None:
    """The last two of three; and the first, which holds the place where they meet."""
    alone = start(place, 3, ranks=[0], LAPIS_PATIENCE="6")
    without_first = start(place, 3, ranks=[1, 2], LAPIS_PATIENCE="6")
    ended = [finish(alone), finish(without_first)]
    assert [process.returncode for process in alone + without_first] == [1, 1, 1], ended
    assert "train: waiting for rank 1, 2 of 3" in ended[0][0]
    for errors, missing in zip(ended, ("1, 2", "0"), strict=True):
        lines = [line for error in errors for line in error.splitlines() if line.startswith("lapis: ")]
        assert len(lines) == 1 and "Traceback" not in "".join(errors), errors
        assert f"rank {missing} of 3 has not come to localhost:" in lines[0] and "start all of them" in lines[0]
        assert all(line.startswith(("lapis: train: ", "train: waiting")) for e in errors for line in e.splitlines())


def test_processes_that_are_all_stopped_for_a_while_go_on(place: Path) -> None:
    """Ctrl-Z and fg: nobody was missing."""
    processes = start(place, 2, "save_every=5", "steps=60")
    while not checkpoints(place):
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.05)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            process.send_signal(number)
        time.sleep(3)
    errors = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], errors


def test_a_rank_without_a_place_to_meet_is_one_line(place: Path) -> None:
    others = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}  # trainers of others set it
    environment = {**others, "RANK": "0", "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "lapis", "train", "run.yaml"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "RANK is set and MASTER_ADDR is not" in done.stderr


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_WORLD_SIZE"])
def test_an_environment_without_numbers_is_one_line(place: Path, name: str) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", name: "two"}
    command = [sys.executable, "-m", "lapis", "train", "run.yaml"]
    if name == "LOCAL_WORLD_SIZE":
        command[3:] = ["data", "pack", "texts.jsonl", "--tokenizer", "tok", "--out", "packed"]
        environment = {**os.environ, name: "two"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f'{name} is "two" in the environment; torchrun sets it to a whole number' in done.stderr
