"""A training run that is killed at random moments and run again ends with the bytes of one that was not.

    python benchmarks/kill_train.py [--kills 100] [--seed 0] [--size 64] [--steps 200]

Starts a run in a child, sends it SIGKILL at a moment drawn from the seed (after so many steps, and a part of one),
starts it again, and so on until it ends; then begins another run, until so many kills have struck a living one. One
thread; Muon, accumulation, an average of the weights, and a checkpoint after each step, so that kills fall into saves
as well. After each kill every checkpoint that loads (its manifest agrees) is compared with the one that a run that
nobody killed had after the same step: weights, optimizer, random generators, average, the learning curve without its
times. Prints one line of JSON; exits with 1 if a checkpoint or a result differs, or a result was visible too early.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from lapis.checkpoint.commit import verify
from lapis.text.tokenizer.tokenizer import train_tokenizer
from lapis.training.loop import state as checkpoints
from lapis.training.loop.progress import Silent
from lapis.training.result import OF_TIME
from lapis.training.run import read_settings, run

RESULT = ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "training.json", "log.jsonl")
CHECKPOINT = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "average.safetensors", "log.jsonl")
PER_RUN = 25  # kills, about


def settings(place: Path, out: str, size: int, steps: int) -> dict[str, object]:
    shape = {"dim": size, "layers": 2, "heads": 4, "ffn_dim": 2 * size, "tied": True}
    return {
        "objective": "causal", "new": shape, "tokenizer": str(place / "tok"), "data": str(place / "texts.jsonl"),
        "context": 32, "out": str(place / out), "steps": steps, "batch": 8, "accumulate": 2, "lr": 3e-3, "threads": 1,
        "optimizer": "muon", "ema": 0.9, "precision": "float32", "save_every": 1, "log_every": 5, "sample_every": 0,
    }  # fmt: skip


def start(place: Path, out: str, given: argparse.Namespace, record: Path | None = None) -> int:
    """The run in a child; returns its process id. record: a file that gets the digests of each checkpoint."""
    child = os.fork()
    if child == 0:
        try:
            if record is not None:
                recorded(record)
            run(read_settings(settings(place, out, given.size, given.steps), "kill"), watch=Silent())
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def newest(journal: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((int(folder.name.removeprefix("step-")) for folder in journal.glob("step-*")), default=0)


def wait_for(journal: Path, steps: int, child: int) -> None:
    """Until so many more steps are saved, or the child has ended."""
    goal = newest(journal) + steps
    while steps and newest(journal) < goal and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)


def recorded(record: Path) -> None:
    """Has each checkpoint of this process noted as it is written."""
    write = checkpoints.CheckpointJournal.write

    def noted(self: checkpoints.CheckpointJournal, *arguments: object) -> Path:
        folder = write(self, *arguments)  # type: ignore[arg-type]
        with record.open("a") as file:
            file.write(json.dumps({folder.name: digests(folder, CHECKPOINT)}) + "\n")
        return folder

    checkpoints.CheckpointJournal.write = noted  # type: ignore[method-assign]


def digests(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """sha256 of files; of a curve without what a clock said."""
    result = {}
    for name in names:
        content = (folder / name).read_bytes()
        if name == "log.jsonl":
            rows = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([{k: v for k, v in row.items() if k not in OF_TIME} for row in rows]).encode()
        result[name] = hashlib.sha256(content).hexdigest()
    return result


def wrong_checkpoints(journal: Path, right: dict[str, dict[str, str]]) -> tuple[int, list[str]]:
    """How many checkpoints load, and what of which is not as it should be."""
    loadable, wrong = 0, []
    for folder in journal.glob("step-*"):
        try:
            if verify(folder):
                continue
        except (OSError, ValueError):
            continue
        loadable += 1
        mine = digests(folder, CHECKPOINT)
        wrong += [f"{folder.name}/{name}" for name in CHECKPOINT if mine[name] != right[folder.name][name]]
    return loadable, wrong


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--size", type=int, default=64)
    options.add_argument("--steps", type=int, default=200)
    given = options.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(given.seed)
    place = Path(tempfile.mkdtemp(prefix="lapis-kill-"))
    texts = [f"The cat number {i} sat on the mat and counted to {i * 7 % 13}." for i in range(300)]
    (place / "tok").mkdir()
    train_tokenizer(texts, 300).save(place / "tok")
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    # in this process, so that children need not import anything
    run(read_settings(settings(place, "first", given.size, 1), "kill"), watch=Silent())
    began = time.perf_counter()
    if os.waitpid(start(place, "whole", given, place / "checkpoints"), 0)[1] != 0:
        return 1
    whole = time.perf_counter() - began
    right: dict[str, dict[str, str]] = {}
    for line in (place / "checkpoints").read_text().splitlines():
        right |= json.loads(line)
    expected = digests(place / "whole", RESULT)
    kills = starts = runs = halves = loaded = visible = 0
    wrong: list[str] = []
    out, journal = place / "out", place / ".out.lapis" / ".journal"
    while kills < given.kills or not out.exists():
        child = start(place, "out", given)
        starts += 1
        if kills < given.kills:
            wait_for(journal, chance.randrange(2 * given.steps // PER_RUN), child)
            time.sleep(chance.uniform(0, 1.5 * whole / given.steps))
            os.kill(child, signal.SIGKILL)
        struck = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills += struck
        if struck and journal.exists():
            visible += out.exists()
            halves += any(name.startswith(".step-") for name in os.listdir(journal))
            number, different = wrong_checkpoints(journal, right)
            loaded, wrong = loaded + number, wrong + different
        if out.exists():
            runs += 1
            mine = digests(out, RESULT)
            wrong += [f"run {runs}: {name}" for name in RESULT if mine[name] != expected[name]]
            if kills < given.kills:
                shutil.rmtree(out)
    shutil.rmtree(place)
    result = {
        "kills": kills, "starts": starts, "runs": runs, "saves_cut": halves, "checkpoints_loaded": loaded,
        "visible_early": visible, "wrong": wrong, "seed": given.seed, "steps": given.steps,
        "whole_seconds": round(whole, 1),
    }  # fmt: skip
    print(json.dumps(result))
    return 1 if wrong or visible else 0


if __name__ == "__main__":
    sys.exit(main())
