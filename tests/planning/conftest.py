"""A tiny base and its chat version, tuned here in a second, so that replies really are likelier with the difference."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lapis.checkpoint.commit import commit
from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.chat.chat import encode_chat
from lapis.text.tokenizer.tokenizer import train_tokenizer

PAIRS = [("red", "blue"), ("one", "two"), ("cat", "dog"), ("sun", "moon"), ("tea", "milk"), ("up", "down")]


def write(model, tokenizer, folder: Path) -> Path:
    with commit(folder) as staging:
        save(model, staging.path)
        tokenizer.save(staging.path)
    return folder


def talk(ask: str, say: str) -> dict:
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]}


def learn(model, tokenizer, chats, steps: int, only=lambda name: True) -> None:
    rows = [encode_chat(tokenizer, chat["messages"]) for chat in chats]
    chosen = [p for name, p in model.named_parameters() if only(name)]
    optimizer = torch.optim.Adam(chosen, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for ids, learned in rows:
            logits = model(torch.tensor([ids[:-1]]))[0]
            keep = torch.tensor(learned[1:])
            loss = loss + torch.nn.functional.cross_entropy(logits[keep], torch.tensor(ids[1:])[keep])
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> SimpleNamespace:
    """base, chat, onto: folders (onto = base and a little noise). planted: only layer 1's MLP was tuned. Files."""
    root = tmp_path_factory.mktemp("plan")
    texts = [f"the {a} is not the {b}. a {b} goes with a {a}." for a, b in PAIRS]
    tokenizer = train_tokenizer([" ".join(texts) * 4], 300)
    torch.manual_seed(0)
    config = ModelConfig(
        dim=24, layers=3, heads=2, kv_heads=1, ffn_dim=32, vocab=tokenizer.rows, context=64, tied=True, bias="qkv",
        family="qwen2",
    )  # fmt: skip
    base = Transformer(config)
    chats = [talk(a, f"not {b}") for a, b in PAIRS]
    made = {"base": base}
    for name, only in (
        ("chat", lambda name: True),
        ("planted", lambda name: name.startswith("blocks.1.mlp")),
    ):
        made[name] = Transformer(config)
        made[name].load_state_dict(base.state_dict())
        learn(made[name], tokenizer, chats, 12, only)
    made["onto"] = Transformer(config)
    made["onto"].load_state_dict(base.state_dict())
    with torch.no_grad():
        for parameter in made["onto"].parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    folders = {name: write(model.eval(), tokenizer, root / name) for name, model in made.items()}
    talks, text, choices = root / "chats.jsonl", root / "text.jsonl", root / "choices.jsonl"
    talks.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    question = {"prompt": "the red is not", "choices": [" the blue", " the red"], "answer": 0}
    choices.write_text(json.dumps(question) + "\n")
    return SimpleNamespace(
        **folders, tokenizer=tokenizer, chats=talks, text=text, choices=choices, texts=texts, write=write,
        records=[chat["messages"] for chat in chats], root=root,
    )  # fmt: skip
