"""What a plan says to do where tokens are missing is a command that works."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import lapis
from lapis.cli.main import main
from lapis.errors import CheckpointError
from lapis.model.load import load, save


def renamed(source: Path, out: Path, names: dict[str, str]) -> Path:
    """A copy of a folder, with tokens of other names in its tokenizer and its template."""
    shutil.copytree(source, out)
    (out / "lapis-manifest.json").unlink(missing_ok=True)
    for file in out.glob("*"):
        if file.name.startswith(("tokenizer", "special", "chat_template")):
            text = file.read_text(encoding="utf-8")
            for old, new in names.items():
                text = text.replace(old, new)
            file.write_text(text, encoding="utf-8")
    return out


def follow(message: str, out: Path) -> None:
    """Runs the command that a message names."""
    words = shlex.split(re.search(r"lapis (graft .*? --out NEW)", message)[1].replace("NEW", str(out)))  # type: ignore[index]
    with pytest.raises(SystemExit) as stop:
        main(words)
        raise SystemExit(0)
    assert stop.value.code == 0


def test_a_model_without_the_templates_tokens_is_given_them(pair, tmp_path) -> None:
    onto = renamed(pair.onto, tmp_path / "onto", {"<|im_start|>": "<|spare_1|>", "<|im_end|>": "<|spare_2|>"})
    options = {"chats": pair.chats, "text": pair.text, "replies": False, "draws": 1}
    with pytest.raises(CheckpointError, match=r"has no <\|im_start\|>, <\|im_end\|>, which chat's template") as caught:
        lapis.plan(pair.base, pair.chat, onto=onto, **options)
    assert "\n" not in str(caught.value)
    follow(str(caught.value), tmp_path / "new")
    plan = lapis.plan(pair.base, pair.chat, onto=tmp_path / "new", **options)
    assert "scaled" in plan.measured


def test_a_base_with_fewer_rows_is_given_those_of_chat(pair, tmp_path) -> None:
    chat = renamed(pair.chat, tmp_path / "chat", {})
    tokenizer = json.loads((chat / "tokenizer.json").read_text())
    rows = pair.tokenizer.rows
    for i, token in enumerate(("<|turn|>", "<|done|>")):
        like = next(entry for entry in tokenizer["added_tokens"] if entry["content"] == "<|im_end|>")
        tokenizer["added_tokens"].append({**like, "id": rows + i, "content": token})
    (chat / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"<|im_start|>": "<|turn|>", "<|im_end|>": "<|done|>"}
    for file in (chat / "tokenizer_config.json", chat / "chat_template.jinja"):
        if file.exists():
            text = file.read_text()
            for old, new in names.items():
                text = text.replace(old, new)
            file.write_text(text)
    model = load(pair.chat)
    state = dict(model.named_parameters())
    ids = [pair.tokenizer.id(token) for token in names]
    state["embed.weight"] = torch.cat([state["embed.weight"].detach(), state["embed.weight"].detach()[ids]])
    config = json.loads((chat / "config.json").read_text())
    save(model, chat, state=state)
    (chat / "config.json").write_text(json.dumps({**config, "vocab_size": rows + 2}))
    options = {"chats": pair.chats, "text": pair.text, "replies": False, "draws": 1}
    with pytest.raises(CheckpointError, match=f"has {rows} rows of tokens and .* {rows + 2}") as caught:
        lapis.plan(pair.base, chat, **options)
    follow(str(caught.value), tmp_path / "new")
    assert lapis.plan(tmp_path / "new", chat, **options).tune
