"""What a small model learns from preference pairs: a reward model, DPO and its kin; the memory of DPO with LoRA.

    python benchmarks/align_preference.py base reward dpo memory --out runs/align --seeds 0 1 2 --write

base: a tokenizer, a base model on English books and articles, and its tuning on English chats; the others start from
that. reward, dpo, ipo, kto, orpo, simpo: trained on preference/en.jsonl and looked at once, at the end, on
preference/en.valid.jsonl, in all and by where the pairs come from, with bits per byte on held-out English text before
and after; settings were chosen on a ninth of the training pairs. memory: peak memory of DPO and of chat tuning, both
with LoRA, at the same tokens, each in a process of its own. Text is read from LAPIS_DATA. Prints one line of JSON per
run; --write adds a dated table to benchmarks/results/.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lapis
from lapis.evaluation.preference import score_pairs
from lapis.evaluation.text import score_text
from lapis.families.config import ModelConfig
from lapis.model import lora
from lapis.model.transformer import Transformer
from lapis.text.corpus import corpus
from lapis.text.corpus.pairs import Pair, pairs
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.preference.preference import DPO
from lapis.training.objectives.supervised.next_token import Chat
from lapis.training.run import read_settings, run

DATA = Path(os.environ.get("LAPIS_DATA", Path(__file__).parents[2] / "shared" / "data"))
RESULTS = Path(__file__).parent / "results" / "align_preference.md"
CONTEXT = 256
NEW = {"dim": 192, "layers": 4, "heads": 4, "ffn_dim": 512, "tied": True, "context": 512}
BASE: dict[str, Any] = {"steps": 150, "batch": 16, "optimizer": "muon", "lr": 3e-3}
TUNE: dict[str, Any] = {"epochs": 1, "batch": 16, "lr": 1e-3}
ALIGN: dict[str, dict[str, Any]] = {
    "reward": {"epochs": 2, "batch": 32, "lr": 1e-3},
    "dpo": {"epochs": 2, "batch": 32, "lr": 2e-4},
    "ipo": {"epochs": 2, "batch": 32, "lr": 2e-4},
    "kto": {"epochs": 2, "batch": 32, "lr": 2e-4},
    "orpo": {"epochs": 2, "batch": 32, "lr": 2e-4},
    "simpo": {"epochs": 2, "batch": 32, "lr": 2e-4},
}
TEXT_BYTES = 60_000  # of held-out text


def settings(threads: int, **more: Any) -> dict[str, Any]:
    return {"precision": "float32", "threads": threads, "sample_every": 0, "context": CONTEXT, **more}


def base(out: Path, threads: int) -> dict[str, Any]:
    """The tokenizer, the base and the chat model, each where it is not there yet."""
    text, chats = [DATA / "corpus/en/train.jsonl"], [DATA / "instruct/en.jsonl"]
    if not (out / "tokenizer").is_dir():
        train_tokenizer(corpus.texts([*text, *chats]), 4096).save(out / "tokenizer")
    start, found = time.perf_counter(), {}
    for name, more in {
        "base": {"objective": "causal", "new": NEW, "tokenizer": str(out / "tokenizer"), "data": str(text[0]), **BASE},
        "chat": {"objective": "chat", "model": str(out / "base"), "data": str(chats[0]), **TUNE},
    }.items():
        if not (out / name).is_dir():
            made = run(read_settings(settings(threads, out=str(out / name), **more), name), watch=Silent())
            found[name] = {"steps": made.steps, "tokens": made.tokens, "loss": round(made.loss, 3)}
    return {**found, "seconds": round(time.perf_counter() - start), "bits_per_byte": bits(out / "chat")}


def bits(folder: Path) -> float:
    model, tokenizer = lapis.load(str(folder))
    documents = corpus.documents(DATA / "corpus/en/valid.jsonl")
    return score_text(model, tokenizer, documents, CONTEXT, max_bytes=TEXT_BYTES)["bits_per_byte"]


def align(objective: str, out: Path, seed: int, threads: int) -> dict[str, Any]:
    """One objective, one seed: held-out figures, their parts by source, time, and what it cost in bits per byte."""
    more = {"objective": objective, "model": str(out / "chat"), "data": str(DATA / "preference/en.jsonl"),
            "out": str(out / f"{objective}-{seed}"), "seed": seed, **ALIGN[objective]}  # fmt: skip
    start = time.perf_counter()
    made = run(read_settings(settings(threads, **more), objective), overwrite=True, fresh=True, watch=Silent())
    seconds = time.perf_counter() - start
    model, tokenizer = lapis.load(str(made.out))
    held_out = list(pairs(DATA / "preference/en.valid.jsonl"))
    reference = str(out / "chat") if objective in ("dpo", "ipo", "kto") else None
    found = score_pairs(model, tokenizer, held_out, reference=reference, context=CONTEXT)
    result = {"run": objective, "seed": seed, "seconds": round(seconds), "tokens": made.tokens,
              "train_accuracy": made.metrics["accuracy"], **found}  # fmt: skip
    for source, some in by_source(held_out).items():
        part = score_pairs(model, tokenizer, some, reference=reference, context=CONTEXT)
        result[f"accuracy {source}"] = [part["accuracy"], part["pairs"]]
    if objective != "reward":
        result["bits_per_byte"], before = bits(made.out), bits(out / "chat")
        result["bits_per_byte_change"] = result["bits_per_byte"] / before - 1
    return result


def by_source(held_out: list[Pair]) -> dict[str, list[Pair]]:
    """The pairs by the field `source`, in a word."""
    found: dict[str, list[Pair]] = {}
    with (DATA / "preference/en.valid.jsonl").open(encoding="utf-8") as lines:
        for pair, line in zip(held_out, lines, strict=True):
            source = json.loads(line)["source"].split(" ")[0].split("/")[-1]
            found.setdefault(source, []).append(pair)
    return found


def memory(threads: int) -> dict[str, Any]:
    """Peak memory of two steps of each, and how much more that is than the process held with the model in it."""
    found: dict[str, Any] = {"run": "memory"}
    for kind in ("chat", "dpo"):
        command = [sys.executable, __file__, f"memory-{kind}", "--threads", str(threads)]
        found[kind] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found["ratio of peaks"] = found["dpo"]["peak_mb"] / found["chat"]["peak_mb"]
    found["ratio of what training adds"] = found["dpo"]["added_mb"] / found["chat"]["added_mb"]
    return found


def memory_of(kind: str, threads: int) -> dict[str, Any]:
    """Two steps of 2,048 places: 8 chats of 256 tokens, or 4 pairs of them, half of each the reply's."""
    torch.set_num_threads(threads)
    words = [f"word{i} " for i in range(4000)]
    tokenizer = train_tokenizer(["".join(words)], 8192)
    torch.manual_seed(0)
    shape = {"dim": 384, "layers": 6, "heads": 6, "ffn_dim": 1024, "tied": True, "context": 256}
    model = Transformer(ModelConfig(vocab=tokenizer.rows, **shape))
    lora.wrap(model, lora.LoraConfig(rank=8))
    random = np.random.default_rng(0)

    def said(role: str) -> dict[str, str]:
        return {"role": role, "content": "".join(random.choice(words, 200)).strip()}

    objective: Any
    if kind == "chat":
        chats = [corpus.Chat([half(tokenizer, said("user")), said("assistant")], Path("made"), i) for i in range(16)]
        objective = Chat(tokenizer, chats, context=256)
    else:
        made = [Pair([half(tokenizer, said("user"))], said("assistant"), said("assistant"), Path("made"), i)
                for i in range(8)]  # fmt: skip
        objective = DPO(tokenizer, made, context=256)
    gc.collect()
    before = resident()
    batch = 8 if kind == "chat" else 4
    config = TrainConfig(steps=2, batch=batch, precision="float32", threads=threads, sample_every=0, log_every=1)
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, objective, config, Path(folder) / "out", watch=Silent())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_mb": round(peak), "added_mb": round(peak - before), "tokens": result.tokens,
            "seconds": round(result.seconds, 1)}  # fmt: skip


def half(tokenizer: Tokenizer, message: dict[str, str]) -> dict[str, str]:
    """The message cut to 120 tokens, so that a reply fills the rest of 256."""
    return {**message, "content": tokenizer.decode(tokenizer.encode(message["content"])[:120])}


def resident() -> float:
    """MB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over the seeds, with the least and the most."""
    names = ("accuracy", "loss", "calibration_error", "length_correlation", "length_correlation_within",
             "longer_preferred", "bits_per_byte_change", "seconds")  # fmt: skip
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---|" + "--:|" * len(names)]
    for objective in dict.fromkeys(row["run"] for row in rows if "seed" in row):
        some = [row for row in rows if row["run"] == objective]
        cells = []
        for name in names:
            values = [row[name] for row in some if row.get(name) is not None]
            cells.append(f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "")
        lines.append(f"| {objective}, {len(some)} seeds | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="+", choices=["base", *ALIGN, "memory", "memory-chat", "memory-dpo"])
    parser.add_argument("--out", type=Path, default=Path("runs/align"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for what in given.what:
        if what.startswith("memory-"):
            print(json.dumps(memory_of(what.removeprefix("memory-"), given.threads)))
            return
        seeds = given.seeds if what in ALIGN else [0]
        for seed in seeds:
            given.out.mkdir(parents=True, exist_ok=True)
            if what == "base":
                row = {"run": "base", **base(given.out, given.threads)}
            else:
                row = memory(given.threads) if what == "memory" else align(what, given.out, seed, given.threads)
            print(json.dumps(row), flush=True)
            rows.append(row)
    if given.write:
        machine = platform.processor() or platform.machine()
        head = f"\n## {datetime.date.today()}, {machine}, torch {torch.__version__}, {given.threads} thread(s)"
        others = [json.dumps(row) for row in rows if "seed" not in row]
        text = f"{head}\n\n{table(rows)}\n\n" + "".join(f"    {line}\n" for line in others)
        title = "" if RESULTS.exists() else "# Learning from preference pairs\n"
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(title + text)


if __name__ == "__main__":
    main()
