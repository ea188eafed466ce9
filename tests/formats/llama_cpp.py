"""llama.cpp as an oracle, in a process of its own: `python llama_cpp.py FILE [embedding]` answers requests.

xllamacpp holds it. Where that lies outside of the environment, LAPIS_LLAMA_CPP names the folder (`pip --target`).
A process of its own, since llama.cpp ends the process where a file is wrong, and then the test should fail and not end.
"""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PLACE = os.environ.get("LAPIS_LLAMA_CPP", "")


class LlamaCpp:
    """A GGUF file that llama.cpp has loaded."""

    def __init__(self, file: Path, *, embedding: bool = False) -> None:
        command = [sys.executable, __file__, str(file), *(["embedding"] if embedding else [])]
        environment = {**os.environ, "PYTHONPATH": PLACE, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        line = self.process.stdout.readline()
        while line and line != "ready\n":
            line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"llama.cpp does not load {file}: {self.process.stderr.read()[-2000:]}")

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, path: str, **request: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([path, request]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("reply "):
                return json.loads(line.removeprefix("reply "))
        raise AssertionError("llama.cpp ended")

    def encode(self, text: str, special: bool = False, around: bool = False) -> list[int]:
        reply = self.ask("/tokenize", content=text, add_special=around, parse_special=special)
        return [int(i) for i in reply["tokens"]]

    def log_probabilities(self, ids: list[int], vocab: int) -> list[float]:
        """Of each id as the next after `ids`."""
        # What is sampled must be a whole character, else nothing is reported; the probabilities are those before that
        letter = self.encode("a")[0]
        reply = self.ask("/completion", prompt=ids, n_predict=1, n_probs=vocab, temperature=0.0, cache_prompt=False,
                         logit_bias=[[letter, 1000.0]])  # fmt: skip
        top = reply["completion_probabilities"][0]["top_logprobs"]
        found = {entry["id"]: entry["logprob"] for entry in top}
        return [found.get(i, float("-inf")) for i in range(vocab)]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        reply = self.ask(
            "/completion", prompt=ids, n_predict=count, temperature=0.0, cache_prompt=False, return_tokens=True,
            ignore_eos=True,
        )  # fmt: skip
        return [int(i) for i in reply["tokens"]]

    def embed(self, ids: list[int]) -> list[float]:
        """Mean of the last layer over the ids, of length 1."""
        reply = self.ask("/embedding", content=ids)
        values = reply[0]["embedding"]
        return list(values[0] if isinstance(values[0], list) else values)


@cache
def _is_there() -> bool:
    probe = [sys.executable, "-c", "import xllamacpp"]
    return subprocess.run(probe, env={**os.environ, "PYTHONPATH": PLACE}, capture_output=True).returncode == 0


def need_llama_cpp() -> None:
    """Skips the test where llama.cpp is not there."""
    if not _is_there():
        pytest.skip("no xllamacpp in this environment, nor where LAPIS_LLAMA_CPP says")


def _serve(file: str, embedding: bool) -> None:
    import xllamacpp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.port, settings.n_ctx, settings.n_parallel = port, 512, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup, settings.verbosity = False, -1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if embedding:
        settings.embedding = True
    server = xllamacpp.Server(settings)
    print("ready", flush=True)
    for line in sys.stdin:
        path, request = json.loads(line)
        asked = urllib.request.Request(
            server.listening_address + path, json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        try:
            reply = urllib.request.urlopen(asked).read().decode()
        except urllib.error.HTTPError as error:
            reply = error.read().decode()
        print("reply " + json.dumps(json.loads(reply)), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], "embedding" in sys.argv[2:])
