"""`lapis train` and `lapis eval` from files to JSON, and what wrong settings get."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.cli.main import main
from lapis.model.load import load
from lapis.text.corpus.corpus import ChatRecord, Document
from lapis.text.rows.packing import pack
from lapis.text.tokenizer.tokenizer import Tokenizer

Lapis = Callable[..., tuple[int, str, str]]

BASE = """
objective: causal
new: {dim: 32, layers: 2, heads: 4, ffn_dim: 48, tied: true}
tokenizer: tok
data: texts.jsonl
context: 64
out: base
steps: 40
batch: 4
lr: 3e-3
threads: 1
precision: float32
sample_every: 0
"""
CHAT = "objective: chat\nmodel: base\ndata: chats.jsonl\ncontext: 64\nout: chat\nsteps: 10\nthreads: 1\nbatch: 4\n"


@pytest.fixture
def lapis(
    tokenizer: Tokenizer, documents: list[Document], chats: list[ChatRecord], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> Lapis:  # fmt: skip
    """Runs a command in a folder with texts, chats, a tokenizer and two settings files: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    Path("tok").mkdir()
    tokenizer.save("tok")
    Path("texts.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents))
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": c.messages}) + "\n" for c in chats))
    question = {"prompt": "The cat sat on the", "choices": [" mat", " zebra"], "answer": 0}
    Path("choices.jsonl").write_text(json.dumps(question) + "\n")
    Path("base.yaml").write_text(BASE)
    Path("chat.yaml").write_text(CHAT)

    def call(*arguments: str) -> tuple[int, str, str]:
        status: Any = 0
        try:
            main([*arguments])
        except SystemExit as end:
            status = end.code or 0
        out, err = capfd.readouterr()
        return int(status), out, err

    return call


def test_train_then_tune_then_score(lapis: Lapis) -> None:
    status, out, _ = lapis("train", "base.yaml", "--json")
    assert status == 0
    base = json.loads(out)
    assert base["out"] == "base" and base["steps"] == 40 and base["bits_per_byte"] < 5
    assert lapis("train", "chat.yaml", "steps=12", "lr=0.001")[0] == 0
    training = json.loads(Path("chat/training.json").read_text())
    assert training["config"]["steps"] == 12 and training["objective"] == "chat"
    assert json.loads(Path("chat/generation_config.json").read_text())["eos_token_id"]
    status, out, _ = lapis(
        "eval", "chat", "--text", "texts.jsonl", "--chats", "chats.jsonl", "--choices", "choices.jsonl",
        "--limit", "6", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert status == 0
    assert found["text"]["bits_per_byte"] > 0 and found["text"]["documents"] == 6
    assert {"response_nll", "stop_rate", "tokens"} <= set(found["chats"]) and found["chats"]["chats"] == 6
    assert found["choices"] == {"accuracy": 1.0, "accuracy_per_byte": 1.0, "n": 1, "chance": 0.5}


def test_a_new_language_model_has_the_recipe_and_loads_elsewhere(lapis: Lapis) -> None:
    from transformers import AutoModelForCausalLM

    assert lapis("train", "base.yaml", "steps=2")[0] == 0
    settings = json.loads(Path("base/training.json").read_text())["config"]
    assert settings["optimizer"] == "muon" and settings["schedule"] == "linear" and settings["lr"] == 3e-3
    ids = torch.tensor([[5, 6, 7, 8]])
    theirs = AutoModelForCausalLM.from_pretrained("base").eval()
    assert theirs.config.model_type == "qwen3"
    torch.testing.assert_close(load("base")(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert lapis("train", "base.yaml", "steps=2", "optimizer=adamw", "out=other")[0] == 0
    assert json.loads(Path("other/training.json").read_text())["config"]["schedule"] == "wsd"


def test_rows_that_are_packed_already(lapis: Lapis, tokenizer: Tokenizer) -> None:
    pack("texts.jsonl", tokenizer, "rows", 64)
    assert lapis("train", "base.yaml", "data=rows", "steps=2")[0] == 0
    status, _, said = lapis("train", "base.yaml", "data=rows", "context=32", "out=other")
    assert status == 1 and "context is 32; rows was packed with 64" in said


@pytest.mark.parametrize("arguments, said", [
    (["train", "base.yaml", "stepz=3"], 'unknown key "stepz"; did you mean "steps"?'),
    (["train", "base.yaml", "new.dimm=3"], 'unknown key "dimm"; did you mean "dim"?'),
    (["train", "base.yaml", "objective=casual"], 'objective is \'casual\'; did you mean "causal"?'),
    (["train", "base.yaml", "minutes=1"], "one of steps, epochs or minutes"),
    (["train", "base.yaml", "new=null"], "give one of model (a folder) and new"),
    (["train", "base.yaml", "tokenizer=null"], "a new model needs tokenizer"),
    (["train", "base.yaml", "data=nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
    (["train", "base.yaml", "data=chats.jsonl"], "this objective learns from documents"),
    (["train", "base.yaml", "out=tok"], "tok: is the input tok"),
    (["train", "base.yaml", "new.context=32"], "context is 64; the model has 32"),
    (["train", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
    (["eval", "tok"], "give --text, --chats, --choices, --classes"),
    (["eval", "tok", "--choices", "texts.jsonl"], "texts.jsonl line 1: expected one of prompt"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(lapis: Lapis, arguments: list[str], said: str) -> None:
    status, out, err = lapis(*arguments)
    assert status == 1 and out == ""
    assert said in err and len(err.strip().splitlines()) == 1
    assert not Path("base").exists() and not Path(".base.lapis").exists()
