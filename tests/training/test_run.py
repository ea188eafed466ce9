"""`lapis train` and `lapis eval` from files to JSON, and what wrong settings get."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.errors import ConfigError
from lapis.model.load import load, save
from lapis.text.corpus.corpus import ChatRecord, Document
from lapis.text.rows.packing import pack
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.run import read_settings, run
from lapis.training.setup.start import preset_shape, start_model

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
def lapis(data_folder: Path, chats: list[ChatRecord], monkeypatch: pytest.MonkeyPatch, run: Lapis) -> Lapis:
    """Runs a command in a folder with texts, chats, a tokenizer and two settings files: (status, stdout, stderr)."""
    monkeypatch.chdir(data_folder)
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": c.messages}) + "\n" for c in chats))
    question = {"prompt": "The cat sat on the", "choices": [" mat", " zebra"], "answer": 0}
    Path("choices.jsonl").write_text(json.dumps(question) + "\n")
    Path("base.yaml").write_text(BASE)
    Path("chat.yaml").write_text(CHAT)

    return run


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
    result = json.loads(out)
    assert status == 0
    assert result["text"]["bits_per_byte"] > 0 and result["text"]["documents"] == 6
    assert {"response_nll", "stop_rate", "tokens"} <= set(result["chats"]) and result["chats"]["chats"] == 6
    assert result["choices"] == {"accuracy": 1.0, "accuracy_per_byte": 1.0, "n": 1, "chance": 0.5}


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
    (["train", "base.yaml", "--allow-change", "seed"], "--allow-change seed: it is settled when a run begins"),
    (["train", "base.yaml", "--allow-change", "lr", "--allow-change", "stepz"], 'did you mean "steps"?'),
    (["train", "base.yaml", "--allow-change", "sed"], 'did you mean "seed"?'),
    (["train", "base.yaml", "--fresh", "--allow-change", "lr"], "--allow-change lr has no effect; leave one out"),
    (["train", "base.yaml", "eval_every=5"], "eval_every is 5, and nothing is held out; give valid, or leave"),
    (["train", "base.yaml", "watch_metric=loss"], "watch_metric is 'loss', and nothing looks at it; give early"),
    (["train", "base.yaml", "decay=0.2"], "decay is 0.2, and schedule is linear; give schedule: wsd, or leave decay"),
    (["train", "base.yaml", "guards=stop"], "guards is 'stop'; expected a mapping with nan, spike, "),
    (["train", "base.yaml", "track=tensorbord"], "track is 'tensorbord'; did you mean \"tensorboard\"?"),
    (["train", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
    (["eval", "tok"], "give --text, --chats, --choices, --classes"),
    (["eval", "tok", "--choices", "texts.jsonl"], "texts.jsonl line 1: expected one of prompt"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(lapis: Lapis, arguments: list[str], said: str) -> None:
    status, out, err = lapis(*arguments)
    assert status == 1 and out == ""
    assert said in err and len(err.strip().splitlines()) == 1
    assert not Path("base").exists() and not Path(".base.lapis").exists()


@pytest.mark.parametrize("new", ["gpt2", {"family": "gpt2"}, {"family": "gpt2", "layers": 2}])
def test_a_presets_name_makes_that_model(new: Any, tokenizer: Tokenizer, documents: list[Document]) -> None:
    objective = Causal(tokenizer, documents, context=32)
    with torch.device("meta"):
        model = start_model(None, new, objective, context=32, seed=0, zero_init=False)
    shape = model.config
    layers = 12 if isinstance(new, str) else new.get("layers", 12)
    assert (shape.family, shape.dim, shape.layers, shape.heads, shape.ffn_dim) == ("gpt2", 768, layers, 12, 3072)
    assert (shape.positions, shape.tied, shape.vocab) == ("learned", True, tokenizer.rows)
    assert shape.context == 1024 and len(model.embed.position.weight) == 1024  # not the context of training


def test_a_table_of_positions_as_short_as_the_rows_is_told_of(tokenizer: Tokenizer, documents: list[Document]) -> None:
    sizes = {"family": "gpt2", "dim": 32, "layers": 1, "heads": 2, "ffn_dim": 32}
    objective = Causal(tokenizer, documents, context=32)
    short = start_model(None, sizes, objective, context=32, seed=0)
    assert short.config.context == 32
    assert short.notes == ["its table of positions has 32 rows, as many as context; new.context gives it more"]
    assert not start_model(None, {**sizes, "context": 64}, objective, context=32, seed=0).notes


@pytest.mark.parametrize("new, message", [
    ("gpt3", 'new is "gpt3"; did you mean "gpt2"?'),
    ({"family": "llama"}, r"give its sizes \(dim, layers, heads, ffn_dim\), or new: one of llama-2-7b"),
])  # fmt: skip
def test_a_preset_that_is_unknown_is_refused(new: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset_shape(new)


@pytest.mark.parametrize("more", [{}, {"lora": {"rank": 2}}])
def test_generation_settings_are_kept_and_end_ids_added(
    more: dict[str, Any], new_model: Callable[[], Any], tokenizer: Tokenizer, chats: list[ChatRecord], tmp_path: Path
) -> None:
    save(new_model(), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    sampling = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True, "repetition_penalty": 1.05,
            "pad_token_id": 0, "max_length": 200}  # fmt: skip
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({**sampling, "eos_token_id": 7}))
    settings = {"objective": "chat", "model": str(tmp_path / "base"), "data": chats, "context": 64, "steps": 1,
                "out": str(tmp_path / "out"), "threads": 1, "precision": "float32", "batch": 2, **more}  # fmt: skip
    run(read_settings(settings, "test"), watch=Silent())
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: written[name] for name in sampling} == sampling
    assert set(written["eos_token_id"]) == {7, *tokenizer.end_ids}
