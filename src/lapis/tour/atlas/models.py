"""The book's models: base, chat, adapted and tuned, tiny, trained once in a minute and then read from a cache.

    base      text in English, with a little Malay
    chat      base, tuned on English chats
    adapted   base, continued on Malay
    tuned     adapted, tuned on the same chats

One thread, float32 and a seed: the same models every time on one machine, and nearly the same on another. Leaves out:
what they read (countries.py).
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lapis.families.config import ModelConfig
from lapis.generation.generate import generate_batch
from lapis.generation.options import Sampling
from lapis.model.load import load
from lapis.model.threads import threads
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import TURN_END, TURN_START, Tokenizer, train_tokenizer
from lapis.tour.atlas.countries import AtlasQuestion, chats, texts
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.objective import Objective
from lapis.training.objectives.supervised.next_token import Causal, Chat
from lapis.training.setup.select import select_parts

NAMES = ("base", "chat", "adapted", "tuned")
CONTEXT = 96
VOCABULARY = 640
QUICK: dict[str, Any] = {
    "batch": 8, "optimizer": "muon", "precision": "float32", "threads": 1, "compile": "off", "sample_every": 0,
}  # fmt: skip
"""How small models are trained here: settings of TrainConfig that measure nothing first and give the same each time."""


def models() -> dict[str, Path]:
    """The folders of the four models by name, made first where they are not there.

    They lie in LAPIS_CACHE, by default ~/.cache/lapis, under a name that changes with this code.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in ("countries.py", "models.py")))
    cache = Path(os.environ.get("LAPIS_CACHE") or Path.home() / ".cache" / "lapis")
    folder = cache / f"atlas-{digest.hexdigest()[:12]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=".atlas-", dir=cache))
        try:
            make_models(making)
            making.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same models
                raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return {name: folder / name for name in NAMES}


def make_models(folder: Path) -> None:
    """Trains the four models into a folder."""
    english, malay = texts("en", 4000, seed=1), texts("ms", 1500, seed=1)
    tokenizer = train_tokenizer([*english, *malay], VOCABULARY)
    talks = chats("en", 1000, seed=1)
    with threads(1):
        torch.manual_seed(0)
        model = new_model(tokenizer)
        _run(model, _read(tokenizer, english + malay[:200], folder), folder / "base", 300, 1e-2)
        _run(load(folder / "base"), _read(tokenizer, malay + english[:300], folder), folder / "adapted", 100, 2e-3)
        for name, start in (("chat", "base"), ("tuned", "adapted")):
            _run(_without_words(load(folder / start), tokenizer), _chat(tokenizer, talks, folder), folder / name, 40)


def new_model(tokenizer: Tokenizer) -> Transformer:
    """The shape of all four, with random weights."""
    return Transformer(
        ModelConfig(dim=64, layers=4, heads=4, ffn_dim=128, vocab=tokenizer.vocab_size, context=CONTEXT, tied=True)
    )


def _read(tokenizer: Tokenizer, documents: list[str], folder: Path) -> Objective:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return Causal(tokenizer, [path], context=CONTEXT)


def _chat(tokenizer: Tokenizer, records: list[dict[str, object]], folder: Path) -> Objective:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return Chat(tokenizer, [path], context=CONTEXT)


def _without_words(model: Transformer, tokenizer: Tokenizer) -> Transformer:
    """The model, whose embedding is not trained but for the rows of the chat template's tokens, as in the tour."""
    select_parts(model, freeze=["embed"], tokens=[TURN_START, TURN_END], tokenizer=tokenizer)
    return model


def _run(model: Transformer, objective: Objective, out: Path, steps: int, lr: float | None = None) -> None:
    """A rate of its own is Muon's; chats are learned gently, but for the two rows."""
    gentle = {"optimizer": "adamw", "lr": 1e-3, "rates": {"embed": 1e-2}}
    config = TrainConfig(**{**QUICK, "steps": steps, **({"lr": lr} if lr else gentle)})
    train(model, objective, config, out, watch=Silent())


def share_right(model: Transformer, tokenizer: Tokenizer, questions: Sequence[AtlasQuestion]) -> float:
    """The share of questions that a model answers exactly right, each as the first message of a chat."""
    replies = generate_batch(model, tokenizer, [one.messages for one in questions], Sampling(max_tokens=16))
    return sum(one.is_right(reply.text) for one, reply in zip(questions, replies, strict=True)) / len(questions)
