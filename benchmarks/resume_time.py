"""How long until the first step of a run that goes on at 90 % of its data, beside that of a new run.

    python benchmarks/resume_time.py [--megabytes 100] [--rounds 3] [--write]

Text of that size is packed once. A run begins at 90 % of the rows, is stopped after three steps, and goes on; each
first step is timed from the call of `run` on, by the wall clock and in seconds of the processor, in a process of its
own. One thread. `--write` puts the table into benchmarks/results/resume_time.md.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results_file import add_table

from lapis.text.rows.mixture import draws
from lapis.text.rows.packing import pack
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.run import read_settings, run

SHARE = 0.9
WORDS = [a + b for a in ("ka", "mo", "ri", "su", "ten", "lo") for b in ("ma", "no", "ra", "si", "tu", "wen", "yo")]


class StoppedError(Exception):
    """The first step is done."""


class FirstStep(Silent):
    def __init__(self, steps: int) -> None:
        self.wall, self.processor, self.left = time.perf_counter(), time.process_time(), steps
        self.times: dict[str, float] = {}

    def step(self, row: Any) -> None:
        if not self.times:
            self.times = {"wall": time.perf_counter() - self.wall, "processor": time.process_time() - self.processor}
        self.left -= 1
        if not self.left:
            raise StoppedError


def child(place: Path, act: str) -> dict[str, float]:
    torch.set_num_threads(1)
    batches = Causal.batches

    def late(self: Causal, state: Any) -> Any:
        cursor = {"epoch": 0, "row": int(SHARE * len(self.examples)), "seed": state.seed}
        return draws(self.examples, state.rows, state.seed, state.cursor or cursor)

    if act == "late":
        Causal.batches = late  # type: ignore[method-assign]
    shape = {"dim": 128, "layers": 4, "heads": 4, "ffn_dim": 352, "tied": True}
    settings = {
        "objective": "causal", "new": shape, "tokenizer": str(place / "tok"), "data": str(place / "rows"),
        "out": str(place / ("new" if act == "new" else "out")), "epochs": 1, "batch": 8, "threads": 1,
        "precision": "float32", "compile": "off", "sample_every": 0, "save_every": 2,
    }  # fmt: skip
    watch = FirstStep(3 if act == "late" else 1)
    try:
        run(read_settings(settings, "resume"), watch=watch, fresh=act == "late")
    except StoppedError:
        pass
    Causal.batches = batches  # type: ignore[method-assign]
    return watch.times


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--megabytes", type=int, default=100)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--write", action="store_true")
    options.add_argument("--child", nargs=2, metavar=("PLACE", "ACT"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        print(json.dumps(child(Path(given.child[0]), given.child[1])))
        return 0
    place = Path(tempfile.mkdtemp(prefix="lapis-resume-"))
    prepare(place, given.megabytes)
    times: dict[str, list[dict[str, float]]] = {"new": [], "resumed": []}
    for _ in range(given.rounds):
        for act in ("new", "late", "resumed"):
            command = [sys.executable, __file__, "--child", str(place), act]
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, text=True,
                                  stdout=subprocess.PIPE)  # fmt: skip
            if act != "late":
                times[act].append(json.loads(done.stdout.splitlines()[-1]))
                print(act, times[act][-1], flush=True)
    shutil.rmtree(place)
    middle = {act: {clock: statistics.median(entry[clock] for entry in many) for clock in ("wall", "processor")}
              for act, many in times.items()}  # fmt: skip
    table = ["| first step of | seconds | of the processor |", "|---|--:|--:|"]
    table += [f"| {act} run | {each['wall']:.2f} | {each['processor']:.2f} |" for act, each in middle.items()]
    later = {clock: middle["resumed"][clock] - middle["new"][clock] for clock in ("wall", "processor")}
    table.append(f"| difference | {later['wall']:+.2f} | {later['processor']:+.2f} |")
    print("\n".join(table))
    if given.write:
        date = time.strftime("%Y-%m-%d")
        about = f"{given.megabytes} MB of text, packed; medians of {given.rounds}; one thread."
        add_table(__file__, "The first step of a run that goes on", [f"## {date}", "", about, "", *table])
    return 0


def prepare(place: Path, megabytes: int) -> None:
    """A tokenizer, and text of that size as packed rows."""
    chance = random.Random(0)
    lines = [" ".join(chance.choices(WORDS, k=60)) + "." for _ in range(2000)]
    (place / "tok").mkdir()
    train_tokenizer(lines[:200], 400).save(place / "tok")
    text, size = place / "text.jsonl", 0
    with text.open("w") as file:
        while size < megabytes * 1_000_000:
            line = " ".join(chance.choices(lines, k=8))
            file.write(json.dumps({"text": line}) + "\n")
            size += len(line)
    pack([text], Tokenizer.open(place / "tok"), place / "rows", 256)
    text.unlink()


if __name__ == "__main__":
    sys.exit(main())
