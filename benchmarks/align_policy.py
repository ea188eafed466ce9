"""GRPO and PPO on a task that can be checked, from a small model that lapis trained: does the mean reward rise?

    python benchmarks/align_policy.py [--seeds 0 1 2] [--folder DIR] [--write]

The model is made here, in about a minute: chats that ask to sort some digits, a tenth of them answered right and
the rest with the digits in any order, so that it knows the form of a reply and is right about as often. The reward
is 1 where the reply is the sorted digits and nothing else. Held-out requests are in no training chat and no rollout.
Told are the mean reward of replies drawn at temperature 1 to held-out requests, before and after, that of the
likeliest reply, and minutes of training on this machine. Leaves out: tasks that need a larger model.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from results_file import add_table

from lapis.families.config import ModelConfig
from lapis.generation.generate import generate_batch
from lapis.generation.options import Sampling
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import ChatRecord
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import LogLines
from lapis.training.objectives.policy.policy import GRPO, PPO, RLOO
from lapis.training.objectives.supervised.next_token import Chat

DIGITS = 3
RIGHT = 0.1
HELD_OUT = 120
REWARD = [{"name": "exact", "options": {"field": "answer"}}]


def requests(draw: random.Random) -> tuple[list[list[str]], list[list[str]]]:
    """Lists of different digits: to train on, and held out."""
    found = {tuple(draw.sample("0123456789", DIGITS)) for _ in range(6000)}
    lists = [list(digits) for digits in sorted(found)]
    draw.shuffle(lists)
    return lists[HELD_OUT:], lists[:HELD_OUT]


def asked(digits: list[str]) -> str:
    return f"Sort {' '.join(digits)}"


def records(lists: list[list[str]]) -> list[dict[str, Any]]:
    return [{"prompt": asked(digits), "answer": " ".join(sorted(digits))} for digits in lists]


def make_start(folder: Path, lists: list[list[str]]) -> None:
    """The model to start from, at `folder`."""
    draw = random.Random(7)
    chats = []
    for number in range(8_000):
        digits = draw.choice(lists)
        said = sorted(digits) if draw.random() < RIGHT else draw.sample(digits, len(digits))
        messages = [{"role": "user", "content": asked(digits)}, {"role": "assistant", "content": " ".join(said)}]
        chats.append(ChatRecord(messages, Path("chats"), number + 1))
    tokenizer = train_tokenizer([message["content"] for chat in chats[:500] for message in chat.messages], 280)
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(dim=64, layers=2, heads=4, ffn_dim=176, vocab=tokenizer.rows, context=64, tied=True)
    )
    config = TrainConfig(epochs=10, batch=4, lr=3e-3, precision="float32", threads=1, sample_every=0)
    train(model, Chat(tokenizer, chats, context=512), config, folder, watch=LogLines("start"))


def mean_reward(model: Transformer, tokenizer: Tokenizer, rows: list[dict[str, Any]], temperature: float) -> float:
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    replies = generate_batch(model, tokenizer, prompts, Sampling(temperature=temperature, max_tokens=12, seed=1))
    right = [reply.text.strip() == row["answer"] and reply.stop_reason == "end"
             for reply, row in zip(replies, rows, strict=True)]  # fmt: skip
    return sum(right) / len(right)


def one_run(
    name: str, seed: int, options: argparse.Namespace, lists: list[list[str]], held: list[dict[str, Any]]
) -> dict[str, float]:
    model = load(options.folder / "start", dtype=torch.float32)
    tokenizer = Tokenizer.open(options.folder / "start")
    shared: dict[str, Any] = {"rewards": REWARD, "context": 64, "max_tokens": 12}
    made: Any = {
        "grpo": lambda: GRPO(tokenizer, records(lists), group=8, updates=2, epsilon_high=0.3, kl=0.01, **shared),
        "rloo": lambda: RLOO(tokenizer, records(lists), group=8, updates=2, **shared),
        "ppo": lambda: PPO(tokenizer, records(lists), group=1, updates=4, kl=0.01, **shared),
    }[name]()
    batch = 128 if name == "ppo" else 32
    config = TrainConfig(
        steps=options.steps, batch=batch, lr=options.lr, warmup=5, decay=0.4, seed=seed, weight_decay=0.0,
        precision="float32", threads=1, sample_every=60, log_every=10,
    )  # fmt: skip
    start = time.perf_counter()
    result = train(model, made, config, options.folder / f"{name}-{seed}", overwrite=True, fresh=True,
                   watch=LogLines(f"{name} {seed}", 20))  # fmt: skip
    return {
        "minutes": (time.perf_counter() - start) / 60,
        "first": result.log[0]["metrics"]["reward"],
        "drawn": mean_reward(model, tokenizer, held, 1.0),
        "likeliest": mean_reward(model, tokenizer, held, 0.0),
        "gap": max(row["metrics"]["rollout_gap"] for row in result.log),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=["grpo", "rloo", "ppo"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lapis-align-policy")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/align_policy.md")
    options = parser.parse_args()
    lists, held_lists = requests(random.Random(3))
    held = records(held_lists)
    if not (options.folder / "start" / "config.json").exists():
        begun = time.perf_counter()
        make_start(options.folder / "start", lists)
        print(f"start: {(time.perf_counter() - begun) / 60:.1f} minutes", file=sys.stderr)
    tokenizer, start = Tokenizer.open(options.folder / "start"), load(options.folder / "start", dtype=torch.float32)
    before = {"drawn": mean_reward(start, tokenizer, held, 1.0), "likeliest": mean_reward(start, tokenizer, held, 0.0)}
    print(f"before: {before}", file=sys.stderr)
    lines = [
        "| method | seed | mean reward, drawn | likeliest reply | minutes | rollout gap |",
        "|---|---|---:|---:|---:|---:|",
        f"| start | | {before['drawn']:.2f} | {before['likeliest']:.2f} | | |",
    ]
    for name in options.methods:
        runs = [one_run(name, seed, options, lists, held) for seed in options.seeds]
        for seed, run in zip(options.seeds, runs, strict=True):
            figures = f"{run['drawn']:.2f} | {run['likeliest']:.2f} | {run['minutes']:.1f} | {run['gap']:.0e}"
            lines.append(f"| {name} | {seed} | {figures} |")
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        figures = f"**{middle['drawn']:.2f}** | **{middle['likeliest']:.2f}** | {middle['minutes']:.1f}"
        lines.append(f"| **{name}** | median | {figures} | |")
    head = (
        f"{date.today()}: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; {' '.join(sys.argv)}"
    )
    print("\n".join([head, "", *lines]))
    if options.write:
        add_table(__file__, "Policies against a reward", [head, "", *lines])


if __name__ == "__main__":
    main()
