"""Kill a graft at random moments and run it again: the same bytes, and nothing half-done to be seen?

    python benchmarks/kill.py --rounds 200 --seed 0

Each round starts the graft in a process of its own, ends it with SIGKILL after a seeded random time (now and then the
rerun too), looks at the output path, and runs it to the end. Every other round swaps an existing output (--overwrite).
Prints one line of JSON; exits with 1 if a wrong output was ever visible or a result differs from an undisturbed run's.
Journal lines are written every half megabyte, so that small models have many.
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
from safetensors.torch import save_file

from lapis.weights.engine import stream, writer
from lapis.weights.graft.graft import graft

LAYERS, DIM = 6, 512
stream.RECORD, writer.BLOCK = 1 << 19, 1 << 16


def make(folder: Path, seed: int, shards: int = 1) -> Path:
    """A small model with random weights, about 20 MB; with different seeds, fine-tunes of one."""
    common, random_ = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors = {"model.embed_tokens.weight": (4096, DIM), "model.norm.weight": (DIM,)}
    for i in range(LAYERS):
        tensors |= {f"model.layers.{i}.self_attn.{p}_proj.weight": (DIM, DIM) for p in "qkvo"}
        tensors |= {f"model.layers.{i}.mlp.{p}_proj.weight": (DIM, DIM) for p in ("up", "gate", "down")}
    values = {
        n: (torch.randn(shape, generator=common) + 0.2 * torch.randn(shape, generator=random_)).bfloat16()
        for n, shape in tensors.items()
    }
    placed = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(tensors)}
    if shards == 1:
        save_file(values, folder / "model.safetensors")
    else:
        for file in set(placed.values()):
            save_file({n: values[n] for n in tensors if placed[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    config = {"model_type": "llama", "hidden_size": DIM, "vocab_size": 4096, "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def start(models: dict[str, Path], out: Path, scale: float, overwrite: bool) -> int:
    """The graft in a child; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            graft(**models, out=out, scale=scale, overwrite=overwrite)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(given.seed)
    place = Path(tempfile.mkdtemp(prefix="lapis-kill-"))
    models = {"base": make(place / "base", 1), "chat": make(place / "chat", 2), "onto": make(place / "onto", 3, 2)}
    reference, before, out = place / "reference", place / "before", place / "out"
    times = []

    def whole(folder: Path, scale: float, overwrite: bool = False) -> None:
        began = time.perf_counter()
        os.waitpid(start(models, folder, scale, overwrite), 0)
        times.append(time.perf_counter() - began)

    for folder, scale in ((reference, 0.7), (before, 0.2), (place / "again", 0.7)):
        whole(folder, scale)
    wanted, old = content(reference), content(before)
    result = dict.fromkeys(("rounds", "kills", "resumed", "identical", "wrong_visible"), 0)
    while result["rounds"] < given.rounds:
        overwrite = result["rounds"] % 2 == 1
        if overwrite:
            shutil.copytree(before, out)
        killed = 0
        for _ in range(chance.choice((1, 1, 2, 3))):
            child = start(models, out, 0.7, overwrite)
            time.sleep(chance.uniform(0, 1.1 * min(times[-5:])))
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            seen = content(out) if out.exists() else None
            result["wrong_visible"] += seen not in ((old, wanted) if overwrite else (None, wanted))
            if seen == wanted:
                break
        staging = place / ".out.lapis"
        if killed:  # a round whose graft was done before the signal came does not count
            result["rounds"] += 1
            result["kills"] += killed
            if seen != wanted:
                journal = staging / ".journal.jsonl"
                result["resumed"] += journal.is_file() and journal.read_bytes().count(b"\n") > 1
                whole(out, 0.7, overwrite)
            result["identical"] += out.is_dir() and content(out) == wanted
        shutil.rmtree(staging, ignore_errors=True)  # killed between the swap and the removal of what was swapped out
        shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(place)
    print(json.dumps(result | {"seed": given.seed}))
    return 0 if result["identical"] == result["rounds"] and not result["wrong_visible"] else 1


if __name__ == "__main__":
    sys.exit(main())
