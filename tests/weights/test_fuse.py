"""`lapis fuse` from the command line, and what it refuses. That its sums are PEFT's is in oracles/test_peft.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapis.cli.main import main
from lapis.families.config import ModelConfig
from lapis.model.adapter import fold, write_adapter
from lapis.model.load import load, save
from lapis.model.lora import LoraConfig, wrap
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer

Lapis = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lapis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Lapis:
    """Runs a command beside `base`, a tied bfloat16 model, and `adapter`, made on it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 9, 280)
    model = Transformer(ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, vocab=tokenizer.rows, context=32, tied=True))
    save(model.bfloat16(), "base")
    tokenizer.save(Path("base"))
    wrap(model, LoraConfig(rank=2, tokens=(3,)), "base")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    write_adapter(model, "adapter")
    tokenizer.save(Path("adapter"))

    def call(*arguments: str) -> tuple[int, str, str]:
        status: Any = 0
        try:
            main([*arguments])
        except SystemExit as end:
            status = end.code or 0
        out, err = capfd.readouterr()
        return int(status), out, err

    return call


def test_a_fused_model_is_the_folded_one_and_speaks(lapis: Lapis) -> None:
    status, out, _ = lapis("fuse", "adapter", "--out", "fused", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["tensors"]["merged"] == 15 and found["lost_to_rounding"] > 0
    folded = fold(load("adapter"))
    for (name, a), b in zip(load("fused").named_parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-8, atol=0, msg=name)
    assert "lm_head.weight" not in load_file("fused/model.safetensors")
    spoken = [lapis("generate", place, "the cat", "--temperature", "0", "--max-tokens", "5", "--json")[1]
              for place in ("fused", "adapter")]  # fmt: skip
    assert json.loads(spoken[0])["ids"] == json.loads(spoken[1])["ids"]


def _four_bits(_: Path) -> None:
    _set("base/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def _set(place: str, **fields: Any) -> None:
    path = Path(place)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file("adapter/adapter_model.safetensors")
    change(tensors)
    save_file(tensors, "adapter/adapter_model.safetensors")


LEAD = "base_model.model.model.layers.0.mlp.up_proj."


@pytest.mark.parametrize("damage, said", [
    (_four_bits, "base holds 4-bit weights; what adapter adds is smaller than their steps"),
    (lambda p: _set("adapter/adapter_config.json", base_model_name_or_path=str(p / "gone")), "its base cannot be"),
    (lambda p: _set("adapter/adapter_config.json", base_model_name_or_path=None), "give --base"),
    (lambda p: _set("adapter/adapter_config.json", peft_type="IA3"), "peft_type is 'IA3'"),
    (lambda p: _set("adapter/adapter_config.json", bias="all"), "bias is 'all'"),
    (lambda p: _set("adapter/adapter_config.json", r=True), "r is True"),
    (lambda p: _set("adapter/adapter_config.json", use_dora=True), "use_dora is True"),
    (lambda p: _set("adapter/adapter_config.json", trainable_token_indices=[1, 2]), "must list the 1 tokens"),
    (lambda p: _set("adapter/adapter_config.json", trainable_token_indices=[99999]), "rows go to 99999"),
    (lambda p: _tensors(lambda t: t.pop(LEAD + "lora_B.weight")), "mlp.up_proj has no lora_B"),
    (lambda p: _tensors(lambda t: t.update({LEAD + "lora_B.weight": torch.zeros(7, 2)})), "is 24x16, the adapter"),
    (lambda p: _tensors(lambda t: t.update({LEAD.replace("0", "7") + k: t[LEAD + k].clone() for k in
                                            ("lora_A.weight", "lora_B.weight")})), "layers.7.mlp.up_proj.weight"),
    (lambda p: _tensors(lambda t: t.update({"base_model.model.extra.weight": torch.zeros(2)})), "holds extra.weight"),
    (lambda p: _tensors(lambda t: t[LEAD + "lora_B.weight"].fill_(float("nan"))), "NaN or"),
    (lambda p: Path("adapter/adapter_model.safetensors").rename("adapter/adapter_model.bin"), "is a pickle"),
    (lambda p: Path("adapter/adapter_model.safetensors").write_bytes(b"\x09"), "adapter_model.safetensors"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(lapis: Lapis, damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    damage(tmp_path)
    status, out, err = lapis("fuse", "adapter", "--out", "fused")
    assert status == 1 and out == "" and said in err and len(err.strip().splitlines()) == 1, err
    assert not Path("fused").exists()


def test_another_base_can_be_given_and_other_commands_refuse_an_adapter(lapis: Lapis) -> None:
    Path("base").rename("moved")
    assert lapis("fuse", "adapter", "--out", "fused")[0] == 1
    assert lapis("fuse", "adapter", "--out", "fused", "--base", "moved")[0] == 0
    status, _, err = lapis("diff", "moved", "adapter")
    assert status == 1 and "make it a model with: lapis fuse adapter" in err
    assert lapis("fuse", "adapter", "--out", "moved", "--base", "moved", "--overwrite")[0] == 1
