"""Text of two languages, small models, and the settings of a tiny adaptation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.families.config import ModelConfig, Rope
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer

SUBJECTS = ["dog", "cat", "child", "teacher", "river", "village", "garden", "house"]
ENGLISH = [
    f"The old {a} stands by the {b}, and the {c} plays in it." for a in SUBJECTS for b in SUBJECTS for c in SUBJECTS
]
MALAY = [
    f"{a.capitalize()} itu bermain dengan {b} di dalam {c} setiap hari."
    for a in ("anjing", "kucing", "kanak-kanak", "cikgu", "jiran", "adik")
    for b in ("bola", "kucing", "kawan", "batu", "air", "pasir")
    for c in ("taman", "rumah", "kampung", "sekolah", "sungai", "pasar")
]
TINY = {"precision": "float32", "threads": 1, "sample_every": 0, "log_every": 2}
STEP = 4 * 32  # tokens of a step


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def make(folder: Path, seed: int, like: Path | None = None, tied: bool = True) -> Path:
    """A small model; with `like`, a fine-tune of that one."""
    tokenizer = train_tokenizer(ENGLISH[:60], 300)
    torch.manual_seed(seed)
    config = ModelConfig(
        family="llama", dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=48, vocab=tokenizer.rows,
        context=64, tied=tied, rope=Rope(theta=1e4),
    )  # fmt: skip
    model = Transformer(config) if like is None else load(like, torch.float32)
    if like is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.001 * torch.randn_like(parameter)
    folder.mkdir()
    save(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """plan(**changes) -> the settings of a tiny adaptation, all of whose inputs are there."""
    base = make(tmp_path / "base", 0)
    chat = make(tmp_path / "chat", 1, base)
    chats = tmp_path / "chats.jsonl"
    turn = {"messages": [{"role": "user", "content": "Apa itu?"}, {"role": "assistant", "content": "Kucing itu."}]}
    chats.write_text((json.dumps(turn) + "\n") * 3)
    settings = {
        "base": str(base), "chat": str(chat), "text": [str(write(tmp_path / "ms.jsonl", MALAY))],
        "replay": [str(write(tmp_path / "en.jsonl", ENGLISH[:300]))], "chats": [str(chats)], "vocab": 40,
        "out": str(tmp_path / "out"), "train": TINY, "context": 32, "batch": 4, "tokens": 12 * STEP, "embedded": 0.5,
        "scored": 1500, "language": "ms",
    }  # fmt: skip
    return lambda **changes: {**settings, **changes}
