"""benchmarks/gpu.py in its smaller form: every section measures on a CPU, and none can hold up the others."""

import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

OPTIONAL = ("plotly", "cyclopts", "bitsandbytes", "fastapi", "uvicorn", "gguf", "pyarrow")  # what it must do without


@pytest.fixture(scope="module")
def gpu(benchmark_module: Callable[[str], ModuleType]) -> Any:
    return benchmark_module("gpu")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only torch, transformers and what they need are installed, and without a GPU."""
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def figures(gpu: Any, name: str) -> dict[str, dict[str, Any]]:
    notes: dict[str, dict[str, Any]] = {}
    gpu.SECTIONS[name][0](lambda what, **measured: notes.update({what: measured}))
    return notes


@pytest.mark.parametrize("name", ["train", "fsdp", "decode", "serve"])
def test_a_section_measures_on_a_cpu(gpu: Any, name: str) -> None:
    notes = figures(gpu, name)
    assert notes and all(measured["tokens_per_second"] > 0 for measured in notes.values()), notes


def test_what_needs_a_gpu_is_noted_and_the_rest_goes_on(gpu: Any) -> None:
    notes = figures(gpu, "adapters")
    assert "needs a CUDA GPU" in notes["tiny LoRA over nf4"]["failed"]
    assert notes["tiny LoRA over float32"]["tokens_per_second"] > 0


def test_merges_and_diffs_are_those_of_float64(gpu: Any) -> None:
    notes = figures(gpu, "weights")
    assert notes["tiny merge"]["unequal"] == 0 and notes["tiny diff"]["norm_gap"] < 1e-6, notes


def test_families_are_those_of_transformers(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    some = ("llama", "gemma3", "vit")
    monkeypatch.setattr(gpu, "FAMILIES", {name: gpu.FAMILIES[name] for name in some})
    notes = figures(gpu, "parity")
    assert set(notes) == set(some) and all(measured["float32"] < 1e-4 for measured in notes.values()), notes


def test_a_section_that_takes_too_long_is_ended(gpu: Any) -> None:
    part = gpu.section("parity", 0.2)
    assert part["failed"] == "stopped after 0 s" and part["figures"] == {}


def test_without_time_every_section_is_named(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--budget", "0", "--only", "train,resume"])
    assert gpu.main() == 1


def test_the_table_has_every_figure(gpu: Any) -> None:
    result = {
        "machine": {"date": "2026-01-01T00:00:00", "gpu": "H100", "torch": "2.11", "python": "3.12", "processor": ""},
        "sections": {"train": {"seconds": 3.0, "figures": {"a": {"mfu": 0.5}, "b": {"failed": "OutOfMemoryError: x"}}},
                     "serve": {"seconds": 0.0, "figures": {}, "failed": "no time was left"}},
    }  # fmt: skip
    text = "\n".join(gpu.table(json.loads(json.dumps(result))))
    assert "| a | 0.5 |  |" in text and "| b |  | OutOfMemoryError: x |" in text and "no time was left" in text
