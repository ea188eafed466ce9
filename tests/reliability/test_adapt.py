"""An adaptation that is killed, stopped or out of disk in each of its steps, one after the other: the same command goes
on each time, and at the end every model has the bytes of an undisturbed run."""

import errno
import json
import signal
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from .aimed import Ended, Forks

STEPS = ("measure", "tokenizer", "start", "embedded", "adapted", "calibrated", "grafted", "card")
MODELS = ("start", "embedded", "adapted", "calibrated", "grafted")
TIMES = (  # and places
    "training.json", "log.jsonl", "times.json", "certificate.json", "certificate.html", "lapis-merge.json",
    "lapis-manifest.json",
)  # fmt: skip
STOP = """
import os, signal, threading, time
from pathlib import Path
from lapis.cli.main import main
def press():
    while not Path({place!r}).exists():
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press, daemon=True).start()
main({arguments!r})
"""


@pytest.fixture(scope="module")
def arguments(place: Path) -> list[str]:
    """A tiny adaptation of the inputs that all jobs have."""
    words = "zebra zoology zigzag zenith zeppelin zodiac zone zinc zero zest zoom zip".split()
    lines = [" ".join(words[(i * j + i) % len(words)] for j in range(1, 14)) for i in range(1, 90)]
    inputs = place / "inputs"
    (inputs / "target.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    plan = {
        "base": str(inputs / "base"), "chat": str(inputs / "chat"), "text": [str(inputs / "target.jsonl")],
        "replay": [str(inputs / "text.txt")], "chats": [str(inputs / "chats.jsonl")], "vocab": 8, "tokens": 512,
        "tokens_per_second": 1000, "batch": 2, "context": 32, "scored": 400, "out": "out",
        "train": {"precision": "float32", "threads": 1, "compile": "off"},
    }  # fmt: skip
    (inputs / "adapt.yaml").write_text(json.dumps(plan))
    return ["adapt", "../inputs/adapt.yaml"]


@pytest.fixture(scope="module")
def whole(forks: Forks, place: Path, arguments: list[str]) -> dict[str, str]:
    """What an undisturbed run gives."""
    folder = place / "whole"
    folder.mkdir()
    done = forks.run(arguments, folder, 300)
    assert done.status == 0, done.told
    return content(folder / "out")


def content(out: Path) -> dict[str, str]:
    """What must be equal: all but times, and speeds."""
    files = {
        path.relative_to(out).as_posix(): sha256(path.read_bytes()).hexdigest()
        for name in ("measure", "tokenizer", *MODELS)
        for path in sorted((out / name).rglob("*"))
        if path.is_file() and path.name not in TIMES
    }
    card = json.loads((out / "card" / "card.json").read_text())
    for each in (*card["scores"].values(), *card["changes"].values()):
        for figures in each.values():
            figures.pop("characters_per_second", None)
    for name in ("steps", "machine"):
        del card[name]
    return {**files, "card": sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()}


def killed(forks: Forks, arguments: list[str], folder: Path, step: str) -> Ended:
    """By SIGKILL at a call within the step."""
    armed = {"FAULT_UNDER": f"{folder}/out/.{step}.lapis", "FAULT_AT": 3}
    ended = forks.run(arguments, folder, 300, **armed)
    assert ended.was_killed, f"{step}: {ended.status}: {ended.told}"
    return ended


def full(forks: Forks, arguments: list[str], folder: Path, step: str) -> Ended:
    """The disk is full when the step writes."""
    armed = {"FAULT_UNDER": f"{folder}/out/.{step}.lapis", "FAULT_KINDS": "write,allocate", "FAULT_AT": -1,
             "FAULT_ERRNO": errno.ENOSPC}  # fmt: skip
    ended = forks.run(arguments, folder, 300, **armed)
    last = ended.told.strip().splitlines()[-1]
    assert ended.status == 1 and "Traceback" not in ended.told, f"{step}: {ended.told}"
    assert last.startswith("lapis: ") and "the disk is full" in last and "the same command" in last, last
    return ended


def stopped(forks: Forks, arguments: list[str], folder: Path, step: str) -> Ended:
    """By Ctrl-C while the step is being made."""
    script = STOP.format(place=f"{folder}/out/.{step}.lapis", arguments=arguments)
    ended = forks.run(["-c", script], folder, 300)
    last = ended.told.strip().splitlines()[-1]
    assert "Traceback" not in ended.told and last.startswith("lapis: "), ended.told
    if ended.status != 128 + signal.SIGINT:  # a training says what it saved, and how to go on
        assert ended.status == 1 and "stopped by SIGINT" in last and "the same command again" in last, f"{step}: {last}"
    return ended


@pytest.mark.parametrize("trouble", [killed, full, stopped])
def test_trouble_in_each_step_loses_nothing(
    trouble: Callable[..., Ended], forks: Forks, place: Path, arguments: list[str], whole: dict[str, str]
) -> None:
    folder = place / trouble.__name__
    folder.mkdir()
    for number, step in enumerate(STEPS):
        trouble(forks, arguments, folder, step)
        there = {path.name for path in (folder / "out").iterdir() if not path.name.startswith(".")} - {"plan.yaml"}
        assert there >= set(STEPS[:number])  # what was done stays
        if trouble is not stopped:  # a signal may come when the step was just done
            assert there == set(STEPS[:number])
    done = forks.run(arguments, folder, 300)
    assert done.status == 0, done.told
    assert content(folder / "out") == whole
    assert not [path.name for path in (folder / "out").iterdir() if path.name.endswith(".lapis")]
