"""`lapis merge` as a user types it: a recipe or a line of arithmetic, one JSON object, one line for a refusal."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lapis
from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with three small models: A, and B and C, fine-tunes of it."""
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["a few words of text, said again and again: " * 20], 300)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, vocab=300, context=64))
    for name in ("A", "B", "C"):
        save(model, tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * parameter.std().nan_to_num() * torch.randn_like(parameter)
        tokenizer.save(tmp_path / name)
    return tmp_path


def test_a_line_of_arithmetic(run: Run, models: Path) -> None:
    status, out, _ = run("merge", "A + 0.8*(B - C)", "--out", "O", "--json")
    result = json.loads(out)
    assert status == 0 and result["out"] == "O" and result["tensors"]["skipped"] == 0
    assert {"bytes_read", "bytes_written", "seconds", "peak_memory_bytes", "sha256"} <= result.keys()
    name = "model.layers.1.mlp.up_proj.weight"
    a, b, c, o = (lapis.open(models / folder).read(name).float() for folder in "ABCO")
    torch.testing.assert_close(o, a + 0.8 * (b - c))
    status, _, err = run("merge", "A + 0.8*(B - D)", "--out", "P")
    assert status == 1 and err.strip().splitlines()[-1] == "lapis: merge: D: there is no such folder; give a folder"


def test_a_recipe_and_its_output_speaks(run: Run, models: Path) -> None:
    recipe = models / "recipe.yaml"
    recipe.write_text(
        "merge_method: ties\nbase_model: A\nmodels:\n  - {model: B, parameters: {weight: 1}}\n"
        "  - {model: C, parameters: {weight: 0.5}}\nparameters: {density: 0.4}\n"
    )
    status, out, _ = run("merge", recipe, "--out", "O", "--dry-run")
    assert status == 0 and "would write O" in out and not (models / "O").exists()
    status, out, _ = run("merge", recipe, "--out", "O")
    assert status == 0 and "rounding took" in out
    model, tokenizer = lapis.load(models / "O")
    logits = model(torch.tensor([tokenizer.encode("a few words")]))
    assert bool(torch.isfinite(logits).all())
    assert run("merge", recipe, "--out", "O")[0] == 1


def test_the_methods_are_listed(run: Run) -> None:
    status, out, _ = run("merge", "--methods", "--json")
    listed = {entry["name"]: entry for entry in json.loads(out)["methods"]}
    assert status == 0 and len(listed) == 26
    assert listed["ties"]["parameters"]["density"]["default"] == 1.0 and "2306.01708" in listed["ties"]["help"]
    assert listed["slerp"]["parameters"]["t"]["default"] is None
    assert "share of each model" in run("merge", "--methods")[1]
