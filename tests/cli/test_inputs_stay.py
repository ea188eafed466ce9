"""What a command reads it does not write over, whatever --overwrite says: text, chats and questions stay."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer

TEXTS = [f"Kucing {a} bermain dengan {b} di taman itu." for a in range(15) for b in range(15)]
CHAT = {"messages": [{"role": "user", "content": "Apa itu?"}, {"role": "assistant", "content": "Kucing itu."}]}
COMMANDS = {
    "train": "tokenizer train {text} --vocab 300 --out {text}",
    "extend": "tokenizer extend {model} {text} --add 5 --out {text}",
    "extend around": "tokenizer extend {model} {text}/a.jsonl --add 5 --out {text}",
    "extend replay": "tokenizer extend {model} {text} --replay {other} --add 5 --out {other}",
    "extend glob": "tokenizer extend {model} {text}/*.jsonl --add 5 --out {text}",
    "fertility": "fertility {model} {text} --no-run --html {text}/a.jsonl",
    "fertility replay": "fertility {model} {text} --replay {other} --no-run --html {other}/a.jsonl",
    "card": "card {model} --text {text} --out {text}",
    "card chats": "card {model} --text {text} --chats {chats} --out {talks}",
    "card tuned": "card {model} --text {text} --tuned {other} --out {other}",
    "pack": "data pack {text} --tokenizer {model} --out {text}",
    "run": "train {settings} data={text} out={text}",
    "run valid": "train {settings} data={text} valid={other} out={other}",
    "run parts": "train {settings} 'data={{{text}/a.jsonl: 1}}' out={text}",
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_text_is_not_written_over(name: str, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    places = {key: tmp_path / key for key in ("model", "text", "other", "talks")}
    for key in ("text", "other", "talks"):
        places[key].mkdir()
        lines = [CHAT] * 3 if key == "talks" else [{"text": f"{key} {text}"} for text in TEXTS]
        (places[key] / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    tokenizer = train_tokenizer(TEXTS, 290)
    torch.manual_seed(0)
    shape = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn_dim": 16, "context": 64}
    save(Transformer(ModelConfig(family="llama", vocab=tokenizer.rows, **shape)), places["model"])
    tokenizer.save(places["model"])
    settings = tmp_path / "train.yaml"
    settings.write_text(f"objective: causal\nmodel: {places['model']}\nsteps: 1\ncontext: 16\nthreads: 1\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    command = COMMANDS[name].format(**places, chats=places["talks"] / "a.jsonl", settings=settings)
    status, output, error = run(*shlex.split(command), "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == before
    assert status == 1 and output == "" and error.count("\n") == 1
    assert any(why in error for why in (": is read; give", "which is read, lies there; give", ": is the input"))
