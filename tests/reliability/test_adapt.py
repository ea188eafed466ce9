"""An adaptation that is killed, stopped or out of disk in each of its steps, one after the other: the same command goes
on each time, and at the end every model has the bytes of an undisturbed run."""

import errno
import json
import signal
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from .aimed import Ended, Forks

# plan -> its settings, and the steps in which there is trouble: all of the first, and those that only others have
PLANS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "graft": ({}, ("measure", "tokenizer", "start", "embedded", "adapted", "calibrated", "grafted", "card")),
    "chat": ({"onto": "chat", "replay": "self", "merge_back": 0.1}, ("replay", "merged", "restored")),
    "scales": ({"chat": "wordy", "scale": "plan", "embedded": 0, "vocab": 0}, ("worded", "planned")),
}
TROUBLED = [(plan, trouble) for plan in PLANS for trouble in ("killed", "full", "stopped")]
TIMES = (  # and places
    "training.json", "log.jsonl", "times.json", "certificate.json", "certificate.html", "lapis-merge.json",
    "lapis-manifest.json", "README.md",
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
def plans(forks: Forks, place: Path) -> dict[str, list[str]]:
    """The commands of tiny adaptations of the inputs that all jobs have."""
    words = "zebra zoology zigzag zenith zeppelin zodiac zone zinc zero zest zoom zip".split()
    lines = [" ".join(words[(i * j + i) % len(words)] for j in range(1, 14)) for i in range(1, 90)]
    inputs, work = place / "inputs", place / "adapting"
    work.mkdir()
    (inputs / "target.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for arguments in (
        ["train", "../inputs/chat.yaml", "steps=8", "lr=0.01", "out=../inputs/talks"],  # replies to what it is asked
        ["tokenizer", "extend", "../inputs/talks", "../inputs/target.jsonl", "--add", "2", "--out", "../inputs/wordy"],
    ):
        assert forks.run(arguments, work, 300).status == 0
    add_tags(inputs / "wordy")
    shared = {
        "base": "base", "chat": "chat", "text": [str(inputs / "target.jsonl")], "replay": [str(inputs / "text.txt")],
        "chats": [str(inputs / "chats.jsonl")], "vocab": 8, "tokens": 512, "tokens_per_second": 1000, "batch": 2,
        "context": 32, "scored": 400, "out": "out", "train": {"precision": "float32", "threads": 1, "compile": "off"},
    }  # fmt: skip
    for name, (settings, _) in PLANS.items():
        plan = {**shared, **settings}
        plan |= {role: str(inputs / plan[role]) for role in ("base", "chat")}
        (inputs / f"adapt-{name}.yaml").write_text(json.dumps(plan))
    return {name: ["adapt", f"../inputs/adapt-{name}.yaml"] for name in PLANS}


def add_tags(folder: Path) -> None:
    """The last two tokens become tags that the template writes, as chat models have them beyond their base's."""
    file, settings = folder / "tokenizer.json", json.loads((folder / "tokenizer_config.json").read_text())
    known = json.loads(file.read_text())
    learned = known["model"]
    for token in sorted(learned["vocab"], key=learned["vocab"].__getitem__)[-2:]:
        number = learned["vocab"].pop(token)
        learned["merges"].pop()
        tag = f"<|tag{number}|>"
        known["added_tokens"].append({**known["added_tokens"][0], "id": number, "content": tag})
        settings["added_tokens_decoder"][str(number)] = {**settings["added_tokens_decoder"]["0"], "content": tag}
        settings["chat_template"] = tag + settings["chat_template"]
    file.write_text(json.dumps(known))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def whole(forks: Forks, place: Path, plans: dict[str, list[str]]) -> Callable[[str], dict[str, str]]:
    """What an undisturbed run of a plan gives."""

    @cache
    def run(name: str) -> dict[str, str]:
        folder = place / f"whole-{name}"
        folder.mkdir()
        done = forks.run(plans[name], folder, 300)
        assert done.status == 0, done.told
        assert {step for step in PLANS[name][1] if not (folder / "out" / step).is_dir()} == set()
        return content(folder / "out")

    return run


def content(out: Path) -> dict[str, str]:
    """What must be equal: all but times, and speeds."""
    files = {
        path.relative_to(out).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("*/*"))
        if path.is_file()
        and path.name not in TIMES
        and not path.parent.name.startswith(".")
        and path.parent.name != "card"
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


TROUBLES = {"killed": killed, "full": full, "stopped": stopped}


@pytest.mark.parametrize(("plan", "trouble"), TROUBLED)
def test_trouble_in_each_step_loses_nothing(
    plan: str, trouble: str, forks: Forks, place: Path, plans: dict[str, list[str]],
    whole: Callable[[str], dict[str, str]],
) -> None:  # fmt: skip
    folder = place / f"{plan}-{trouble}"
    folder.mkdir()
    expected, before = whole(plan), set[str]()
    for step in PLANS[plan][1]:
        TROUBLES[trouble](forks, plans[plan], folder, step)
        there = {path.name for path in (folder / "out").iterdir() if not path.name.startswith(".")} - {"plan.yaml"}
        assert there >= before and (
            trouble == "stopped" or step not in there
        )  # a signal may come when it was just done
        before = there
    done = forks.run(plans[plan], folder, 300)
    assert done.status == 0, done.told
    assert content(folder / "out") == expected
    assert not [path.name for path in (folder / "out").iterdir() if path.name.endswith(".lapis")]
