"""Damaged folders of mixtures typed to each command: one line, no status 0 where numbers would be others, no output."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer
from tests.model.conftest import SHAPES

RUNS = ("inspect", "generate", "export", "train")
FAMILIES = ("qwen3_moe", "gpt_oss", "gemma4-experts")
Typed = Callable[[str], tuple[int, str]]


@pytest.fixture(params=FAMILIES)
def typed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> Typed:
    """typed(command) -> the status, and what is said where it is not 0; beside `bad`, which is `good` until changed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 9, 280)
    model = Transformer(dataclasses.replace(SHAPES[request.param], vocab=tokenizer.rows, context=64))
    for name in ("good", "bad"):
        save(model, name)
        tokenizer.save(Path(name))
        for manifest in Path(name).glob("lapis-manifest*"):
            manifest.unlink()
    Path("text.txt").write_text("the cat sat on the mat\n" * 40)
    Path("run.yaml").write_text("{objective: causal, model: bad, data: text.txt, context: 16, steps: 1, out: out}")
    Path("recipe.yaml").write_text("merge_method: linear\nmodels: [{model: bad, parameters: {weight: 0.5}}, "
                                   "{model: good, parameters: {weight: 0.5}}]\n")  # fmt: skip
    commands = {
        "inspect": "inspect bad", "generate": "generate bad cat --max-tokens 1", "export": "export bad --gguf out",
        "train": "train run.yaml", "diff": "diff good bad", "merge": "merge recipe.yaml --out out",
    }  # fmt: skip

    def call(command: str) -> tuple[int, str]:
        status, out, err = run(*commands[command].split())
        if status:
            assert out == "" and err.count("\n") == 1 and not Path("out").exists(), (out, err)
        return status, err if status else out + err

    return call


def change(**fields: Any) -> None:
    path = Path("bad/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_activation_that_is_not_known(typed: Typed) -> None:
    field = "hidden_activation" if "hidden_activation" in Path("bad/config.json").read_text() else "hidden_act"
    change(**{field: "mish"})
    for command in RUNS:
        assert f"{field} is 'mish'; lapis reads gelu" in typed(command)[1]
    assert f"merge: {field} is mish in bad and " in typed("merge")[1]
    status, text = typed("diff")
    assert status == 0 and "mish in b: the same weights compute something else" in " ".join(text.split())


@pytest.mark.parametrize("settings", [{"quant_method": "zipq", "bits": 3}, "zipq"])
def test_a_quantization_that_is_not_known(typed: Typed, settings: Any) -> None:
    change(quantization_config=settings)
    for command in RUNS:
        status, text = typed(command)
        assert status == (command != "inspect")
        assert "quantization_config is 'zipq'; lapis runs 16-bit weights and wider: give the" in text
    for command in ("diff", "merge"):
        status, text = typed(command)
        assert status == 0 and "quantization_config of bad is 'zipq', which is not known" in " ".join(text.split())


def test_layer_types_of_another_length(typed: Typed) -> None:
    layers = json.loads(Path("bad/config.json").read_text())["num_hidden_layers"]
    change(layer_types=["full_attention"] * (layers + 1))
    for command in RUNS:
        assert f"expected a list of {layers} names" in typed(command)[1]
    for command in ("diff", "merge"):
        line = f"config.json: layer_types has {layers + 1} entries, num_hidden_layers is {layers}; fetch"
        assert line in typed(command)[1]


def test_more_experts_than_there_are(typed: Typed) -> None:
    written = json.loads(Path("bad/config.json").read_text())
    change(**{"num_local_experts" if "num_local_experts" in written else "num_experts": 6})
    for command in RUNS:
        assert "config.json says 6 experts, the tensors have 4; fetch both again" in typed(command)[1]
    for command in ("diff", "merge"):
        assert "is 4x16 but 6x16 by config.json, and " in typed(command)[1]


def test_experts_without_dimensions(typed: Typed) -> None:
    tensors = load_file("bad/model.safetensors")
    name = next(name for name in tensors if "experts" in name and "down_proj" in name and "bias" not in name)
    save_file({**tensors, name: torch.zeros(())}, "bad/model.safetensors", {"format": "pt"})
    for command in (*RUNS, "diff", "merge"):
        status, text = typed(command)
        assert status == 1 and f"{name} is a scalar but " in text


def test_a_router_of_another_shape(typed: Typed) -> None:
    tensors = load_file("bad/model.safetensors")
    name = [name for name in tensors if tensors[name].shape == (4, 16) and "experts" not in name][-1]
    save_file({**tensors, name: torch.zeros(5, 16)}, "bad/model.safetensors", {"format": "pt"})
    for command in (*RUNS, "diff", "merge"):
        status, text = typed(command)
        assert status == 1 and f"{name} is 5x16 but 4x16 by config.json" in text
