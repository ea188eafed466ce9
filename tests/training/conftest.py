"""A tiny model, its tokenizer, and texts and chats that this file writes."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lapis.families.config import ModelConfig
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import ChatRecord, Document
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXTS = [
    f"The cat number {i} sat on the mat and counted to {i * 7 % 13}. It slept under tree {i % 5}." for i in range(90)
]
SMALL_RUN = {
    "objective": "causal", "new": {"dim": 32, "layers": 1, "heads": 2, "ffn_dim": 48}, "tokenizer": "tok",
    "data": "texts.jsonl", "context": 64, "out": "run", "steps": 40, "batch": 4, "threads": 1, "precision": "float32",
    "sample_every": 0, "compile": "off",
}  # fmt: skip
"""Settings of a run within `data_folder`."""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    return [Document(text, Path("texts.txt"), line) for line, text in enumerate(TEXTS, 1)]


@pytest.fixture(scope="session")
def chats() -> list[ChatRecord]:
    return [
        ChatRecord(
            [
                {"role": "user", "content": f"Where does cat {i} sleep?"},
                {"role": "assistant", "content": f"Under tree {i % 5}."},
                {"role": "user", "content": "How far does it count?"},
                {"role": "assistant", "content": f"To {i * 7 % 13}."},
            ],
            Path("chats.jsonl"),
            i + 1,
        )
        for i in range(24)
    ]


@pytest.fixture
def data_folder(tokenizer: Tokenizer, documents: list[Document], tmp_path: Path) -> Path:
    """A folder with a tokenizer (tok) and texts.jsonl."""
    (tmp_path / "tok").mkdir()
    tokenizer.save(tmp_path / "tok")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents))
    return tmp_path


@pytest.fixture
def new_model(tokenizer: Tokenizer) -> Callable[[], Transformer]:
    """Makes the same small model each time."""

    def make() -> Transformer:
        torch.manual_seed(0)
        return Transformer(
            ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab=tokenizer.rows, context=64, tied=True)
        )

    return make


@pytest.fixture(scope="session")
def benchmark_module() -> Callable[[str], ModuleType]:
    """Opens a script of benchmarks/ by its name."""

    def open_module(name: str) -> ModuleType:
        sys.path.insert(0, str(BENCHMARKS))
        try:
            spec = importlib.util.spec_from_file_location(f"{name}_bench", BENCHMARKS / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(BENCHMARKS))
        return module

    return open_module


@pytest.fixture
def here(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data_folder)


@pytest.fixture(scope="module")
def bench(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    """benchmarks/shard.py, whose processes, settings and runs tests of several processes take, with fewer steps."""
    return benchmark_module("shard")


@pytest.fixture(scope="module")
def place(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the runs of `bench` read."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shard")
    bench.prepare(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
