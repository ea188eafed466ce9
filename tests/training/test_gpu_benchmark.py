"""benchmarks/gpu.py in its smaller form: every section measures on a CPU, and none can hold up the others."""

import json
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from lapis.families import FAMILIES
from tests.oracles import small_models

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
    assert notes["tiny LoRA over nf4"] == {"absent": "no CUDA GPU"}
    assert notes["tiny LoRA over float32"]["tokens_per_second"] > 0


def test_merges_and_diffs_are_those_of_float64(gpu: Any) -> None:
    notes = figures(gpu, "weights")
    assert notes["tiny merge"]["unequal"] == 0 and notes["tiny diff"]["norm_gap"] < 1e-6, notes


def test_families_are_those_of_transformers(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    some = ("gemma3_text", "mixtral", "vit")
    monkeypatch.setattr(small_models, "MODELS", {name: small_models.MODELS[name] for name in some})
    notes = figures(gpu, "parity")
    assert set(notes) == set(some) and not list(gpu.faults(result("parity", notes))), notes


def test_every_model_type_is_held_against_transformers() -> None:
    assert set(small_models.MODELS) == {kind for family in FAMILIES for kind in family.model_types}


def test_a_family_that_differs_is_a_fault(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lapis.model.transformer import Transformer

    monkeypatch.setattr(small_models, "MODELS", {"gpt2": small_models.MODELS["gpt2"]})
    forward = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, *given: 1.1 * forward(self, *given))
    (fault,) = gpu.faults(result("parity", figures(gpu, "parity")))
    assert re.match(r"parity, gpt2: float32 is 0.\d+, more than 0.0001; bfloat16 is 0.\d+, more than 0.0\d+$", fault)


def test_a_killed_run_is_resumed_by_the_whole_script(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "resume"])
    assert gpu.main() == 0
    (figure,) = json.loads(capsys.readouterr().out)["sections"]["resume"]["figures"].values()
    assert figure["codes"] == [0, 0] and figure["largest_difference"] == 0.0


def result(section: str, notes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What the script has of one section."""
    return {"machine": {"gpu": None}, "sections": {section: {"seconds": 1.0, "figures": notes, **more}}}


@pytest.mark.parametrize(("section", "notes", "more", "fault"), [
    ("train", {"tiny": {"tokens_per_second": 5.0}}, {}, ""),
    ("train", {"tiny": {"failed": "OutOfMemoryError: x"}}, {}, "train, tiny: OutOfMemoryError: x"),
    ("train", {}, {"failed": "stopped after 9 s"}, "train: stopped after 9 s"),
    ("train", {}, {}, "train: no figure"),
    ("adapters", {"nf4": {"absent": "bitsandbytes is not installed"}}, {}, ""),
    ("parity", {"vit": {"absent": "transformers 4 has no ViT"}}, {}, ""),
    ("parity", {"vit": {"float32": 1e-6, "bfloat16": 0.02, "theirs": 0.01}}, {}, ""),
    ("parity", {"vit": {"float32": 0.01, "bfloat16": 0.0, "theirs": 0.0}}, {},
     "parity, vit: float32 is 0.01, more than 0.0001"),
    ("parity", {"vit": {"float32": float("nan"), "bfloat16": 0.0, "theirs": 0.0}}, {},
     "parity, vit: float32 is nan, more than 0.0001"),
    ("resume", {"killed": {"codes": [0, 0], "largest_difference": 1e-9}}, {},
     "resume, killed: largest_difference is 1e-09, more than 0"),
    ("resume", {"killed": {"codes": [0, 1], "failed": "the runs ended with 0 and 1"}}, {},
     "resume, killed: the runs ended with 0 and 1"),
    ("weights", {"merge": {"unequal": 200, "of": 1_000_000}}, {},
     "weights, merge: unequal is 200, more than 100"),
])  # fmt: skip
def test_what_is_wrong_is_named_and_what_is_absent_not(
    gpu: Any, section: str, notes: dict[str, Any], more: dict[str, Any], fault: str
) -> None:
    assert list(gpu.faults(result(section, notes, **more))) == ([fault] if fault else [])


def test_a_section_that_takes_too_long_is_ended(gpu: Any) -> None:
    part = gpu.section("parity", 0.2)
    assert part["failed"] == "stopped after 0 s" and part["figures"] == {}


def test_without_time_every_section_is_named(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--budget", "0", "--only", "train,resume"])
    assert gpu.main() == 1


def test_a_figure_that_failed_ends_the_script_with_1(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = {"seconds": 1.0, "figures": {"tiny": {"failed": "OutOfMemoryError: x"}}}
    monkeypatch.setattr(gpu, "section", lambda name, seconds: part)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "train"])
    assert gpu.main() == 1 and json.loads(capsys.readouterr().out)["faults"] == ["train, tiny: OutOfMemoryError: x"]


def test_the_table_has_every_figure(gpu: Any) -> None:
    result = {
        "machine": {"date": "2026-01-01T00:00:00", "gpu": "H100", "torch": "2.11", "python": "3.12", "processor": ""},
        "sections": {"train": {"seconds": 3.0, "figures": {"a": {"mfu": 0.5}, "b": {"failed": "OutOfMemoryError: x"}}},
                     "serve": {"seconds": 0.0, "figures": {}, "failed": "no time was left"}},
        "faults": ["serve: no time was left"],
    }  # fmt: skip
    text = "\n".join(gpu.table(json.loads(json.dumps(result))))
    assert text.startswith("## 2026-01-01, H100, torch 2.11") and "From a CPU" not in text
    assert "| a | 0.5 |  |" in text and "| b |  | OutOfMemoryError: x |" in text and "no time was left" in text
    here = {**result["machine"], "gpu": None, "processor": "EPYC"}
    heading, _, line = list(gpu.table({**result, "machine": here}))[:3]
    assert "a CPU and no GPU (EPYC)" in heading and "not what a GPU gives" in line
