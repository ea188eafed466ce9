"""How good a model is after so many minutes, and what each part of the recipe gives; the tables of benchmarks/train.py.

Minutes are turned into steps by the tokens per second that `--only speed` measured in turn on a quiet machine, so that
a run's result does not depend on what else the machine did. The baseline is the GPT-2 shape with AdamW and a cosine, at
the speed of the bare loop. Both see the same tokenizer and rows, and are scored on the same held-out text.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from train import BATCH, GPT2, LOOPS, RECIPE, SIZES, STEP_TOKENS, machine

SCORED = 300_000  # bytes of held-out text
ADAMW = {"optimizer": "adamw", "lr": 1e-3, "schedule": "cosine"}
# what less than two minutes give, and shapes whose steps take another time: recipe.py --shape train
# name -> (minutes, at the speed of which loop, shape, settings, zero-initialised projections)
RUNS: dict[str, tuple[float, str, dict[str, Any], dict[str, Any], bool]] = {
    "baseline, GPT-2 shape, AdamW, 10 minutes": (10, LOOPS[1], GPT2, ADAMW, False),
    "lapis, 4 minutes": (4, LOOPS[3], RECIPE, {}, True),
    "lapis, 3 minutes": (3, LOOPS[3], RECIPE, {}, True),
}
_PARTS = {
    "recipe": (RECIPE, {}, True),
    "AdamW in place of Muon": (RECIPE, {"optimizer": "adamw", "lr": 2e-3}, True),
    "learned positions in place of RoPE": ({**RECIPE, "positions": "learned"}, {}, True),
    "no QK-norm": ({**RECIPE, "family": "llama", "qk_norm": False}, {}, True),
    "ReLU^2 in place of SwiGLU": ({**RECIPE, "mlp": "relu2", "ffn_dim": 1536}, {}, True),
    "GELU in place of SwiGLU": ({**RECIPE, "mlp": "gelu_tanh", "ffn_dim": 1536}, {}, True),
    "projections drawn at random": (RECIPE, {}, False),
    "cosine in place of linear": (RECIPE, {"schedule": "cosine"}, True),
    "stable, then decay over 40 %": (RECIPE, {"schedule": "wsd"}, True),
}
SOURCES = (
    "The recipe: Muon (Jordan et al. 2024; its rate as in Liu et al. 2025, 2502.16982), rotary positions (Su et al. "
    "2021, 2104.09864), norms of queries and keys (Henry et al. 2020, 2010.04245), SwiGLU (Shazeer 2020, 2002.05202), "
    "projections that begin at zero (Yang et al. 2022, 2203.03466), a rate that falls in a line. Each row changes one "
    "of these; steps are equal, so what a change costs in time is not in it. SwiGLU stays for public tools load it."
)
ABLATION = {name: (2.0, LOOPS[3], *rest) for name, rest in _PARTS.items()}


def measure(piece: str, given: argparse.Namespace) -> None:
    """Each run that is not done yet, with its own file."""
    for name, (minutes, pace, shape, settings, zero) in (RUNS if piece == "loss" else ABLATION).items():
        place = given.folder / f"{piece}-{given.seed}-{''.join(c if c.isalnum() else '_' for c in name)}.json"
        if place.exists() or (given.run and name not in given.run):
            continue
        step_tokens = STEP_TOKENS * settings.get("batch", BATCH) // BATCH
        steps = max(1, round(minutes * given.scale * 60 * speed(given.folder, pace) / step_tokens))
        found = learn(shape, settings, zero, steps, given, given.folder / "running" / place.stem, *text(given))
        facts = {"date": str(date.today()), "machine": machine(), "name": name, "seed": given.seed, "steps": steps,
                 "minutes": minutes * given.scale, **found}  # fmt: skip
        place.write_text(json.dumps(facts, indent=1))
        print(f"{name:42} seed {given.seed}  {steps} steps  {found['bits_per_byte']:.4f}", file=sys.stderr, flush=True)


def speed(folder: Path, name: str) -> float:
    """Tokens per second of a loop, as measured."""
    path = folder / "speed.json"
    if not path.exists():
        raise SystemExit("run --only speed first: minutes are turned into steps by its figures")
    return STEP_TOKENS / statistics.median(json.loads(path.read_text())["seconds"][name])


def learn(
    shape: dict[str, Any], settings: dict[str, Any], zero: bool, steps: int, given: argparse.Namespace, out: Path,
    tokenizer: Any, rows: Any, scored: int = SCORED,
) -> dict[str, Any]:  # fmt: skip
    """Trains, and scores on held-out text. Ctrl-C saves, and the same command goes on. rows: of documents, or of pieces
    of them that were packed as chats are."""
    import torch

    from lapis.errors import ConfigError
    from lapis.evaluation.text import score_text
    from lapis.families.config import ModelConfig
    from lapis.model.transformer import Transformer
    from lapis.text.corpus.corpus import documents
    from lapis.training.config import TrainConfig
    from lapis.training.loop.loop import train
    from lapis.training.loop.progress import LogLines
    from lapis.training.objectives.supervised.next_token import Causal, Chat
    from lapis.training.setup.start import FRESH, zero_outputs

    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    model = Transformer(ModelConfig(**{**shape, "vocab": tokenizer.rows}))
    if zero:
        zero_outputs(model)
    config = TrainConfig(**{
        **FRESH, "steps": steps, "batch": BATCH, "precision": "bf16", "threads": given.threads, "seed": given.seed,
        "sample_every": 0, "save_every": 10**9, "keep": 1, "compile": "off", "certify": "off", **settings,
    })  # fmt: skip
    heard, began = LogLines("bench", 60.0), time.process_time()
    log: list[dict[str, Any]] = []
    try:
        log = train(model, (Chat if rows.chats else Causal)(tokenizer, rows), config, out, watch=heard).log
        shutil.rmtree(out)
    except ConfigError:  # a shape that no published family has: trained, but not to be saved
        shutil.rmtree(out.with_name(f".{out.name}.lapis"), ignore_errors=True)
    model.eval()
    held_out = documents([given.data / "corpus/en/valid.jsonl"])
    used = time.process_time() - began
    score = score_text(model, tokenizer, held_out, SIZES["context"], max_bytes=scored)["bits_per_byte"]
    return {"bits_per_byte": score, "last_loss": log[-1]["loss"] if log else None, "processor_seconds": used}


def text(given: argparse.Namespace, vocab: int = SIZES["vocab"]) -> tuple[Any, Any]:
    """The tokenizer and the packed rows, made once."""
    from lapis.text.rows.packing import pack
    from lapis.text.rows.rows import Rows
    from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

    source = given.data / "corpus/en/train.jsonl"
    folder = given.folder / "tokenizer"
    if not folder.exists():
        tokenizer = train_tokenizer([source], vocab)
        folder.mkdir()
        tokenizer.save(folder)
    tokenizer = Tokenizer.open(folder)
    if not (given.folder / "rows").exists():
        pack([source], tokenizer, given.folder / "rows", SIZES["context"])
    return tokenizer, Rows.open(given.folder / "rows")


def tables(folder: Path) -> str:
    """All pieces of a folder as one page."""
    lines = ["# Training beside its peers", "", "`python benchmarks/train.py`; 6 layers, 384 wide, vocabulary 8192, "
             "256 tokens x 16 rows, bfloat16, 14 M parameters.", ""]  # fmt: skip
    pieces = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if "speed" in pieces:
        found = pieces["speed"]
        middle = {name: statistics.median(seconds) for name, seconds in found["seconds"].items()}
        how = f"{found['threads']} threads, in turn, median of {len(found['seconds'][LOOPS[0]])} steps"
        lines += ["## Speed", "", f"{found['date']}, {found['machine']}, {how}.", "",
                  "| loop | tokens/s | against Trainer | against the bare loop |", "|---|---:|---:|---:|"]  # fmt: skip
        for name, seconds in middle.items():
            lines.append(f"| {name} | {STEP_TOKENS / seconds:,.0f} | {middle[LOOPS[0]] / seconds:.2f}x | "
                         f"{middle[LOOPS[1]] / seconds:.2f}x |")  # fmt: skip
        lines.append("")
    if "memory" in pieces:
        found = pieces["memory"]
        peaks = found["peak_bytes"]
        lines += ["## Memory", "", f"{found['date']}. Peak resident memory of a process that does nothing else.", "",
                  "| loop | MB | against Trainer |", "|---|---:|---:|"]  # fmt: skip
        lines += [f"| {n} | {b / 1e6:,.0f} | {b / peaks[LOOPS[0]] - 1:+.0%} |" for n, b in peaks.items()]
        lines += ["", f"Logits of a vocabulary of 151,936 at 8 x 1024 tokens: {found['logits_bytes'] / 1e6:,.0f} MB at "
                  "most, gradient included.", ""]  # fmt: skip
    for piece, title in (("loss", "Minutes to a loss"), ("ablation", "What each part of the recipe gives")):
        runs = [value for name, value in pieces.items() if name.startswith(piece + "-")]
        if not runs:
            continue
        lines += [f"## {title}", "", f"{runs[0]['date']}. corpus/en; held-out text, {SCORED // 1000} kB.", "",
                  "| run | minutes | steps | bits per byte | seeds |", "|---|---:|---:|---:|---|"]  # fmt: skip
        for name in RUNS if piece == "loss" else ABLATION:
            same = [run for run in runs if run["name"] == name]
            if same:
                scores = [run["bits_per_byte"] for run in same]
                seeds = ", ".join(f"{score:.3f}" for score in scores)
                figures = f"{same[0]['minutes']:g} | {same[0]['steps']} | {statistics.median(scores):.3f}"
                lines.append(f"| {name} | {figures} | {seeds} |")
        lines += ["", *([SOURCES, ""] if piece == "ablation" else [])]
    if "gpu" in pieces:
        found = pieces["gpu"]
        lines += ["## Model FLOPs utilization", "", f"{found['date']}, {found['device']}.", "",
                  "| shape | tokens/s | TFLOP/s | MFU |", "|---|---:|---:|---:|"]  # fmt: skip
        for name, one in found["shapes"].items():
            lines.append(f"| {name} | {one['tokens_per_second']:,.0f} | {one['flops'] / 1e12:.2f} | {one['mfu']:.1%} |")
        lines.append("")
    return "\n".join(lines)
