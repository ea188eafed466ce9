"""A tiny model in a folder, and real server processes that serve it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch

from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer

TEXT = (
    'the cat sat on the mat, and the dog — кіт 고양이 猫 😀 — ate the fish while a bird sang. {"name": [1, 2.5, true]} '
)
SHAPE = {
    "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "vocab": 330, "context": 256, "bias": "qkv",
    "family": "qwen2",
}  # fmt: skip


def make_folder(place: Path, seed: int = 0, **options) -> Path:
    """A model folder with random weights that says something else at every step, a tokenizer, and ChatML's template."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**SHAPE, **options})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    save(model, place)
    train_tokenizer([TEXT * 4], 320).save(place)
    return place


@dataclass
class Server:
    """A server process that takes requests. lines: what it has written to standard error."""

    process: subprocess.Popen
    url: str
    lines: list[str] = field(default_factory=list)

    def ask(self, **fields) -> httpx.Response:
        """One chat completion."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], **fields}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(*arguments: object, **environment: str) -> Iterator[Server]:
    """`lapis serve` with these arguments, at a free port."""
    command = [sys.executable, "-m", "lapis", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    server = Server(process, "")
    assert process.stderr is not None
    for line in process.stderr:
        server.lines.append(line)
        if match := re.search(r"serving at (http://\S+)/v1", line):
            server.url = match[1]
            break
    reader = threading.Thread(target=lambda: server.lines.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        assert server.url, "".join(server.lines)
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join()


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="session")
def server(folder) -> Iterator[Server]:
    """One server for all tests that leave it as it was."""
    with serving(folder, "--dtype", "float32", "--rows", "4") as started:
        yield started


@pytest.fixture(scope="session")
def start() -> Callable[..., contextlib.AbstractContextManager[Server]]:
    return serving
