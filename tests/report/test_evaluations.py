"""The table of evaluation kinds agrees with what the scores really hold."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lapis.evaluation.chats import score_chats
from lapis.evaluation.choices import Choice, score_choices
from lapis.evaluation.classification import figures
from lapis.evaluation.preference import score_pairs
from lapis.evaluation.text import score_text
from lapis.families.config import ModelConfig
from lapis.model.transformer import Transformer
from lapis.report.evaluations import KINDS, scores
from lapis.text.corpus.pairs import Pair
from lapis.text.tokenizer.tokenizer import train_tokenizer

CHAT = [{"role": "user", "content": "Who sleeps?"}, {"role": "assistant", "content": "The cat."}]


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    """What `lapis eval --json` prints, from a real model."""
    tokenizer = train_tokenizer(["The cat sleeps. Who eats?"], 300)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=24, vocab=tokenizer.rows, context=64,
                                    tied=True)).eval()  # fmt: skip
    pair = Pair(CHAT[:1], CHAT[1], {"role": "assistant", "content": "No."}, Path("pairs.jsonl"), 1)
    return {
        "model": "somewhere",
        "text": score_text(model, tokenizer, ["The cat sleeps."]),
        "chats": score_chats(model, tokenizer, [CHAT], max_tokens=2),
        "choices": score_choices(model, tokenizer, [Choice("The cat", (" sleeps", " eats"), 0)]),
        "classes": {**figures([0, 1, 1], [0, 1, 0], ["ham", "spam"]), "loss": 0.3},
        "pairs": score_pairs(model, tokenizer, [pair]),
        "tasks": {"arc_easy": {"acc": 0.5, "acc_stderr": 0.1, "bleu": 3.0}},
    }


def test_the_table_has_the_keys_of_the_scores(result: dict[str, dict[str, object]]) -> None:
    for key, kind in KINDS.items():
        if key != "tasks":
            plain = {name for name, value in result[key].items() if not isinstance(value, (list, dict))}
            assert plain == {metric.key for metric in kind.metrics}, key


def test_scores_are_read_in_order_with_labels_and_directions(result: dict[str, object]) -> None:
    outcome = list(scores(result))
    assert [score.subject for score in outcome if score.subject in KINDS] == sorted(
        (score.subject for score in outcome if score.subject in KINDS), key=list(KINDS).index
    )
    by_key = {(score.subject, score.metric.key): score for score in outcome}
    assert by_key["text", "bits_per_byte"].metric.better == "lower"
    assert by_key["classes", "f1_macro"].metric.label == "F1, mean over classes"
    assert by_key["arc_easy", "acc"].metric.better == "higher" and by_key["arc_easy", "acc"].kind is KINDS["tasks"]
    assert by_key["arc_easy", "bleu"].metric.label == "bleu" and by_key["arc_easy", "bleu"].metric.better == "neither"
    assert not any(score.metric.key in ("confusion", "by_class", "classes") for score in outcome)


def test_the_file_of_a_classifier_is_read_as_classes() -> None:
    outcome = {score.metric.key: score.value for score in scores(figures([0, 1], [0, 0], ["ham", "spam"]))}
    assert outcome["accuracy"] == 0.5 and np.isclose(float(outcome["f1_macro"] or 0), 1 / 3)
