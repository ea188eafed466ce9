"""Scores against a plain computation, one sequence and one token at a time."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from lapis.errors import DataError
from lapis.evaluation.chats import answer, score_chats
from lapis.evaluation.choices import Choice, read_choices, score_choices
from lapis.evaluation.text import score_text, windows_of
from lapis.families.config import ModelConfig
from lapis.model.scoring import ScoredSequence, nll
from lapis.model.transformer import Transformer
from lapis.text.chat.chat import encode_chat
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["The cat sleeps under the tree.", "Anak itu makan nasi. " * 6, "Ñ 고양이 кіт", "A b c d e f g."]
CHATS = [
    [{"role": "user", "content": "Who sleeps?"}, {"role": "assistant", "content": "The cat."}],
    [
        {"role": "user", "content": "Who eats?"},
        {"role": "assistant", "content": "The child."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "Rice, of course."},
    ],
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab=tokenizer.rows, context=64, tied=True)
    model = Transformer(config).eval()
    with torch.no_grad():
        model.embed.weight.mul_(20)  # so that tokens differ in likelihood
    return model


def plain_nats(model: Transformer, ids: list[int], scored: list[int]) -> float:
    """Nats at the places of `scored`, by whole logits in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    return -sum(float(logits[place - 1, ids[place]]) for place in scored)


def test_nll_equals_one_at_a_time(model: Transformer) -> None:
    torch.manual_seed(1)
    sequences = []
    for length in (2, 3, 9, 17, 17, 30, 5):
        ids = torch.randint(0, model.config.vocab, (length,)).tolist()
        sequences.append(ScoredSequence(ids, (torch.rand(length) < 0.6).tolist()))
    for batch_tokens in (1, 40, 8192):
        got = nll(model, sequences, batch_tokens=batch_tokens)
        want = [
            plain_nats(model, [*s.ids], [i for i, learned in enumerate(s.scored) if learned and i]) for s in sequences
        ]
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("length, context", [(2, 8), (9, 8), (10, 8), (33, 8), (50, 7), (5, 1), (1, 4)])
def test_windows_score_each_id_once_with_at_least_half_a_context(length: int, context: int) -> None:
    ids = list(range(100, 100 + length))
    seen = []
    for window in windows_of(ids, context):
        assert len(window.ids) <= context + 1
        scored = [place for place, learned in enumerate(window.scored) if learned]
        seen += [window.ids[place] for place in scored]
        assert window.ids[0] == 100 or scored[0] >= max(1, context // 2)
    assert seen == ids[1:]


def test_bits_per_byte_is_exact_for_short_documents(model: Transformer, tokenizer: Tokenizer) -> None:
    nats, size = 0.0, 0
    for text in (TEXTS[0], TEXTS[2]):
        ids = [tokenizer.eos_id or 0, *tokenizer.encode(text)]
        nats += plain_nats(model, ids, list(range(1, len(ids))))
        size += len(text.encode())
    assert score_text(model, tokenizer, [TEXTS[0], TEXTS[2]])["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / size, rel=1e-5
    )


def test_bits_per_byte_counts_bytes_and_not_characters(model: Transformer, tokenizer: Tokenizer) -> None:
    result = score_text(model, tokenizer, ["고양이"])
    assert result["bytes"] == 9 and result["tokens"] == len(tokenizer.encode("고양이"))


def test_a_long_document_is_scored_once(model: Transformer, tokenizer: Tokenizer) -> None:
    result = score_text(model, tokenizer, [TEXTS[1] * 20], context=16)
    assert result["tokens"] == len(tokenizer.encode(TEXTS[1] * 20))


def test_no_text_is_an_error(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no text"):
        score_text(model, tokenizer, ["", ""])


def test_response_nll_is_over_the_assistants_tokens(model: Transformer, tokenizer: Tokenizer) -> None:
    nats, tokens = 0.0, 0
    for chat in CHATS:
        ids, learned = encode_chat(tokenizer, chat)
        if len(ids) > 65:
            ids, learned = ids[:65], learned[:65]
        places = [i for i, own in enumerate(learned) if own]
        nats += plain_nats(model, ids, places)
        tokens += len(places)
    result = score_chats(model, tokenizer, CHATS, max_tokens=4)
    assert result["response_nll"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result["tokens"] == tokens and result["chats"] == 2


def test_stop_rate_is_the_share_of_replies_that_end(tokenizer: Tokenizer, model: Transformer) -> None:
    replies = answer(model, tokenizer, CHATS, max_tokens=3)
    ends = [r is not None and r.stop_reason == "end" for r in replies]
    result = score_chats(model, tokenizer, CHATS, max_tokens=3)
    assert result["stop_rate"] == sum(ends) / 2
    assert score_chats(model, tokenizer, CHATS, replies=replies)["stop_rate"] == result["stop_rate"]


def test_choices_take_the_likeliest(model: Transformer, tokenizer: Tokenizer) -> None:
    choices = ("tree.", "cat sleeps under the", "nasi")
    costs = []
    for text in choices:
        ids = tokenizer.encode("The " + text)
        costs.append(plain_nats(model, ids, list(range(len(tokenizer.encode("The ")), len(ids)))))
    best = costs.index(min(costs))
    result = score_choices(model, tokenizer, [Choice("The ", choices, best), Choice("The ", choices, (best + 1) % 3)])
    assert result["accuracy"] == 0.5 and result["n"] == 2


def test_questions_come_in_all_kinds_of_records(tmp_path: Path) -> None:
    """Belebele and INCLUDE are parquet on the hub."""
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    records = [{"prompt": "a", "choices": ["x", "y"], "answer": n} for n in (0, 1)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "c.jsonl").write_text(lines)
    (tmp_path / "d.json").write_text(json.dumps(records))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "f.parquet")
    expected = [Choice("a", ("x", "y"), n) for n in (0, 1)]
    for path in tmp_path.iterdir():
        assert read_choices(path) == expected
    (tmp_path / "g.csv").write_text("prompt\n")
    with pytest.raises(DataError, match=r'files that end in "\.csv" are not read; questions are read from \.jsonl, '):
        read_choices(tmp_path / "g.csv")


@pytest.mark.parametrize("record, message", [
    ({"prompt": "a", "choices": ["x"], "answer": 0}, "two or more"),
    ({"prompt": "a", "choices": ["x", "y"], "answer": 2}, "from 0 to 1"),
    ({"choices": ["x", "y"], "answer": 0}, "one of prompt"),
    ({"prompt": 3, "choices": ["x", "y"], "answer": 0}, "prompt is empty or of a wrong type"),
])  # fmt: skip
def test_a_wrong_record_names_line_and_field(tmp_path: Path, record: dict[str, object], message: str) -> None:
    good = json.dumps({"prompt": "a", "choices": ["x", "y"], "answer": 1})
    (tmp_path / "c.jsonl").write_text(good + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        read_choices(tmp_path / "c.jsonl")
