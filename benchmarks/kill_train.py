"""A training run that is killed at random moments and run again ends with the bytes of one that was not.

    python benchmarks/kill_train.py [--kills 10] [--seed 0] [--size 64]

Starts a run in a child, sends it SIGKILL at a moment drawn from the seed, starts it again, and so on until so many
kills have struck a living run; then lets it end. One thread; Muon, accumulation, an average of the weights, and a
checkpoint after each step, so that kills fall into saves as well. Prints one line of JSON; exits with 1 if the result
differs from an undisturbed run's, or was visible before it was done.
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

from lapis.text.tokenizer.tokenizer import train_tokenizer
from lapis.training.loop.progress import Silent
from lapis.training.run import read_settings, run

SAME = ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json")


def settings(place: Path, out: str, size: int) -> dict[str, object]:
    shape = {"dim": size, "layers": 2, "heads": 4, "ffn_dim": 2 * size, "tied": True}
    return {
        "objective": "causal", "new": shape, "tokenizer": str(place / "tok"), "data": str(place / "texts.jsonl"),
        "context": 32, "out": str(place / out), "steps": 150, "batch": 8, "accumulate": 2, "lr": 3e-3, "threads": 1,
        "optimizer": "muon", "ema": 0.9, "precision": "float32", "save_every": 1, "log_every": 5, "sample_every": 0,
    }  # fmt: skip


def start(place: Path, out: str, size: int) -> int:
    """The run in a child; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            run(read_settings(settings(place, out, size), "kill"), watch=Silent())
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def content(folder: Path) -> dict[str, str]:
    """sha256 of the files that must be the same, and the curve without its times."""
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SAME}
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last: dict[int, float] = {row["step"]: row["loss"] for row in rows if row["step"] % 15 == 0}
    return found | {"steps": str(sorted(last))}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--size", type=int, default=64)
    given = options.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(given.seed)
    place = Path(tempfile.mkdtemp(prefix="lapis-kill-"))
    texts = [f"The cat number {i} sat on the mat and counted to {i * 7 % 13}." for i in range(300)]
    train_tokenizer(texts, 300).save(_made(place / "tok"))
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    began = time.perf_counter()
    if os.waitpid(start(place, "whole", given.size), 0)[1] != 0:
        return 1
    whole = time.perf_counter() - began
    kills = started = visible = halves = 0
    out, journal = place / "out", place / ".out.lapis" / ".journal"
    while kills < given.kills:
        child = start(place, "out", given.size)
        started += 1
        time.sleep(chance.uniform(0.05, 1.8 / given.kills) * whole)
        os.kill(child, signal.SIGKILL)
        struck = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills += struck
        visible += struck and out.exists()
        halves += any(name.startswith(".step-") for name in os.listdir(journal)) if journal.exists() else 0
        if out.exists():
            break
    if not out.exists():
        os.waitpid(start(place, "out", given.size), 0)
    same = out.is_dir() and content(out) == content(place / "whole")
    shutil.rmtree(place)
    result = {"kills": kills, "starts": started, "saves_cut": halves, "visible_early": visible, "identical": same}
    print(json.dumps({**result, "seed": given.seed, "whole_seconds": round(whole, 1)}))
    return 0 if same and not visible and kills == given.kills else 1


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())
