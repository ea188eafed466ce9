"""Replay that a chat model draws itself is read as its chats are: one BOS, and the template's tokens as tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.checkpoint import open_checkpoint
from lapis.language.adapt import adapt
from lapis.language.replay import draw_texts
from lapis.language.rows import calibrate as calibrating
from lapis.language.rows.calibrate import calibrate
from lapis.text.chat.chat import encode_chat
from lapis.text.rows.data_sources import PackingSettings, open_data
from lapis.text.rows.packing import pack
from lapis.text.tokenizer.extend import ExtendableTokenizer, changed_share
from lapis.text.tokenizer.tokenizer import Tokenizer

from .conftest import ENGLISH, MALAY, STEP, make, write
from .test_document_lead import begin

BOS = "<|endoftext|>"
TURNS = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(params=[True, False], ids=["adds", "names"])
def chat(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A chat model whose template writes its BOS token, which its tokenizer adds to every text, or else does not."""
    folder = make(tmp_path / "chat", 0)
    begin(folder, bos=BOS, eos="<|im_end|>" if request.param else BOS, adds=request.param)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    turn = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TURNS + turn}))
    return folder


def test_text_that_a_chat_model_draws_has_one_bos(chat: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(chat)
    drawn = draw_texts(chat, 200, 0)
    file = write(tmp_path / "replay.jsonl", [each.text for each in drawn])
    packed = open_data({"path": str(file), "special": "trusted"}, PackingSettings(tokenizer, "documents", 64))
    ids, *_ = packed.arrays([0])
    first = ids.ravel().tolist()
    assert tokenizer.document_lead == tokenizer.id(BOS)
    assert first[:2] == [tokenizer.id(BOS), tokenizer.id("<|im_start|>")] and tokenizer.id("<|im_end|>") in first


def test_trusted_text_is_not_given_its_bos_twice(chat: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(chat)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    whole, _ = encode_chat(tokenizer, talk)
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    for number, text in enumerate((BOS + turns, turns)):
        file = write(tmp_path / f"{number}.jsonl", [text, text])
        rows = pack(file, tokenizer, length=2 * len(whole), special="trusted")
        assert rows.arrays([0])[0].ravel().tolist()[: 2 * len(whole)] == 2 * whole
        assert rows.counts["documents"] == 2 and rows.counts["tokens"] == 2 * len(whole)
    plain = pack(file.with_name("0.jsonl"), tokenizer, length=64)
    assert plain.arrays([0])[0].ravel().tolist()[:1] == [tokenizer.id(BOS)] and plain.counts["tokens"] > 4 * len(whole)
    alone = pack(write(tmp_path / "alone.jsonl", [BOS, turns]), tokenizer, length=64, special="trusted")
    assert alone.counts["documents"] == 1 and alone.counts["empty"] == 1


@pytest.mark.parametrize("trusted", [True, False])
def test_calibrating_reads_drawn_replay_as_training_does(
    trusted: bool, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = ExtendableTokenizer.open(chat), Tokenizer.open(chat)
    gained = base.learn(base.count_words(MALAY), 20)
    turns = [f"<|im_start|>user\n{text}<|im_end|>\n" for text in ENGLISH[:40]]
    replay = [turn if number % 2 else BOS + turn for number, turn in enumerate(turns)]
    own, read = calibrating._read, []

    def watched(model: object, rows: list[list[int]], *rest: object) -> object:
        read.append(rows)
        return own(model, rows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(calibrating, "_read", watched)
    rows = torch.zeros(20, 32)
    calibrate(open_checkpoint(chat), base, gained, MALAY, rows, rows, tied=True, replay=replay, trusted=trusted)
    start, lead = tokenizer.id("<|im_start|>"), tokenizer.document_lead
    for known in (read[1], read[3]):
        assert all(ids[0] == lead for ids in known)
        assert all((ids[1] == start) is trusted and ids.count(lead) == 1 for ids in known)
    assert all(start not in ids for ids in read[0])  # text of the language is plain


@pytest.mark.parametrize("own", [True, False])
def test_an_adaptation_trusts_replay_that_it_drew(
    own: bool, plan: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, seen = calibrating._rows, []

    def watched(*args: Any) -> Any:
        seen.append(args[5:])
        return rows(*args)

    monkeypatch.setattr(calibrating, "_rows", watched)
    replay = {"replay": ["self"]} if own else {}
    adapt(plan(onto="chat", vocab=20, card=False, tokens=4 * STEP, **replay))
    assert seen == [(), (own,)] * 2  # where rows begin, and after the training


def test_drawn_replay_has_no_tags_that_tokens_change(tmp_path: Path) -> None:
    folder = make(tmp_path / "base", 0)
    base = ExtendableTokenizer.open(folder)
    gained = base.learn(base.count_words(["start startet starten im start"] * 50), 8)
    texts = ["<|im_start|>start<|im_end|>"]
    assert changed_share(base.backend, base.extended(gained), texts) > 0.3
    changed = changed_share(base.backend, base.extended(gained), texts, special=True)
    assert changed == pytest.approx(len("start") / len(texts[0]))
    assert base.backend.encode("<|im_start|>").ids != [1], "text is plain text again"
