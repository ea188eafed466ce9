"""Tokens per second of lapis' training loop and of a plain transformers loop: same shape, batch, length, in turn.

    python benchmarks/train_speed.py [--rounds 7] [--steps 3] [--threads 1 2] [--write]

transformers: LlamaForCausalLM (SDPA), fused AdamW, bfloat16 autocast, gradient clipping; one document per row, no mask.
lapis: `lapis.train` as a user calls it, from packed rows to the optimizer. Once on the same rows, and once on short
documents that are kept apart by segments, which the other loop does not do. A round runs each for `steps` steps, one
after the other; the figure is the median over rounds. Measuring lapis' settings and writing folders is not counted,
nor is the first step of each turn.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

SHAPE = {"dim": 256, "layers": 6, "heads": 4, "kv_heads": 2, "ffn_dim": 704, "vocab": 4096, "context": 256}
BATCH = 16
WARM = 1


def rows(documents_per_row: int, count: int = 256):
    """Packed rows of random tokens; the tokenizer is a stand-in that no figure depends on."""
    import numpy as np

    from lapis.text.rows import Rows

    length = SHAPE["context"]
    tokens = np.random.default_rng(0).integers(3, SHAPE["vocab"], count * length).astype("uint16")
    step = length // documents_per_row
    starts = np.arange(0, len(tokens) + 1, step, dtype="int64")
    counts = {"bytes": 4 * len(tokens), "supervised": len(tokens)}
    info = {"kind": "documents", "length": length, "rows": count, "digest": "random", "counts": counts,
            "end": 0, "pad": 0, "vocab": SHAPE["vocab"], "tokenizer": "none"}  # fmt: skip
    return Rows(info, {"tokens": tokens, "starts": starts})


class NoTokenizer:
    """Rows of random tokens have no text."""

    end_ids = ()

    def digest(self) -> str:
        return "none"

    def save(self, folder: Path) -> None:
        pass


def lapis_loop(data, optimizer: str, threads: int):
    """Seconds per step of `lapis.train`, over the steps after the first few."""
    from lapis.model import ModelConfig, Transformer
    from lapis.train import Causal, TrainConfig, train
    from lapis.train.watch import Silent

    def once(steps: int) -> float:
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**SHAPE, tied=True))
        config = TrainConfig(
            steps=steps + WARM, batch=BATCH, optimizer=optimizer, lr=1e-3, log_every=1, sample_every=0,
            precision="bf16", threads=threads,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            result = train(model, Causal(NoTokenizer(), data), config, Path(place) / "out", watch=Silent())
        return statistics.median(row["train_seconds"] for row in result.log[WARM:])

    return once


def transformers_loop(data, threads: int):
    """Seconds per step of the loop that tutorials show."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lapis.text.rows import Cursor

    def once(steps: int) -> float:
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=SHAPE["dim"], num_hidden_layers=SHAPE["layers"], num_attention_heads=SHAPE["heads"],
            num_key_value_heads=SHAPE["kv_heads"], intermediate_size=SHAPE["ffn_dim"], vocab_size=SHAPE["vocab"],
            max_position_embeddings=SHAPE["context"], tie_word_embeddings=True,
        )).train()  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        cursor, seconds = Cursor(), []
        for _ in range(steps + WARM):
            begin = time.perf_counter()
            batch, cursor = data.batch(cursor, BATCH)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=batch.ids_BT, labels=batch.ids_BT).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds[WARM:])

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/train_speed.md")
    options = parser.parse_args()
    import transformers

    lines = [
        "# Training speed",
        "",
        f"{date.today()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {_cpu()}; load before the run {os.getloadavg()[0]:.1f}.",
        "",
        f"A Llama of {SHAPE['layers']} layers, {SHAPE['dim']} wide, vocabulary {SHAPE['vocab']}, "
        f"{SHAPE['context']} tokens x {BATCH} rows, bfloat16 autocast. "
        f"Median of {options.rounds} rounds of {options.steps} steps, in turn "
        "(`python benchmarks/train_speed.py --write`).",
        "",
        "| threads | loop | tokens/s | ms per step | against transformers |",
        "|---:|---|---:|---:|---:|",
    ]
    for threads in options.threads:
        seconds = measure(threads, options.rounds, options.steps)
        base = statistics.median(seconds["transformers, AdamW"])
        for name, found in seconds.items():
            middle = statistics.median(found)
            tokens = BATCH * SHAPE["context"] / middle
            lines.append(f"| {threads} | {name} | {tokens:,.0f} | {middle * 1000:,.0f} | {base / middle:.2f}x |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        (Path(__file__).parent / "results" / "train_speed.md").write_text(text)


def measure(threads: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of each loop, one figure per round."""
    whole, short = rows(1), rows(4)
    loops = {
        "transformers, AdamW": transformers_loop(whole, threads),
        "lapis, AdamW": lapis_loop(whole, "adamw", threads),
        "lapis, AdamW, documents kept apart": lapis_loop(short, "adamw", threads),
        "lapis, Muon": lapis_loop(whole, "muon", threads),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name, once in loops.items():
            seconds[name].append(once(steps))
            rate = BATCH * SHAPE["context"] / seconds[name][-1]
            print(f"threads {threads}  round {number + 1}  {name:36} {rate:8,.0f} tokens/s", flush=True)
    return seconds


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
