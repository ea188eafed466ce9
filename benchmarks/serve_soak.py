"""A server under 32 clients that come, go and break off: no request is lost, and memory stays flat.

    python benchmarks/serve_soak.py [FOLDER] [--minutes 10] [--clients 32] [--write]

A client sends a chat of random length and reads the reply, whole or as events; some leave in the middle, some send what
is refused. A reply that was waited for has to be complete, or a 429 that says when to come back. Memory is what the
server process holds (RSS), from the end of a fifth of the time, when every place has been used, to the end. Without a
folder the model is a small random one.
"""

import argparse
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import httpx
import torch
from results_file import add_table

WORDS = "the cat sat on the mat while a bird sang and the dog ate the fish".split()
MOST_WORDS, MOST_TOKENS = 120, 80  # of a chat, and of its reply
SETTLED = 0.2  # of the time, until memory is looked at


def make_folder(place: Path) -> Path:
    """A small random model with a chat template."""
    from lapis.families.config import ModelConfig
    from lapis.model.load import save
    from lapis.model.transformer import Transformer
    from lapis.text.tokenizer.tokenizer import train_tokenizer

    torch.manual_seed(0)
    config = ModelConfig(dim=256, layers=6, heads=4, kv_heads=2, ffn_dim=512, vocab=330, context=1024, family="llama")
    save(Transformer(config), place)
    train_tokenizer([" ".join(WORDS) * 20], 320).save(place)
    return place


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, int]]:
    """The address of `lapis serve`, and its process."""
    command = [sys.executable, "-m", "lapis", "serve", str(folder), "--port", "0", "--queue", "24"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if match := re.search(r"serving at (http://\S+)/v1", line):
                yield match[1], server.pid
                return
        raise SystemExit("lapis serve did not start")
    finally:
        server.terminate()
        if server.wait(60):
            raise SystemExit(f"lapis serve ended with status {server.returncode}")


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def fill(place: str, model: str) -> None:
    """Long chats in every place at once: their keys and values take the memory that they will take."""
    longest = max(WORDS, key=len)

    def ask(number: int) -> None:
        content = f"{number} " + " ".join([longest] * MOST_WORDS)
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": MOST_TOKENS}
        httpx.post(f"{place}/v1/chat/completions", json=body, timeout=300).raise_for_status()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Client(threading.Thread):
    """One client; counts how its requests went."""

    def __init__(self, place: str, model: str, seed: int, end: float) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.place, self.model, self.draw, self.end = place, model, random.Random(seed), end

    def run(self) -> None:
        """Until the time is up."""
        with httpx.Client(base_url=self.place, timeout=300) as client:
            while time.monotonic() < self.end:
                try:
                    self.counts[self.request(client)] += 1
                except (httpx.HTTPError, json.JSONDecodeError, KeyError) as error:
                    self.counts[f"lost: {type(error).__name__}"] += 1

    def request(self, client: httpx.Client) -> str:
        """One request; what came of it."""
        draw = self.draw
        words = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, MOST_WORDS)))
        tokens = draw.randrange(1, MOST_TOKENS)
        body = {
            "model": self.model, "messages": [{"role": "user", "content": words}], "max_tokens": tokens,
            "temperature": draw.choice((0, 1)), "stream": draw.random() < 0.6, "n": draw.choice((1, 1, 1, 2)),
        }  # fmt: skip
        if draw.random() < 0.05:
            body["temperature"] = -1
        if not body["stream"]:
            reply = client.post("/v1/chat/completions", json=body)
            return self.outcome(reply, [choice["finish_reason"] for choice in reply.json().get("choices", [])], body)
        leaves = draw.random() < 0.3
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                reply.read()
                return self.outcome(reply, [], body)
            ends, done = [], False
            for number, line in enumerate(reply.iter_lines()):
                if leaves and number > 4:
                    return "left"
                done = done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    ends += [choice["finish_reason"] for choice in json.loads(line[6:])["choices"]]
            return self.outcome(reply, [end for end in ends if end], body) if done else "lost: no end"

    def outcome(self, reply: httpx.Response, ends: list[str], body: dict[str, object]) -> str:
        """What a reply that was waited for is."""
        if reply.status_code == 400 and body["temperature"] == -1:
            return "refused"
        if reply.status_code == 429 and reply.headers.get("retry-after"):
            time.sleep(self.draw.random())
            return "429"
        return "complete" if len(ends) == body["n"] else f"lost: status {reply.status_code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--write", action="store_true", help="keep the line in benchmarks/results/serve_soak.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or make_folder(Path(scratch) / "small")
        with serving(folder) as (place, process):
            fill(place, folder.name)
            begin = time.monotonic()
            end = begin + options.minutes * 60
            clients = [Client(place, folder.name, seed, end) for seed in range(options.clients)]
            for client in clients:
                client.start()
            memory = []
            while time.monotonic() < end:
                time.sleep(1)
                if time.monotonic() > begin + SETTLED * options.minutes * 60:
                    memory.append(resident(process))
            for client in clients:
                client.join()
            for _ in range(200):
                health = httpx.get(f"{place}/health").json()
                if health["running"] == health["waiting"] == 0:
                    break
                time.sleep(0.1)
    counts = sum((client.counts for client in clients), Counter())
    lost = sum(number for what, number in counts.items() if what.startswith("lost"))
    busy = health["running"] + health["waiting"]
    third = max(len(memory) // 3, 1)
    first, last = (sum(part) / len(part) for part in (memory[:third], memory[-third:]))
    line = (
        f"{date.today()}: {folder.name}, {options.clients} clients, {options.minutes:g} minutes: "
        f"{sum(counts.values()):,} requests ({', '.join(f'{n:,} {what}' for what, n in counts.most_common())}); "
        f"{lost} lost; places in use at the end: {health['running']}. Memory, settled: {first / 1e6:,.1f} MB in the "
        f"first third, {last / 1e6:,.1f} MB in the last ({last / first - 1:+.1%}); at most {max(memory) / 1e6:,.1f} MB."
    )
    print(line)
    if options.write:
        add_table(__file__, "A server under clients that come, go and break off", [line])
    if lost or busy or last > first * 1.05:
        raise SystemExit("the soak failed")


if __name__ == "__main__":
    main()
