"""Time to the first token and tokens per second: `lapis serve` and `transformers serve`, same folder, in turn.

    python benchmarks/serve.py FOLDER [--rounds 5] [--tokens 64] [--dtype float32] [--write]

Both servers run at once and are asked in turn, so that a busy machine is busy for both; what is not asked stands idle.
A client sends one chat and reads the events of a greedy reply. The first token is timed from the request to the first
event with text, of a prompt that the server has not seen. Tokens per second are those of all clients together, from
the first request to the last event. Beside them stands `lapis generate`'s own loop in a process without a server:
tokens per second over the whole reply, as a client would count them. Medians of the rounds. Leaves out: GPUs.
"""

import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import date
from itertools import count
from pathlib import Path

import httpx
import torch
from results_file import add_table

WORDS = "Tell a long story of a cat, a ship, a storm and the island where they meet. Number"
CLIENTS = (1, 8)
_numbers = count(1)

GENERATE = """
import json, sys, time
from lapis.generation.generate import stream
from lapis.generation.options import DecodingRuntime, Sampling
from lapis.generation.ready import open_ready
model, tokenizer = open_ready(sys.argv[1], DecodingRuntime(dtype=sys.argv[2]))
print("ready", flush=True)
for line in sys.stdin:
    messages = json.loads(line)
    start = time.perf_counter()
    pieces = stream(model, tokenizer, messages, Sampling(max_tokens=int(sys.argv[3])))
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            print(len(end.value.ids) / (time.perf_counter() - start), flush=True)
            break
"""


def messages() -> list[dict[str, str]]:
    """A chat that nobody has sent before; it differs in its first words."""
    return [{"role": "user", "content": f"{next(_numbers)}. {WORDS}."}]


@contextlib.contextmanager
def process(command: list[str], **pipes: object) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended with the block."""
    started = subprocess.Popen(command, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, **pipes)  # type: ignore[call-overload]
    try:
        yield started
    finally:
        started.terminate()
        started.wait(60)


@contextlib.contextmanager
def lapis(folder: Path, dtype: str) -> Iterator[tuple[str, str]]:
    """The address of `lapis serve`, and the model's name there."""
    command = [sys.executable, "-m", "lapis", "serve", str(folder), "--port", "0", "--dtype", dtype]
    with process(command, stderr=subprocess.PIPE) as server:
        assert server.stderr is not None
        for line in server.stderr:
            if match := re.search(r"serving at (http://\S+)/v1", line):
                yield match[1], folder.name
                return
        raise SystemExit("lapis serve did not start")


@contextlib.contextmanager
def transformers(folder: Path, dtype: str, *options: str) -> Iterator[tuple[str, str]]:
    """The address of `transformers serve`, and the model's name there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "serve",
        str(folder),
        "--port",
        str(port),
        "--dtype",
        dtype,
        "--device",
        "cpu",
    ]
    with process([*command, *options], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as server:
        place = f"http://127.0.0.1:{port}"
        for _ in range(240):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{place}/health", timeout=5).status_code == 200:
                    yield place, str(folder)
                    return
            if server.poll() is not None:
                break
            time.sleep(0.5)
        raise SystemExit("transformers serve did not start")


def ask(client: httpx.Client, place: tuple[str, str], tokens: int, results: list[tuple[float, int]]) -> None:
    """One reply: seconds to its first text, and its tokens."""
    body = {"model": place[1], "messages": messages(), "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    start, first, received, counted = time.perf_counter(), 0.0, 0, 0
    with client.stream("POST", f"{place[0]}/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            part = json.loads(line[6:])
            if part.get("choices") and part["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - start
                received += 1
            counted = (part.get("usage") or {}).get("completion_tokens", counted)
    results.append((first, counted or received))


def measure(client: httpx.Client, place: tuple[str, str], clients: int, tokens: int) -> tuple[float, float]:
    """Seconds to the first token (the median over clients), and tokens per second of all clients together."""
    results: list[tuple[float, int]] = []
    threads = [threading.Thread(target=ask, args=(client, place, tokens, results)) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if len(results) < clients:
        raise SystemExit(f"{place[0]}: {clients - len(results)} of {clients} requests failed")
    return statistics.median(first for first, _ in results), sum(n for _, n in results) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batching", action="store_true", help="with transformers' continuous batching")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/serve.md")
    options = parser.parse_args()
    extra = ("--continuous-batching",) if options.batching else ()
    figures: dict[tuple[str, int], list[tuple[float, float]]] = {}
    alone: list[float] = []
    command = [sys.executable, "-c", GENERATE, str(options.folder), options.dtype, str(options.tokens)]
    with (
        lapis(options.folder, options.dtype) as ours,
        transformers(options.folder, options.dtype, *extra) as theirs,
        process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as generate,
        httpx.Client(timeout=600) as client,
    ):
        assert generate.stdin is not None and generate.stdout is not None
        generate.stdout.readline()
        for turn in range(-1, options.rounds):  # the first round only warms up
            generate.stdin.write(json.dumps(messages()) + "\n")
            generate.stdin.flush()
            speed = float(generate.stdout.readline())
            if turn >= 0:
                alone.append(speed)
            for clients in CLIENTS:
                for name, place in (("transformers", theirs), ("lapis", ours)):
                    result = measure(client, place, clients, options.tokens)
                    if turn >= 0:
                        figures.setdefault((name, clients), []).append(result)
    lines = ["| | transformers serve | lapis serve | ratio |", "|---|---:|---:|---:|"]
    medians = {
        key: [statistics.median(values) for values in zip(*rounds, strict=True)] for key, rounds in figures.items()
    }
    for clients in CLIENTS:
        (their_first, their_speed), (our_first, our_speed) = (medians[n, clients] for n in ("transformers", "lapis"))
        named = f"{clients} client{'s' * (clients > 1)}"
        lines.append(
            f"| first token, ms, {named} | {their_first * 1e3:,.0f} | {our_first * 1e3:,.0f} "
            f"| {their_first / our_first:.2f} |"
        )
        lines.append(
            f"| tokens per second, {named} | {their_speed:,.1f} | {our_speed:,.1f} | {our_speed / their_speed:.2f} |"
        )
    one, eight, loop = medians["lapis", 1][1], medians["lapis", 8][1], statistics.median(alone)
    head = (
        f"{date.today()}: {options.folder.name}, {options.dtype}, torch {torch.__version__}, {os.cpu_count()} cores, "
        f"{os.environ.get('OMP_NUM_THREADS', 'as many')} thread(s); replies of {options.tokens} tokens, medians of "
        f"{options.rounds} rounds{', transformers with continuous batching' if options.batching else ''}."
    )
    tail = (
        f"Eight clients of lapis get {eight / one:.2f} times the tokens of one. `lapis generate` alone: {loop:,.1f} "
        f"tokens per second; the server gives one client {one / loop:.2f} of that."
    )
    print("\n".join([head, "", *lines, "", tail]))
    if options.write:
        add_table(__file__, "A server, side by side", [head, "", *lines, "", tail])


if __name__ == "__main__":
    main()
