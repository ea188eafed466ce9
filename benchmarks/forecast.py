"""What `lapis train --plan-only` predicts beside what the run then takes: time and memory of five sizes of model.

    python benchmarks/forecast.py [--sizes 1M,4M,12M,30M,60M] [--keep FILE] [--write]

Each size is forecast in one process and then run in another, so that neither warms the other's memory. On a machine
that others use, too, the wall clock of the two differs by what they do meanwhile; so both also count the seconds of the
processor that their steps took, which nobody else can stretch as far. One thread, float32. `--write` puts the table
into benchmarks/results/forecast.md; what a file of `--keep` has already is not measured again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hardware import processor as processor_name
from results_file import add_table

from lapis.text.tokenizer.tokenizer import train_tokenizer
from lapis.training.loop import loop
from lapis.training.loop.progress import Silent
from lapis.training.run import plan, read_settings, run

# shape, rows of a step, steps
SIZES: dict[str, tuple[dict[str, int], int, int]] = {
    "1M": ({"dim": 128, "layers": 5, "heads": 4, "ffn_dim": 352}, 8, 60),
    "4M": ({"dim": 256, "layers": 5, "heads": 4, "ffn_dim": 704}, 4, 40),
    "12M": ({"dim": 384, "layers": 7, "heads": 6, "ffn_dim": 1024}, 2, 25),
    "30M": ({"dim": 512, "layers": 9, "heads": 8, "ffn_dim": 1408}, 1, 20),
    "60M": ({"dim": 640, "layers": 12, "heads": 10, "ffn_dim": 1728}, 1, 15),
}
CONTEXT = 128


def settings(place: Path, size: str) -> Any:
    shape, batch, steps = SIZES[size]
    given = {
        "objective": "causal", "new": {**shape, "tied": True}, "tokenizer": str(place / "tok"),
        "data": str(place / "texts.jsonl"), "context": CONTEXT, "out": str(place / f"out-{size}"), "steps": steps,
        "batch": batch, "threads": 1, "precision": "float32", "compile": "off", "sample_every": 0,
    }  # fmt: skip
    return read_settings(given, "forecast")


def child(place: Path, size: str, act: str) -> dict[str, float]:
    """One forecast, or one run: wall and processor seconds of its steps, and bytes at the peak."""
    torch.set_num_threads(1)
    processor: list[float] = []
    step = loop.TrainingRun.step

    def counted(self: loop.TrainingRun, batches: Any) -> None:
        start = time.process_time()
        step(self, batches)
        processor.append(time.process_time() - start)

    loop.TrainingRun.step = counted  # type: ignore[method-assign]
    config = settings(place, size)
    if act == "forecast":
        expected = plan(config, watch=Silent())
        cost = statistics.median(processor[1:]) * expected.steps
        return {"seconds": expected.seconds, "processor": cost, "memory": expected.memory.total}
    result = run(config, watch=Silent())
    return {"seconds": result.seconds, "processor": sum(processor), "memory": result.memory_bytes,
            "after_five": result.predicted["seconds"]}  # fmt: skip


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--sizes", default=",".join(SIZES))
    options.add_argument("--keep", type=Path, help="where a line for each size is added as it is measured")
    options.add_argument("--write", action="store_true")
    options.add_argument("--child", nargs=3, metavar=("PLACE", "SIZE", "ACT"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        place, size, act = given.child
        print(json.dumps(child(Path(place), size, act)))
        return 0
    rows, kept = [], {}
    if given.keep is not None and given.keep.exists():
        kept = {entry["size"]: entry for entry in map(json.loads, given.keep.read_text().splitlines())}
    with tempfile.TemporaryDirectory(prefix="lapis-forecast-") as folder:
        place = Path(folder)
        texts = [f"The cat number {i} sat on the mat and counted to {i * 7 % 13} by {i % 97}." for i in range(6000)]
        (place / "tok").mkdir()
        train_tokenizer(texts[:600], 320).save(place / "tok")
        (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        for size in given.sizes.split(","):
            measured = kept.get(size, {"size": size})
            for act in ("forecast", "run") if size not in kept else ():
                command = [sys.executable, __file__, "--child", str(place), size, act]
                done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
                                      stdout=subprocess.PIPE, text=True)  # fmt: skip
                measured[act] = json.loads(done.stdout.splitlines()[-1])
            rows.append(row(size, measured["forecast"], measured["run"]))
            print(json.dumps(measured), flush=True)
            if given.keep is not None and size not in kept:
                with given.keep.open("a") as file:
                    file.write(json.dumps(measured) + "\n")
    table = ["| model | steps | seconds: predicted, taken | off by | of the processor | off by | MB: predicted, held "
             "| off by |", "|---|--:|--:|--:|--:|--:|--:|--:|", *rows]  # fmt: skip
    print("\n".join(table))
    if given.write:
        date = time.strftime("%Y-%m-%d")
        title = "What --plan-only predicts, beside what the run takes"
        add_table(
            __file__,
            title,
            [f"## {date}, {processor_name()}, {os.cpu_count()} cores", "", "One thread, float32.", "", *table],
        )
    return 0


def row(size: str, expected: dict[str, float], taken: dict[str, float]) -> str:
    cells = [size, str(SIZES[size][2])]
    for name, unit in (("seconds", 1), ("processor", 1), ("memory", 1e6)):
        cells.append(f"{expected[name] / unit:,.0f}, {taken[name] / unit:,.0f}")
        cells.append(f"{expected[name] / taken[name] - 1:+.1%}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
