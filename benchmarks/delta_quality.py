"""What a chat vector as a file costs in quality: size, error, KL and reply NLL of each kind, for two real models.

    python benchmarks/delta_quality.py --base models/base --chat models/chat --chats held-out.jsonl

Rounds the chat model to bfloat16, as released models are, extracts each kind of delta by `lapis delta extract --chats`,
and puts what it says side by side: KL in nats for a token from the exact graft on a few prompts, and nats for a token
of the replies of the first 64 chats. The base's own figure for the replies, with the template of the chat model, is the
line to see a loss against. Adds a dated table to benchmarks/results/delta_quality.md.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

from hardware import processor
from merge import ROOT
from results_file import add_table

from lapis.checkpoint import open_checkpoint
from lapis.cli.delta import CHATS
from lapis.evaluation.agree import reply_nll
from lapis.text.corpus import corpus
from lapis.weights.delta.trial import trial_models

KINDS = {
    "exact": ("--bits", "exact"), "8 bits": ("--bits", "8"), "4 bits": ("--bits", "4"), "1 bit": ("--bits", "1"),
    "rank 16": ("--rank", "16"), "rank 64": ("--rank", "64"),
}  # fmt: skip


def lapis(*arguments: str) -> dict:
    command = [sys.executable, "-m", "lapis", *arguments, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}
    )
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr[-2000:]}")
    result: dict = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--chat", required=True)
    parser.add_argument("--chats", required=True, type=Path, help="jsonl of chats that were not trained on")
    parser.add_argument("--name", help="of the two models, in the table")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="lapis-quality-") as folder:
        recipe, chat = Path(folder) / "recipe.yaml", f"{folder}/chat"
        model = {"model": given.chat, "parameters": {"weight": 1.0}}
        recipe.write_text(json.dumps({"merge_method": "linear", "models": [model], "dtype": "bfloat16"}))
        lapis("merge", str(recipe), "--out", chat)
        for number, (kind, options) in enumerate(KINDS.items()):
            out = f"{folder}/{number}"
            made = lapis("delta", "extract", "--base", given.base, "--chat", chat, "--out", out, *options,
                         "--chats", str(given.chats))  # fmt: skip
            seen = made["check"]
            if "response_nll" not in seen:
                raise SystemExit(f"{kind}: {seen}")
            nll, kl = seen["response_nll"]["base + delta"], seen["kl_from"]["the exact graft"]
            share = made["bytes"] / made["model_bytes"]
            rows.append(f"| {kind} | {made['bytes'] / 1e6:.1f} | {share:.1%} | {made['relative_error']:.2%} "
                        f"| {kl:.2g} | {nll:.4f} |")  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
        _, exact = trial_models(given.base, chat, f"{folder}/0")
        speaking = Path(shutil.copytree(given.base, Path(folder) / "speaking"))
        for file in (Path(chat) / "chat_template.jinja", Path(chat) / "tokenizer_config.json"):
            if file.exists():
                shutil.copy(file, speaking)
        speech = {"base": open_checkpoint(speaking), "exact": exact}
        plain = reply_nll(speech, islice(corpus.chats([given.chats]), CHATS))
    name = given.name or f"{Path(given.base).name} and {Path(given.chat).name}"
    lines = [f"## {name}, {datetime.date.today()}, {os.cpu_count()} cores, {processor()}", "",
             f"Replies, nats for a token: {plain['base']:.4f} by the base, {plain['exact']:.4f} by the exact graft.",
             "", "| delta | MB | of the model | error of the difference | KL | reply NLL |", "|---|" + "---:|" * 5,
             *rows]  # fmt: skip
    print("\n".join(lines))
    add_table(__file__, "Deltas of real models", lines)


if __name__ == "__main__":
    main()
