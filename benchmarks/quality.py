"""What a small classifier reaches that lapis trains from nothing: accuracy and F1 on the test parts, and the time.

    python benchmarks/quality.py sms-spam nsmc banking77 digits --seeds 0 1 2 --write

Each run trains its own tokenizer on the training texts, pre-trains an encoder on masked words of unlabeled text
(training texts and, for Korean, film reviews of other films), and trains the classes. The test part is looked at once,
at the end; settings were chosen on the validation part. Digits are scikit-learn's 1,797, split 1,257 / 180 / 360.
Text is read from LAPIS_DATA. Prints one line of JSON per run; --write adds a dated table to benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapis.evaluate.classification import score_classes
from lapis.text.labels import bare_texts, labeled
from lapis.text.pictures import Pictures, pictures
from lapis.text.tokenizer import train_tokenizer
from lapis.train import Classify, Masked, TrainConfig, train
from lapis.train.start import start_model
from lapis.train.watch import Silent

DATA = Path(os.environ.get("LAPIS_DATA", Path(__file__).parents[2] / "shared" / "data"))
RESULTS = Path(__file__).parent / "results" / "quality.md"
GOALS = {"sms-spam": (0.985, 0.94), "nsmc": (0.75, None), "banking77": (0.80, None), "digits": (0.975, None)}
BERT = {"family": "bert", "dim": 128, "layers": 3, "heads": 4, "ffn_dim": 512, "types": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "sms-spam": {
        "vocab": 1000, "context": 128, "new": BERT, "further": [],
        "masked": {"steps": 600, "batch": 32, "lr": 2e-3}, "masking": {"dropout": 0.0},
        "classify": {"epochs": 8, "batch": 32, "lr": 5e-4}, "options": {"dropout": 0.1, "hide": 0.1, "smoothing": 0.05},
    },
    "nsmc": {
        "vocab": 3000, "context": 96, "new": BERT, "further": ["corpus/ko/reviews-train.jsonl"],
        "masked": {"steps": 1200, "batch": 64, "lr": 2e-3}, "masking": {"dropout": 0.0},
        "classify": {"epochs": 6, "batch": 32, "lr": 5e-4}, "options": {"dropout": 0.1, "hide": 0.1, "smoothing": 0.05},
    },
    "banking77": {
        "vocab": 2000, "context": 96, "new": BERT, "further": [],
        "masked": {"steps": 600, "batch": 64, "lr": 2e-3}, "masking": {"dropout": 0.0},
        "classify": {"epochs": 12, "batch": 32, "lr": 7e-4},
        "options": {"dropout": 0.1, "hide": 0.1, "smoothing": 0.05},
    },
    "digits": {
        "new": {"family": "vit", "dim": 64, "layers": 4, "heads": 4, "ffn_dim": 256,
                "image": {"size": 8, "patch": 2, "channels": 1}},
        "classify": {"epochs": 80, "batch": 64, "lr": 2e-3}, "options": {"dropout": 0.1, "smoothing": 0.1, "shift": 1},
    },
}  # fmt: skip


def config(settings: dict[str, Any], seed: int, threads: int) -> TrainConfig:
    """float32 unless said otherwise, so that a run is the same on every machine."""
    fixed = {
        "precision": "float32",
        "threads": threads,
        "sample_every": 0,
        "seed": seed,
        "optimizer": "muon",
        "decay": 0.9,
    }
    return TrainConfig(**{**fixed, **settings})


def text_run(name: str, settings: dict[str, Any], seed: int, part: str, threads: int, out: Path) -> dict[str, Any]:
    folder = DATA / "classify" / name
    further = [DATA / place for place in settings["further"]]
    begin = time.monotonic()
    tokenizer = train_tokenizer(bare_texts([folder / "train.tsv", *further]), settings["vocab"], "masked")
    new, context, told = settings["new"], settings["context"], {}
    if settings["masked"]:
        masked = Masked(tokenizer, [folder / "train.tsv", *further], context=context, **settings["masking"])
        model = start_model(None, new, masked, context=context, seed=seed)
        found = train(model, masked, config(settings["masked"], seed, threads), out / "masked", watch=Silent())
        told = {"masked_loss": found.loss, "masked_seconds": time.monotonic() - begin}
    classify = Classify(
        tokenizer, folder / "train.tsv", context=context, valid=folder / "valid.tsv", **settings["options"]
    )
    start = out / "masked" if settings["masked"] else None
    model = start_model(start, None if start else new, classify, context=context, seed=seed)
    found = train(model, classify, config(settings["classify"], seed, threads), out / "classes", watch=Silent())
    seconds = time.monotonic() - begin
    scores = score_classes(model, tokenizer, list(labeled(folder / f"{part}.tsv")), context=context)
    return {**told, **_told(scores), "valid": found.held_out, "train_loss": found.loss, "seconds": seconds}


def digits_run(settings: dict[str, Any], seed: int, part: str, threads: int, out: Path) -> dict[str, Any]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(2026).permutation(len(found.target))
    cut = {"train": order[:1257], "valid": order[1257:1437], "test": order[1437:]}

    def chosen(part: str) -> Pictures:
        return pictures(((found.images[cut[part]] / 8 - 1).astype(np.float32), found.target[cut[part]]))

    begin = time.monotonic()
    classify = Classify(None, chosen("train"), valid=chosen("valid"), **settings["options"])
    model = start_model(None, settings["new"], classify, context=None, seed=seed)
    result = train(model, classify, config(settings["classify"], seed, threads), out / "classes", watch=Silent())
    seconds = time.monotonic() - begin
    return {**_told(score_classes(model, None, chosen(part))), "valid": result.held_out, "train_loss": result.loss,
            "seconds": seconds}  # fmt: skip


def _told(scores: dict[str, Any]) -> dict[str, Any]:
    return {name: scores[name] for name in ("accuracy", "f1", "f1_macro", "n", "loss")}


def override(settings: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """SETTINGS with group.key=JSON in place, for trials."""
    settings = json.loads(json.dumps(settings))
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        place, *rest = settings, *key.split(".")
        for name in rest[:-1]:
            place = place[name]
        place[rest[-1]] = json.loads(value)
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=SETTINGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--part", default="valid", choices=["valid", "test"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", nargs="*", default=[], help="group.key=JSON, for trials")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for task in options.tasks:
        settings = override(SETTINGS[task], options.set)
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as out:
                if task == "digits":
                    found = digits_run(settings, seed, options.part, options.threads, Path(out))
                else:
                    found = text_run(task, settings, seed, options.part, options.threads, Path(out))
            rows.append({"task": task, "seed": seed, "part": options.part, **found})
            print(json.dumps(rows[-1]), flush=True)
    if options.write:
        write(rows, options)


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    lines = [
        f"\n## {datetime.date.today()}, {platform.machine()}, {options.threads} threads, torch {torch.__version__}\n",
        "| task | accuracy (median) | from - to | F1 | asked for | seconds (longest) |",
        "|---|--:|---|--:|---|--:|",
    ]
    for task in options.tasks:
        found = [row for row in rows if row["task"] == task]
        accuracies = [row["accuracy"] for row in found]
        f1 = [row["f1"] for row in found if row["f1"] is not None]
        goal, f1_goal = GOALS[task]
        asked = f">= {goal}" + (f", F1 >= {f1_goal}" if f1_goal else "")
        lines.append(
            f"| {task} | {statistics.median(accuracies):.4f} | {min(accuracies):.4f} - {max(accuracies):.4f} "
            f"| {f'{statistics.median(f1):.4f}' if f1 else ''} | {asked} | {max(row['seconds'] for row in found):.0f} |"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
