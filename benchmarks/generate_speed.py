"""Tokens per second of generating, and the time to the first token: lapis and transformers, same weights, in turn.

    python benchmarks/generate_speed.py [--rounds 5] [--tokens 32] [--prompt 128] [--write]

Weights are random, in the shape of Qwen2.5-0.5B and in bfloat16; ids are random; both decode greedily with a cache and
no end token. A round runs each engine on each batch size, one after the other; the figure is the best round, since
other work on the machine only slows. prefill: tokens of the prompt per second, to the first new token. decode: new
tokens per second after that one. The first token is measured from the start of a new process to the first byte that it
prints: `lapis generate`, and a script of ten lines with transformers. The ceiling is what torch reads from memory in a
plain sum, with the weights read once per token. On a GPU the same runs there. Leaves out: other engines, quantization.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import product
from pathlib import Path

import torch
from results_file import add_table

SHAPE = {
    "dim": 896, "layers": 24, "heads": 14, "kv_heads": 2, "ffn_dim": 4864, "vocab": 151_936, "context": 32_768,
    "family": "qwen2", "bias": "qkv", "tied": True,
}  # fmt: skip
WORDS = 151_643  # entries of the tokenizer, as Qwen's has them before its special tokens

FIRST_TOKEN = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
if torch.cuda.is_available():
    model = model.to("cuda")
prompt = tokenizer(sys.argv[2], return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]), flush=True)
"""


def make_folder(folder: Path) -> None:
    """A model folder of that shape, with a byte-level tokenizer of that size made of pairs and triples of bytes."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from lapis.families.config import ModelConfig, Rope
    from lapis.model.load import save
    from lapis.model.transformer import Transformer
    from lapis.text.tokenizer.tokenizer import Tokenizer

    torch.manual_seed(0)
    save(Transformer(ModelConfig(**SHAPE, rope=Rope(theta=1_000_000.0))).to(torch.bfloat16), folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(product(letters, letters))
    triples = [(a + b, c) for (a, b), c in product(pairs[:400], letters)]
    merges = [*pairs, *triples][: WORDS - len(letters)]
    vocab = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    Tokenizer(backend, {"eos_token": "<|endoftext|>"}, {}).save(folder)


class Lapis:
    """`open_ready`, then the steps that generate_batch takes."""

    def __init__(self, folder: Path, device: str) -> None:
        from lapis.generation.options import DecodingRuntime
        from lapis.generation.ready import open_ready

        self.model, _ = open_ready(folder, DecodingRuntime(device=device))

    def run(self, ids: list[list[int]], tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and for the others."""
        from lapis.generation.generate import Decoding
        from lapis.generation.options import Sampling

        decoding = Decoding(self.model, ids, Sampling(max_tokens=tokens + 1), range(len(ids)))
        start = time.perf_counter()
        decoding.step()
        first = time.perf_counter()
        for _ in range(tokens):
            decoding.step()
        return first - start, time.perf_counter() - first


class Transformers:
    """`generate` for one new token, and for one more than `tokens`."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM, logging

        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        self.model.generation_config.eos_token_id = None

    def run(self, ids: list[list[int]], tokens: int) -> tuple[float, float]:
        ids_BT = torch.tensor(ids, device=self.model.device)
        options = {"attention_mask": torch.ones_like(ids_BT), "do_sample": False, "pad_token_id": 0}
        start = time.perf_counter()
        self.model.generate(ids_BT, max_new_tokens=1, **options)
        first = time.perf_counter()
        self.model.generate(ids_BT, max_new_tokens=tokens + 1, **options)
        return first - start, time.perf_counter() - first - (first - start)


def bandwidth(device: str) -> float:
    """Bytes per second that a sum over 512 MB reads, the best of five."""
    x = torch.ones(128_000_000, device=device)
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def first_token(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds from the start of a process to the first byte of text that it prints; the best of the rounds."""
    prompt = " ".join(["the cat sat on the mat"] * 8)
    commands = {
        "transformers": [sys.executable, "-c", FIRST_TOKEN, str(folder), prompt],
        "lapis": [sys.executable, "-m", "lapis", "generate", str(folder), prompt, "--max-tokens", "1"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _, (name, command) in product(range(rounds), commands.items()):
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds[name].append(time.perf_counter() - start)
            process.stdout.read()
        if process.returncode:
            raise SystemExit(f"{name}: exit status {process.returncode}")
    return {name: min(values) for name, values in seconds.items()}


def speeds(folder: Path, options: argparse.Namespace) -> dict[tuple[str, str, int], float]:
    """(engine, what, batch) -> tokens per second."""
    engines = {"transformers": Transformers(folder, options.device), "lapis": Lapis(folder, options.device)}
    draw = torch.Generator().manual_seed(0)
    prompts = {
        batch: torch.randint(0, WORDS, (batch, options.prompt), generator=draw).tolist() for batch in options.batch
    }
    found: dict[tuple[str, str, int], list[float]] = {}
    for turn in range(-1, options.rounds):  # the first round only warms up
        for (batch, ids), (name, engine) in product(prompts.items(), engines.items()):
            first, others = engine.run(ids, options.tokens)
            if turn >= 0:
                found.setdefault((name, "prefill", batch), []).append(batch * options.prompt / first)
                found.setdefault((name, "decode", batch), []).append(batch * options.tokens / others)
    return {key: max(values) for key, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lapis-bench-qwen2.5-0.5b")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/generate_speed.md")
    options = parser.parse_args()
    if not (options.folder / "tokenizer.json").exists():
        make_folder(options.folder)
    found = speeds(options.folder, options)
    starts = first_token(options.folder, options.rounds)
    weights = (options.folder / "model.safetensors").stat().st_size
    ceiling = bandwidth(options.device) / weights
    lines = ["| tokens per second | transformers | lapis | ratio |", "|---|---:|---:|---:|"]
    for what, batch in product(("prefill", "decode"), options.batch):
        theirs, ours = (found[name, what, batch] for name in ("transformers", "lapis"))
        lines.append(f"| {what}, batch {batch} | {theirs:,.1f} | {ours:,.1f} | {ours / theirs:.2f} |")
    lines.append(
        f"| start to first token, seconds | {starts['transformers']:.2f} | {starts['lapis']:.2f} "
        f"| {starts['transformers'] / starts['lapis']:.2f} |"
    )
    head = (
        f"{date.today()}: {platform.machine()}, {os.cpu_count()} cores, {options.device}, torch {torch.__version__}; "
        f"prompt {options.prompt}, {options.tokens} new tokens, best of {options.rounds}. "
        f"Reading the weights once per token would allow {ceiling:.0f} tokens/s at batch 1."
    )
    print("\n".join([head, "", *lines]))
    if options.write:
        add_table(__file__, "Generating, side by side", [head, "", *lines])
    print(json.dumps({" ".join(map(str, key)): round(value, 1) for key, value in found.items()}), file=sys.stderr)


if __name__ == "__main__":
    main()
