"""Tokens per second of decoding a real model, one row: lapis, transformers and llama.cpp, and what memory would allow.

    LAPIS_LLAMA_CPP=... python benchmarks/decode_speed.py FOLDER [--rounds 5] [--tokens 24] [--write]

One thread, and processor seconds of the process, since other work may run beside it. A round runs every engine in
turn, greedily, after a prompt of ten tokens, and a sum over 512 MB, which is what torch reads from memory; figures are
medians of the rounds, and ratios are taken within a round. Of memory: the weights that a token reads (all but the
embedding, where the head has a matrix of its own), over what the sum read per second in that round. llama.cpp, where
xllamacpp is installed or LAPIS_LLAMA_CPP names its folder, reads files that `lapis export` makes.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from hardware import processor
from results_file import add_table

FLAGS = ("avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
PROMPT = list(range(100, 110))
Step = Callable[[int], float]  # tokens -> processor seconds that they took


def lapis_engine(folder: Path, dtype: str, weights: str | None = None, compile: bool = True) -> tuple[Step, int]:
    """Steps of lapis' decoding, and the bytes of weights that one reads."""
    from lapis.generation.generate import Decoding
    from lapis.generation.options import Sampling
    from lapis.generation.ready import ready
    from lapis.model.load import load

    model = load(folder, getattr(torch, dtype))
    embedding = 0 if model.config.tied else model.embed.weight.numel()
    numbers = sum(p.numel() for p in model.parameters()) - embedding
    ready(model, weights=weights, compile=compile)  # type: ignore[arg-type]

    def step(tokens: int) -> float:
        decoding = Decoding(model, [PROMPT], Sampling(max_tokens=tokens + 1))
        decoding.step()
        start = time.process_time()
        for _ in range(tokens):
            decoding.step()
        return time.process_time() - start

    return step, numbers * (1 if weights else getattr(torch, dtype).itemsize)


def transformers_engine(folder: Path, dtype: str) -> Step:
    """Steps of transformers' decoding: a reply less its first token."""
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    ids_BT = torch.tensor([PROMPT])
    options = {"attention_mask": torch.ones_like(ids_BT), "do_sample": False, "pad_token_id": 0}

    def step(tokens: int) -> float:
        spent = []
        for count in (1, tokens + 1):
            start = time.process_time()
            model.generate(ids_BT, max_new_tokens=count, **options)
            spent.append(time.process_time() - start)
        return spent[1] - spent[0]

    return step


def llama_cpp_engine(folder: Path, kind: str, place: Path) -> Step:
    """Steps of llama.cpp's decoding, in this process: a reply less its first token."""
    import xllamacpp

    from lapis.formats.export import export_gguf

    file = place / f"{kind}.gguf"
    export_gguf(folder, file, type=kind)  # type: ignore[arg-type]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.port, settings.n_ctx, settings.n_parallel = port, 512, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.verbosity = -1
    server = xllamacpp.Server(settings)

    def ask(tokens: int) -> float:
        asked: dict[str, Any] = {
            "prompt": PROMPT, "n_predict": tokens, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True,
        }  # fmt: skip
        request = urllib.request.Request(
            server.listening_address + "/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        start = time.process_time()
        with urllib.request.urlopen(request) as reply:
            reply.read()
        return time.process_time() - start

    return lambda tokens: -ask(1) + ask(tokens + 1)


def bandwidth(x: torch.Tensor) -> float:
    """Bytes that a sum reads per processor second."""
    start = time.process_time()
    x.sum().item()
    return x.nbytes / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/decode_speed.md")
    options = parser.parse_args()
    if place := os.environ.get("LAPIS_LLAMA_CPP"):
        sys.path.append(place)
    torch.set_num_threads(1)
    engines: dict[str, Step] = {}
    read: dict[str, int] = {}
    for name, arguments in {
        "lapis float32": ("float32",),
        "lapis bfloat16": ("bfloat16",),
        "lapis int8": ("bfloat16", "int8"),
        "lapis float32, no compiler": ("float32", None, False),
        "lapis bfloat16, no compiler": ("bfloat16", None, False),
    }.items():
        engines[name], read[name] = lapis_engine(options.folder, *arguments)  # type: ignore[arg-type]
    for dtype in ("float32", "bfloat16"):
        engines[f"transformers {dtype}"] = transformers_engine(options.folder, dtype)
    with tempfile.TemporaryDirectory() as files:
        try:
            for kind in ("f32", "bf16", "q8_0"):
                engines[f"llama.cpp {kind}"] = llama_cpp_engine(options.folder, kind, Path(files))
        except ImportError:
            print("no xllamacpp: llama.cpp is left out", file=sys.stderr)
        x = torch.ones(128_000_000)
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        memory: list[float] = []
        for turn in range(-1, options.rounds):  # the first round only warms up
            measured = bandwidth(x)
            found = {name: options.tokens / step(options.tokens) for name, step in engines.items()}
            if turn >= 0:
                memory.append((measured + bandwidth(x)) / 2)
                for name, value in found.items():
                    speeds[name].append(value)
    lines = [
        "| decode, one row | tokens per second | of what memory allows | of llama.cpp bf16 |",
        "|---|---:|---:|---:|",
    ]
    for name, values in speeds.items():
        share = against = ""
        if name in read:
            share = f"{statistics.median(v * read[name] / m for v, m in zip(values, memory, strict=True)):.2f}"
        if other := speeds.get("llama.cpp bf16"):
            against = f"{statistics.median(v / o for v, o in zip(values, other, strict=True)):.2f}"
        lines.append(f"| {name} | {statistics.median(values):,.1f} | {share} | {against} |")
    for a, b in (
        ("lapis int8", "lapis bfloat16"), ("lapis float32", "transformers float32"),
        ("lapis bfloat16", "transformers bfloat16"), ("lapis float32", "lapis float32, no compiler"),
        ("lapis bfloat16", "lapis bfloat16, no compiler"),
    ):  # fmt: skip
        ratios = [one / other for one, other in zip(speeds[a], speeds[b], strict=True)]
        lines.append(f"| {a} over {b} | {statistics.median(ratios):.2f} times | | |")
    head = (
        f"{date.today()}: {options.folder.name}, {processor(*FLAGS)}, one thread, torch {torch.__version__}; "
        f"{options.tokens} tokens after {len(PROMPT)}, medians of {options.rounds} rounds in turn, processor seconds. "
        f"A sum reads {statistics.median(memory) / 1e9:.1f} GB/s (from {min(memory) / 1e9:.1f} to "
        f"{max(memory) / 1e9:.1f})."
    )
    print("\n".join([head, "", *lines]))
    if options.write:
        add_table(__file__, "Decoding beside what memory allows", [head, "", *lines])


if __name__ == "__main__":
    main()
