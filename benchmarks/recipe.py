"""What later steps of the field give the recipe of a new model, in small, each with three seeds.

    python benchmarks/recipe.py [--seeds 0,1,2] [--only "NorMuon"] [--write]      needs LAPIS_DATA with corpus/en
    python benchmarks/recipe.py --equal-time --folder runs/bench-recipe-time --only recipe --only "8 rows a step"
                                          as many steps of each as 48 of the recipe take of a processor, and not as many
                                          tokens
    python benchmarks/recipe.py --equal-time --shape train --folder runs/bench-recipe-train    the shape of train.py

One shape: 4 layers, 192 wide, vocabulary 2048; 48 steps of 16 rows of 256 tokens in bfloat16, so that a run takes about
half a minute of a processor. Or that of train.py, in the 70 steps that two threads made in 1.2 minutes. All runs of a
seed see the same tokens and begin from the same weights; held-out text is 150 or 300 kB. Each leaves a JSON file in
--folder, and what is there is not run again. A step helps where all seeds say so.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

from results_file import add_table
from train import RECIPE, machine
from train_loss import learn, text

from lapis.training.config import MuonOptions
from lapis.training.loop.loop import TrainingRun

CONTEXT, BATCH, RATE, WIDTH = 256, 16, 5e-3, 192
SMALL = {"dim": WIDTH, "layers": 4, "heads": 4, "context": CONTEXT, "ffn_dim": 512, "family": "qwen3", "qk_norm": True,
         "tied": True}  # fmt: skip
# --shape -> what it is, vocabulary, steps of 16 rows, bytes of held-out text
SHAPES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "small": (SMALL, 2048, 48, 150_000),
    "train": (RECIPE, RECIPE["vocab"], 70, 300_000),
}
NARROW = 0.1 * (768 / WIDTH) ** 2  # the recipe's weight decay where it is that of a model of GPT-2's width
_FALLING = {"muon": MuonOptions(cautious=True, falling=True), "weight_decay": NARROW}


def of_batch(rows: int, share: float = 1.0) -> dict[str, Any]:
    """So many rows a step, for a share of the recipe's tokens; the rate goes with the root of the batch."""
    return {"batch": rows, "tokens": share, "lr": RATE * (rows / BATCH) ** 0.5}


def arcee(shape: dict[str, Any]) -> dict[str, Any]:
    """Its block, of as many parameters."""
    return {"family": "arcee", "mlp": "relu2", "ffn_dim": shape["ffn_dim"] * 3 // 2, "qk_norm": False}


NARROWER = {"dim": 256, "heads": 4, "ffn_dim": 704}
# name -> what of the shape is other, settings; "tokens" is a share of the recipe's, "pieces" is how rows are laid
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "recipe": ({}, {}),
    "Polar Express' coefficients": ({}, {"muon": MuonOptions("polar")}),
    "NorMuon": ({}, {"muon": MuonOptions(by_neuron=True)}),
    "cautious weight decay": ({}, {"muon": MuonOptions(cautious=True)}),
    "cautious weight decay that falls, by 1/width^2": ({}, _FALLING),
    "average of the weights, 0.9": ({}, {"ema": 0.9}),
    "8 rows a step": ({}, of_batch(8)),
    "32 rows a step": ({}, of_batch(32)),
    "16 rows a step, a quarter more steps": ({}, of_batch(16, 1.25)),
    "8 rows a step, Arcee's block": (arcee, of_batch(8)),
    "8 rows a step, 256 wide": (NARROWER, of_batch(8)),
    "8 rows a step, 256 wide, rows of tokens at twice the rate": (
        NARROWER, {**of_batch(8), "rates": {"embed": 2 * RATE * 0.5**0.5}}),
    "rows of tokens at twice the rate": ({}, {"rates": {"embed": 2 * RATE}}),
    "a rate of 0.008": ({}, {"lr": 8e-3}),
    "no clipping": ({}, {"clip": 0.0}),
    "rows that begin with a document": ({}, {"pieces": True}),
    "Arcee's block: ReLU^2, no gate, no QK-norm": (arcee, {}),
    "all of Muon's steps": ({}, {"muon": MuonOptions("polar", True, True, True), "weight_decay": NARROW}),
    "all of Muon's steps, 8 rows": (
        {}, {**of_batch(8), "muon": MuonOptions("polar", True, True, True), "weight_decay": NARROW}),
}  # fmt: skip


def begun_with_documents(sources: list[Path], tokenizer: Any) -> Any:
    """Rows in which no piece of a document is cut that fits into a row: its remainder shares a row with others (Ding et
    al. 2024, arXiv:2404.10830), and every other row begins where the document or a full row of it ends."""
    import numpy as np

    from lapis.text.corpus.corpus import documents
    from lapis.text.rows.rows import Rows
    from lapis.text.rows.sequences import best_fit

    tokens: list[int] = []
    starts, sizes = [0], []
    for document in documents(sources):
        ids = [*tokenizer.encode(document.text), tokenizer.eos_id]
        for first, last in pairwise([*range(0, len(ids) - 1, CONTEXT), len(ids) - 1]):
            tokens += ids[first : last + 1]
            starts.append(len(tokens))
            sizes.append(last - first)
    order, begins = best_fit(np.asarray(sizes, np.int64), CONTEXT)
    said = np.ones(len(tokens), np.uint8)
    said[starts[:-1]] = 0
    total = sum(sizes)
    counts = {"chats": len(sizes), "tokens": total, "supervised": total, "padding": (len(begins) - 1) * CONTEXT - total,
              "cut_chats": 0, "cut_tokens": 0, "dropped_long": 0, "dropped_silent": 0}  # fmt: skip
    info = {"kind": "chats", "length": CONTEXT, "rows": len(begins) - 1, "digest": "pieces", "counts": counts,
            "end": tokenizer.eos_id, "pad": tokenizer.eos_id, "vocab": tokenizer.rows,
            "tokenizer": tokenizer.digest()}  # fmt: skip
    arrays = {"tokens": np.asarray(tokens, np.uint16), "starts": np.asarray(starts, np.int64), "said": said,
              "order": order, "rows": begins}  # fmt: skip
    return Rows(info, arrays)


def whole(name: str, given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], bool, float]:
    """Of a variant: the shape, settings, whether rows are laid as pieces, and its share of the recipe's tokens."""
    shape = SHAPES[given.shape][0]
    other, settings = VARIANTS[name]
    own = {"lr": RATE, "batch": BATCH, **settings}
    pieces, share = own.pop("pieces", False), own.pop("tokens", 1.0)
    return {**shape, **(other(shape) if callable(other) else other)}, own, pieces, share


def measure(given: argparse.Namespace) -> None:
    _, vocabulary, usual, scored = SHAPES[given.shape]
    tokenizer, rows = text(given, vocabulary)
    paces = pace(given, ["recipe", *(given.only or VARIANTS)], tokenizer, rows) if given.equal_time else {}
    for seed in map(int, given.seeds.split(",")):
        for name in VARIANTS:
            place = given.folder / f"{seed}-{''.join(c if c.isalnum() else '_' for c in name)}.json"
            if place.exists() or (given.only and name not in given.only):
                continue
            shape, own, pieces, share = whole(name, given)
            used = begun_with_documents([given.data / "corpus/en/train.jsonl"], tokenizer) if pieces else rows
            given.seed = seed
            out = given.folder / "running" / place.stem
            steps = round(usual * share * BATCH / own["batch"])
            if paces:
                steps = round(usual * paces["recipe"] / paces[name])
            found = learn(shape, own, True, steps, given, out, tokenizer, used, scored)
            place.write_text(json.dumps({"name": name, "seed": seed, "steps": steps, **found}, indent=1))
            print(f"{seed} {name:50} {found['bits_per_byte']:.4f}  {found['processor_seconds']:.0f} s", file=sys.stderr,
                  flush=True)  # fmt: skip


def pace(given: argparse.Namespace, names: list[str], tokenizer: Any, rows: Any) -> dict[str, float]:
    """Seconds of a processor for a step of each: all in turn, three times, the least median of eight steps."""
    place = given.folder / "pace.json"
    known: dict[str, float] = json.loads(place.read_text()) if place.exists() else {}
    used: list[float] = []
    step = TrainingRun.step

    def timed(self: TrainingRun, batches: Any) -> None:
        began = time.process_time()
        step(self, batches)
        used.append(time.process_time() - began)

    TrainingRun.step = timed  # type: ignore[method-assign]
    given.seed = 0
    for name in [name for name in dict.fromkeys(names) if name not in known] * 3:
        used.clear()
        shape, own, _, _ = whole(name, given)
        learn(shape, own, True, 11, given, given.folder / "running" / "pace", tokenizer, rows, 1000)
        known[name] = min(known.get(name, math.inf), statistics.median(used[3:]))
    TrainingRun.step = step  # type: ignore[method-assign]
    place.write_text(json.dumps(known, indent=1))
    return known


def table(given: argparse.Namespace) -> list[str]:
    """The dated lines."""
    shape, vocabulary, usual, _ = SHAPES[given.shape]
    runs = [json.loads(path.read_text()) for path in sorted(given.folder.glob("*-*.json"))]
    plain = {run["seed"]: run["bits_per_byte"] for run in runs if run["name"] == "recipe"}
    much = f"{usual * BATCH * CONTEXT:,} tokens of corpus/en in steps of {BATCH} rows where nothing else is said"
    if given.equal_time:
        much = f"as long as {usual} steps of the recipe take of a processor; {BATCH} rows where nothing else is said"
    lines = [f"## {date.today()}, {machine()}, one thread", "",
             f"{shape['layers']} layers, {shape['dim']} wide, vocabulary {vocabulary}; {much}.", "",
             "| run | steps | bits per byte, by seed | against the recipe, by seed | mean | all say so "
             "| processor seconds |", "|---|--:|---|---|--:|---|--:|"]  # fmt: skip
    for name in VARIANTS:
        same = [run for run in runs if run["name"] == name and run["seed"] in plain]
        if same:
            apart = [run["bits_per_byte"] - plain[run["seed"]] for run in same]
            agree = "" if name == "recipe" or not (max(apart) < 0 or min(apart) > 0) else "better" if max(apart) < 0 \
                else "worse"  # fmt: skip
            lines.append(
                f"| {name} | {same[0].get('steps', '')} | "
                f"{', '.join(format(run['bits_per_byte'], '.3f') for run in same)} | "
                f"{', '.join(f'{gap:+.3f}' for gap in apart)} | {statistics.mean(apart):+.3f} | {agree} | "
                f"{statistics.median(run['processor_seconds'] for run in same):.0f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", action="append", help="only these runs")
    parser.add_argument("--equal-time", action="store_true", help="steps of equal time in all, and not of equal tokens")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="each with a --folder of its own")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LAPIS_DATA", "../shared/data")))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-recipe"))
    parser.add_argument("--write", action="store_true", help="adds the table to benchmarks/results/recipe.md")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    given.threads = 1
    measure(given)
    lines = table(given)
    print("\n".join(lines))
    if given.write:
        add_table(__file__, "Later steps of the field, in small", lines)


if __name__ == "__main__":
    main()
