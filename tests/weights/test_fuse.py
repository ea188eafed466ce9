"""`lapis fuse` from the command line, and what it refuses. That its sums are PEFT's is in oracles/test_peft.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapis.families.config import ModelConfig
from lapis.model.adapter import fold, write_adapter
from lapis.model.load import load, save
from lapis.model.lora import LoraConfig, wrap
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.folder import read_templates
from lapis.text.tokenizer.tokenizer import train_tokenizer

Lapis = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lapis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Lapis) -> Lapis:
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

    return run


def test_a_fused_model_is_the_folded_one_and_speaks(lapis: Lapis) -> None:
    status, out, _ = lapis("fuse", "adapter", "--out", "fused", "--json")
    assert status == 0
    result = json.loads(out)
    assert result["tensors"]["merged"] == 15 and result["lost_to_rounding"] > 0
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


@pytest.mark.parametrize("damage, message", [
    (_four_bits, "base: holds 4-bit weights; what adapter adds is smaller than their steps"),
    (lambda p: _set("adapter/adapter_config.json", base_model_name_or_path=str(p / "gone")), "its base cannot be"),
    (lambda p: _set("adapter/adapter_config.json", base_model_name_or_path=None), "give --base"),
    (lambda p: _set("adapter/adapter_config.json", peft_type="IA3"), "peft_type is 'IA3'"),
    (lambda p: _set("adapter/adapter_config.json", bias="all"), "bias is 'all'"),
    (lambda p: _set("adapter/adapter_config.json", r=True), "r is True"),
    (lambda p: _set("adapter/adapter_config.json", use_dora=True), "use_dora is True"),
    (lambda p: _set("adapter/adapter_config.json", init_lora_weights="pissa_niter_4"), "pissa_niter_4', which changes"),
    (lambda p: _set("adapter/adapter_config.json", init_lora_weights="loftq"), "'loftq', which changes the base"),
    (lambda p: _set("adapter/adapter_config.json", init_lora_weights="corda"), "'corda', which changes the base"),
    (lambda p: _set("adapter/adapter_config.json", init_lora_weights="lora_ga"), "'lora_ga', which changes the base"),
    (lambda p: _set("adapter/adapter_config.json", init_lora_weights=["pissa"]), "init_lora_weights is ['pissa']"),
    (lambda p: _set("adapter/adapter_config.json", alpha_pattern={"(q_proj": 3}), '"(q_proj" is no regular expression'),
    (lambda p: _set("adapter/adapter_config.json", alpha_pattern={r"(\w+.?)+!": 3}), "takes more than 1 s; write the"),
    (lambda p: _set("adapter/adapter_config.json", alpha_pattern={"q_proj": -1}), "to numbers above 0"),
    (lambda p: _set("adapter/adapter_config.json", rank_pattern={".*q_proj": 8}), "q_proj is 8 here, and 2 by its"),
    (lambda p: _set("adapter/adapter_config.json", trainable_token_indices=[1, 2]), "must list the 1 token"),
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
def test_what_does_not_fit_is_one_line(
    lapis: Lapis, damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    damage(tmp_path)
    status, out, err = lapis("fuse", "adapter", "--out", "fused")
    lines = [line for line in err.strip().splitlines() if not line.startswith("fusing")]  # progress of a slow machine
    assert status == 1 and out == "" and message in err and len(lines) == 1, err
    assert not Path("fused").exists()


def test_another_base_can_be_given_and_others_refuse_adapters(lapis: Lapis) -> None:
    Path("base").rename("moved")
    assert lapis("fuse", "adapter", "--out", "fused")[0] == 1
    assert lapis("fuse", "adapter", "--out", "fused", "--base", "moved")[0] == 0
    status, _, err = lapis("diff", "moved", "adapter")
    assert status == 1 and "its base cannot be opened" in err
    assert lapis("diff", "moved", "moved+adapter")[0] == 0
    status, _, err = lapis("tokens", "moved+adapter", "the cat")
    assert status == 1 and "make it a model with: lapis fuse adapter --base moved" in err
    assert lapis("fuse", "adapter", "--out", "moved", "--base", "moved", "--overwrite")[0] == 1


@pytest.mark.parametrize("command", ["fuse", "generate"])
def test_an_adapter_may_lie_beside_the_files_of_a_trainer(lapis: Lapis, command: str) -> None:
    shutil.copy("base/config.json", "adapter")
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"):
        Path("adapter", name).write_bytes(b"x")
    more = {"fuse": ["--out", "fused"], "generate": ["the cat", "--max-tokens", "2"]}
    status, _, err = lapis(command, "adapter", *more[command])
    assert status == 0, err
    status, _, err = lapis("tokens", "adapter", "the cat")
    assert status == 1 and "holds an adapter" in err


def test_a_model_beside_an_adapter_is_the_model(lapis: Lapis) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(f"adapter/{name}", "base")
    assert lapis("generate", "base", "the cat", "--max-tokens", "2")[0] == 0
    torch.testing.assert_close(load("base").embed.weight, load("adapter").embed.parametrizations.weight.original)


PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("own", ["file", "config", None])
@pytest.mark.parametrize("theirs", ["file", "config", "named", None])
def test_the_template_of_an_adapter_wins(lapis: Lapis, own: str | None, theirs: str | None) -> None:
    for folder, place, mark in (("base", theirs, "BASE"), ("adapter", own, "ADAPTER")):
        Path(folder, "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads(Path(folder, "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        if place == "config":
            config["chat_template"] = mark + PLAIN
        elif place is not None:
            Path(folder, "chat_template.jinja").write_text(mark + PLAIN)
        if place == "named":
            Path(folder, "additional_chat_templates").mkdir()
            Path(folder, "additional_chat_templates", "tool_use.jinja").write_text("TOOLS" + PLAIN)
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
    assert lapis("fuse", "adapter", "--out", "fused")[0] == 0
    templates = read_templates(Path("fused"))
    expected = "ADAPTER" if own else "BASE" if theirs else None
    assert templates.get("default", "").removesuffix(PLAIN) == (expected or "")
    assert ("tool_use" in templates) == (expected == "BASE" and theirs == "named")
    assert templates == read_templates(Path("adapter"), Path("base"))


def test_sampling_settings_are_the_bases_and_ends_are_both(lapis: Lapis) -> None:
    sampling = {"temperature": 0.6, "top_k": 20, "do_sample": True, "repetition_penalty": 1.05, "pad_token_id": 0}
    Path("base/generation_config.json").write_text(json.dumps({**sampling, "eos_token_id": [0, 2]}))
    Path("adapter/generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 1.0, "top_p": 0.9}))
    assert lapis("fuse", "adapter", "--out", "fused")[0] == 0
    written = json.loads(Path("fused/generation_config.json").read_text())
    assert written == {**sampling, "top_p": 0.9, "eos_token_id": [0, 2, 1]}
    Path("base/generation_config.json").unlink()
    assert lapis("fuse", "adapter", "--out", "fused", "--overwrite")[0] == 0
    written = json.loads(Path("fused/generation_config.json").read_text())
    assert written == {"eos_token_id": 1, "temperature": 1.0, "top_p": 0.9}


def test_a_small_adapter_is_kept_in_float32(lapis: Lapis) -> None:
    _tensors(lambda tensors: [tensor.mul_(0.05) for tensor in tensors.values()])
    status, out, _ = lapis("fuse", "adapter", "--out", "fused")
    lines = [line for line in out.splitlines() if "rounding took" in line]
    assert status == 0 and len(lines) == 1 and lines[0].endswith("--dtype float32 keeps it")
    status, out, _ = lapis("fuse", "adapter", "--out", "exact", "--dtype", "float32")
    assert status == 0 and "--dtype" not in out
    assert {tensor.dtype for tensor in load_file("exact/model.safetensors").values()} == {torch.float32}
    config = json.loads(Path("exact/config.json").read_text())
    assert {config[name] for name in ("dtype", "torch_dtype") if name in config} == {"float32"}
    folded = fold(load("adapter", torch.float32))
    for (name, a), b in zip(load("exact").named_parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
    assert json.loads(lapis("fuse", "adapter", "--out", "half", "--dtype", "float16", "--json")[1])["bytes_written"] > 0
    assert load("half").embed.weight.dtype == torch.float16
