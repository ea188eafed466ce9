"""Fault 19 in every command that runs a model: NaN in a weight is refused by the tensor's name, never computed with.

A NaN in a query or key projection gives finite logits, since a softmax over NaN can be masked; so what a model says
does not show that it is damaged.
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapis.checkpoint.commit import commit
from lapis.cli.main import main
from lapis.errors import CheckpointError
from lapis.families.config import ModelConfig
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer

TEXTS = ["The cat sleeps under the tree.", "Anak itu makan nasi di rumah.", "A dog runs."]
CHAT = {"messages": [{"role": "user", "content": "The cat?"}, {"role": "assistant", "content": "A dog runs."}]}
DAMAGED = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("nan")
    tokenizer = train_tokenizer(TEXTS * 3, 300)
    torch.manual_seed(0)
    config = ModelConfig(dim=64, layers=3, heads=4, kv_heads=2, ffn_dim=96, vocab=tokenizer.rows, context=64, tied=True)
    model = Transformer(config)
    for name in ("good", "nan"):
        with commit(root / name) as staging:
            save(model, staging.path)
            tokenizer.save(staging.path)
    place = root / "nan" / "model.safetensors"
    tensors = load_file(place)
    tensors[DAMAGED][5, 7] = math.nan
    save_file(tensors, place, metadata={"format": "pt"})
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 30))
    (root / "chats.jsonl").write_text((json.dumps(CHAT) + "\n") * 4)
    (root / "train.yaml").write_text(f"model: {root}/nan\nobjective: causal\ndata: {root}/text.jsonl\ncontext: 16\n")
    return SimpleNamespace(root=root, **{name: root / name for name in ("good", "nan")})


COMMANDS = {
    "generate": ["generate", "{nan}", "The cat", "--max-tokens", "4"],
    "lens": ["lens", "{nan}", "The cat"],
    "lens --against": ["lens", "{good}", "The cat", "--against", "{nan}"],
    "eval": ["eval", "{nan}", "--text", "{root}/text.jsonl"],
    "eval --chats": ["eval", "{nan}", "--chats", "{root}/chats.jsonl"],
    "chat": ["chat", "{nan}"],
    "plan": ["plan", "--base", "{good}", "--chat", "{nan}", "--goal", "style", "--budget", "0.5", "--chats",
             "{root}/chats.jsonl", "--out", "{root}/plan.yaml"],
    "train": ["train", "{root}/train.yaml", "out={root}/trained", "steps=2"],
    "graft": ["graft", "--base", "{good}", "--chat", "{nan}", "--onto", "{good}", "--out", "{root}/out"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_fault_19_a_damaged_weight_is_named(
    folders: SimpleNamespace, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    arguments = [part.format(**vars(folders)) for part in COMMANDS[command]]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 1 and DAMAGED in captured.err and "NaN or Inf" in captured.err
    assert captured.out == "" and "nan" not in captured.out
    assert not (folders.root / "out").exists() and not (folders.root / "trained").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fault_19_any_element_of_any_dtype(folders: SimpleNamespace, tmp_path: Path, value: float, dtype) -> None:
    place = folders.nan / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(place).items()}
    tensors[DAMAGED][5, 7] = 0.0
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((folders.nan / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder)
    for at in (0, -1):
        damaged = {name: tensor.clone() for name, tensor in tensors.items()}
        damaged["model.embed_tokens.weight"].view(-1)[at] = value
        save_file(damaged, folder / "model.safetensors", metadata={"format": "pt"})
        for wanted in (None, torch.float32):
            with pytest.raises(CheckpointError, match=r"embed_tokens\.weight holds 1 NaN or Inf \(elements 0 to"):
                load(folder, wanted)


def test_a_number_too_large_for_the_dtype_that_was_asked_for(folders: SimpleNamespace, tmp_path: Path) -> None:
    tensors = load_file(folders.good / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e30
    (tmp_path / "config.json").write_bytes((folders.good / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load(tmp_path, torch.float32) and load(tmp_path, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds 1 number too large for float16"):
        load(tmp_path, torch.float16)


def test_fault_19_in_an_adapter(folders: SimpleNamespace, tmp_path: Path) -> None:
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{kind}.weight" for kind in "AB"]
    tensors = {names[0]: torch.randn(2, 64), names[1]: torch.zeros(64, 2)}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"],
                    "base_model_name_or_path": str(folders.good)})
    )  # fmt: skip
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert load(tmp_path)
    tensors[names[0]][1, 1] = math.inf
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.weight holds NaN or Inf"):
        load(tmp_path)


def test_scores_that_are_no_numbers_are_not_printed(
    folders: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite weights that overflow: `eval --text` printed nan with status 0."""
    tensors = load_file(folders.good / "model.safetensors")
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight", "v_proj.weight", "up_proj.weight")):
            tensors[name] *= 1e30
    for file in folders.good.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for json_flag in ([], ["--json"]):
        with pytest.raises(SystemExit) as stopped:
            main(["eval", str(tmp_path), "--text", str(folders.root / "text.jsonl"), *json_flag])
        captured = capsys.readouterr()
        assert stopped.value.code == 1 and captured.out == "" and "computes NaN or Inf" in captured.err


def test_a_graft_that_predicts_no_numbers_is_not_written(
    folders: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite weights that overflow when they are multiplied: nothing is visible, nothing stays, an old output does."""
    shutil.copytree(folders.good, tmp_path / "chat")
    place = tmp_path / "chat" / "model.safetensors"
    tensors = load_file(place)
    for name in tensors:
        if "mlp" in name:
            tensors[name] = tensors[name] * 1e30
    save_file(tensors, place, metadata={"format": "pt"})
    shutil.copytree(folders.good, tmp_path / "old")
    before = (tmp_path / "old" / "model.safetensors").read_bytes()
    models = ["--base", str(folders.good), "--chat", str(tmp_path / "chat"), "--onto", str(folders.good)]
    for out, more in (("new", []), ("old", ["--overwrite"])):
        with pytest.raises(SystemExit) as end:
            main(["graft", *models, "--out", str(tmp_path / out), *more])
        error = capsys.readouterr().err
        assert end.value.code == 1 and error.count("lapis: ") == 1 and "would be no numbers" in error, error
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat", "old"]
    main(["graft", *models, "--out", str(tmp_path / "new"), "--no-smoke"])
    assert (tmp_path / "new" / "model.safetensors").is_file()
