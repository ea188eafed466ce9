"""A tensor that config.json asks for and a folder lacks: one line in every command that reads weights."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapis.cli.main import main
from lapis.families.config import ModelConfig
from lapis.model.adapter import write_adapter
from lapis.model.load import load, save
from lapis.model.lora import LoraConfig, wrap
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer

GONE = "model.layers.1.mlp.up_proj.weight"
TEXT = "a few words of text, said again and again: "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, chat: whole models. broken, broken_base: the same without GONE. adapter: made for base. Material."""
    place = tmp_path_factory.mktemp("missing")
    tokenizer = train_tokenizer([TEXT * 20], 300)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, vocab=300, context=64))
    for role in ("base", "chat"):
        save(model, place / role)
        tokenizer.save(place / role)
        with torch.no_grad():
            model.blocks[0].mlp.up.weight *= 1.01
    adapted = load(place / "base")
    write_adapter(wrap(adapted, LoraConfig(rank=2), str(place / "base")), place / "adapter")
    for role, whole in (("broken", "chat"), ("broken_base", "base")):
        shutil.copytree(place / whole, place / role)
        tensors = load_file(place / role / "model.safetensors")
        tensors.pop(GONE)
        save_file(tensors, place / role / "model.safetensors", metadata={"format": "pt"})
    (place / "text.txt").write_text(TEXT * 20)
    chat = {"messages": [{"role": "user", "content": "a few"}, {"role": "assistant", "content": "words"}]}
    (place / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 4)
    (place / "recipe.yaml").write_text(
        "merge_method: linear\nmodels:\n- {model: base, parameters: {weight: 1}}\n"
        "- {model: broken, parameters: {weight: 1}}\n"
    )
    (place / "run.yaml").write_text(
        "objective: causal\nmodel: broken\ndata: text.txt\ncontext: 32\nout: out\nsteps: 1\nthreads: 1\n"
    )
    return place


@pytest.mark.parametrize("command", [
    "graft --base broken --chat chat --onto base --out out",
    "graft --base base --chat broken --onto base --out out",
    "graft --base base --chat chat --onto broken --out out",
    "graft --base base --chat chat --onto broken --out out --dry-run",
    "merge recipe.yaml --out out",
    "merge 'broken + chat - base' --out out",
    "merge 'base + broken - chat' --out out",
    "fuse adapter --base broken --out out",
    "diff broken chat",
    "diff base broken",
    "diff base chat broken",
    "plan --base broken --chat chat --chats chats.jsonl",
    "plan --base base --chat broken",
    "plan --base base --chat chat --onto broken --chats chats.jsonl --text text.txt",
    "eval broken --text text.txt",
    "lens broken words",
    "lens base words --against broken",
    "generate broken words",
    "chat broken",
    "inspect broken",
    "classify broken words",
    "train run.yaml",
    "generate adapter words",
])  # fmt: skip
def test_every_command_names_the_tensor(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    if command == "generate adapter words":  # the base that the adapter names has lost the tensor
        shutil.move(place / "base", place / "aside")
        shutil.copytree(place / "broken_base", place / "base")
    try:
        with pytest.raises(SystemExit) as end:
            main(shlex.split(command))
    finally:
        if (place / "aside").exists():
            shutil.rmtree(place / "base")
            shutil.move(place / "aside", place / "base")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lapis:")]
    assert end.value.code == 1 and len(errors) == 1 and GONE in errors[0]
    assert not (place / "out").exists()


@pytest.mark.parametrize("command, remedy", [
    ("fuse lost --out out", "give --base, the model that it was trained on"),
    ("generate lost words", "set base_model_name_or_path in adapter_config.json"),
    ("eval lost --text text.txt", "set base_model_name_or_path in adapter_config.json"),
])  # fmt: skip
def test_an_adapter_without_its_base_has_one_remedy(
    command: str, remedy: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that the command has: only fuse takes --base."""
    monkeypatch.chdir(place)
    if not (place / "lost").exists():
        shutil.copytree(place / "adapter", place / "lost")
        config = json.loads((place / "lost" / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "/nowhere/at/all"
        (place / "lost" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as end:
        main(shlex.split(command))
    errors = capsys.readouterr().err
    assert end.value.code == 1 and errors.count("\n") == 1
    assert errors.endswith(f"/nowhere/at/all: there is no such folder; {remedy}\n") and ("--base" in errors) == (
        command.startswith("fuse")
    )
