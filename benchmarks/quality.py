"""What a small classifier reaches that lapis trains from nothing: accuracy and F1 on the test parts, and the time.

    python benchmarks/quality.py sms-spam nsmc banking77 digits --seeds 0 1 2 --write

Each run trains its own tokenizer on the training texts and then the classes, with a new model; for Korean, whose labels
are few, the model first learns to continue film reviews (of other films) and everyday chat. The test part is
looked at once, at the end; settings were chosen on the validation part. Digits are scikit-learn's 1,797, split 1,257 /
180 / 360. Text is read from LAPIS_DATA. Prints one line of JSON per run; --write adds a dated table to
benchmarks/results/.
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

from lapis.evaluation.classification import score_classes
from lapis.text.corpus.corpus import Document
from lapis.text.corpus.labels import bare_texts, labeled
from lapis.text.corpus.pictures import Pictures, pictures
from lapis.text.tokenizer.tokenizer import train_tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.classify import Classify
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.setup.start import start_model

DATA = Path(os.environ.get("LAPIS_DATA", Path(__file__).parents[2] / "shared" / "data"))
RESULTS = Path(__file__).parent / "results" / "quality.md"
GOALS = {"sms-spam": (0.985, 0.94), "nsmc": (0.75, None), "banking77": (0.80, None), "digits": (0.975, None)}
SHAPE = {
    "dim": 96,
    "layers": 2,
    "heads": 4,
    "ffn_dim": 256,
}  # a llama-shaped model, 0.3 million parameters with its words
SETTINGS: dict[str, dict[str, Any]] = {
    "sms-spam": {
        "vocab": 1500, "context": 128, "new": SHAPE, "first": None, "further": [],
        "classify": {"epochs": 5, "batch": 32, "lr": 5e-3, "ema": 0.99},
        "options": {"dropout": 0.2, "hide": 0.2, "smoothing": 0.05},
    },
    "nsmc": {
        "vocab": 3000, "context": 96, "new": SHAPE,
        "further": ["corpus/ko/reviews-train.jsonl", "instruct/ko.jsonl"],
        "first": {"epochs": 4, "batch": 32, "lr": 5e-3},
        "classify": {"epochs": 6, "batch": 32, "lr": 1e-3, "ema": 0.98},
        "options": {"dropout": 0.2, "hide": 0.3, "smoothing": 0.1},
    },
    "banking77": {
        "vocab": 1500, "context": 96, "new": SHAPE, "first": None, "further": [],
        "classify": {"epochs": 4, "batch": 32, "lr": 5e-3}, "options": {"hide": 0.1, "smoothing": 0.05},
    },
    "digits": {
        "new": {"family": "vit", "dim": 96, "layers": 2, "heads": 6, "ffn_dim": 192,
                "image": {"size": 8, "patch": 2, "channels": 1}},
        "classify": {"epochs": 50, "batch": 64, "lr": 1e-2, "ema": 0.99}, "options": {"dropout": 0.2, "smoothing": 0.1},
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
    new, context = settings["new"], settings["context"]
    start = None
    if settings["first"]:
        causal = Causal(tokenizer, _documents([folder / "train.tsv", *further]), context=context)
        model = start_model(None, new, causal, context=context, seed=seed)
        train(model, causal, config(settings["first"], seed, threads), out / "first", watch=Silent())
        start = out / "first"
    valid = folder / "valid.tsv"
    classify = Classify(tokenizer, folder / "train.tsv", context=context, valid=valid, **settings["options"])
    model = start_model(start, None if start else new, classify, context=context, seed=seed)
    found = train(model, classify, config(settings["classify"], seed, threads), out / "classes", watch=Silent())
    seconds = time.monotonic() - begin
    scores = score_classes(model, tokenizer, list(labeled(folder / f"{part}.tsv")), context=context)
    return {**_told(scores), "valid": found.held_out, "train_loss": found.loss, "seconds": seconds}


def _documents(files: list[Path]) -> list[Document]:
    """Every labeled text, and every line of a document (one review), as a document of its own."""
    lines = [line for text in bare_texts(files) for line in text.split("\n") if line.strip()]
    return [Document(line, files[0], number) for number, line in enumerate(lines, 1)]


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
