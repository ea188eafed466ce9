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


HTTP = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=300))


@dataclass
class Server:
    """A server process that takes requests. lines: what it has written to standard error."""

    process: subprocess.Popen
    url: str
    lines: list[str] = field(default_factory=list)

    def ask(self, headers=None, **fields) -> httpx.Response:
        """One chat completion."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], **fields}
        return HTTP.post(f"{self.url}/v1/chat/completions", json=body, headers=headers)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(*arguments: object, code: str = "", **environment: str) -> Iterator[Server]:
    """`lapis serve` with these arguments, at a free port. code: a program that runs it, else it is `-m lapis`."""
    program = ["-c", code] if code else ["-m", "lapis"]
    command = [sys.executable, *program, "serve", *map(str, arguments), "--port", "0"]
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


TOOL_TEMPLATE = """{%- if tools %}{{ '<|im_start|>system\n# Tools\nCall as <tool_call>...</tool_call>.\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>\n' + (call.function.arguments | tojson) + '</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture(scope="session")
def long_folder(tmp_path_factory) -> Path:
    """A model whose replies may take minutes."""
    return make_folder(tmp_path_factory.mktemp("serve") / "long", context=16_384)


@pytest.fixture(scope="session")
def server(folder, long_folder, tmp_path_factory) -> Iterator[Server]:
    """One server for all tests that leave it as it was: "tiny", "long", and "tools", whose template tells of tools."""
    tools = make_folder(tmp_path_factory.mktemp("serve") / "tools", context=1024)
    (tools / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    with serving(folder, long_folder, tools, "--dtype", "float32", "--rows", "4") as started:
        yield started


@pytest.fixture(scope="module")
def key_server(folder) -> Iterator[Server]:
    """A server of two places and four seats, which asks for a key and knows a name and a page of its own."""
    options = ("--allow-host", "models.example", "--cors", "https://page.example", "--rows", "2", "--queue", "4")
    with serving(folder, "--dtype", "float32", "--api-key-env", "TEST_KEY", *options, TEST_KEY="secret-key") as started:
        yield started


QUICK = """
import lapis.serving.gate, lapis.serving.listener
from lapis.cli.main import main
lapis.serving.listener.REQUEST_SECONDS = lapis.serving.listener.STALL_SECONDS = 1.0
lapis.serving.gate.Limits.__init__.__defaults__ = ((), (), None, 4_000_000, 1.0)
main()
"""


@pytest.fixture(scope="module")
def quick_server(long_folder) -> Iterator[Server]:
    """A server whose patience with slow clients is a second."""
    with serving(long_folder, "--dtype", "float32", code=QUICK) as started:
        yield started


@pytest.fixture(scope="session")
def start() -> Callable[..., contextlib.AbstractContextManager[Server]]:
    return serving
