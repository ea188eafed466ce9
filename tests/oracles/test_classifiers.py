"""Classifiers and masked words against transformers and scikit-learn: loss, logits, masks and figures."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.evaluation.classification import figures, predict
from lapis.model.load import save
from lapis.text.corpus.corpus import Document
from lapis.text.corpus.labels import Labeled
from lapis.text.rows.rows import IGNORE
from lapis.text.rows.sequences import encode_framed
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.objectives.supervised.classify import Classify
from lapis.training.objectives.supervised.masked import Masked
from lapis.training.setup.start import start_model

transformers = pytest.importorskip("transformers")
TEXTS = [f"Tree {i} has {i * 3 % 7} birds" + " and a nest" * (i % 4) for i in range(60)]
BERT = {"family": "bert", "dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48}
SHAPES = {
    "bert": BERT,
    "xlm-roberta": {"family": "xlm-roberta", "dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48},
    "distilbert": {"family": "distilbert", "dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48},
    "modernbert": {"family": "modernbert", "dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48, "window": 3,
                   "pooling": "mean"},
    "gpt2": {"family": "gpt2", "dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48},
    "llama": {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48},
    "qwen3": {"family": "qwen3", "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers() -> Callable[[str], Tokenizer]:
    made = {kind: train_tokenizer(TEXTS, 300, kind) for kind in ("chat", "masked")}  # type: ignore[arg-type]
    return lambda kind: made[kind]


def examples() -> list[Labeled]:
    return [Labeled(text, ["many", "none", "some"][i % 3], Path("t.tsv"), i + 2) for i, text in enumerate(TEXTS)]


def masked(tokenizer: Tokenizer, **options: Any) -> Masked:
    documents = [Document(text, Path("t.txt"), i) for i, text in enumerate(TEXTS)]
    return Masked(tokenizer, documents, **{"context": 64, **options})


def stirred(model: torch.nn.Module) -> None:
    """Norms and biases away from 1 and 0, so that a mix-up shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def test_masked_loss_is_transformers_loss_of_each_piece_alone(
    tokenizers: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    objective = masked(tokenizers("masked"))
    ours = start_model(None, BERT, objective, context=64, seed=0)
    stirred(ours)
    save(ours, tmp_path)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    batch, _ = next(objective.batches(SimpleNamespace(rows=6, cursor=None, seed=3)))  # type: ignore[arg-type]
    assert int(batch.segments_BT.max()) > 1  # several pieces share a row
    total, count = 0.0, 0
    for row in range(6):
        for segment in range(1, int(batch.segments_BT[row].max()) + 1):
            own = batch.segments_BT[row] == segment
            labels = batch.targets_BT[row, own][None]
            if (n := int((labels != IGNORE).sum())) > 0:
                total += theirs(input_ids=batch.ids_BT[row, own][None], labels=labels).loss.item() * n
                count += n
    loss, supervised, _ = objective.loss(ours.eval(), batch)
    assert supervised == count and loss.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_masks_are_distributed_as_transformers_collator_does(
    tokenizers: Callable[[str], Tokenizer], tmp_path: Path, whole: bool
) -> None:
    """15 %; of these 80 % the mask token, 10 % any token, 10 % as they were; special tokens never. Four sigma."""
    tokenizer = tokenizers("masked")
    objective = masked(tokenizer, context=32, whole_words=whole)
    result = []
    steps = objective.batches(SimpleNamespace(rows=200, cursor=None, seed=0))  # type: ignore[arg-type]
    for _ in range(5):
        batch, _ = next(steps)
        real = batch.segments_BT > 0
        truth = torch.where(batch.targets_BT == IGNORE, batch.ids_BT, batch.targets_BT)
        result.append((truth[real], batch.ids_BT[real], batch.targets_BT[real]))
    ours = [torch.cat(parts) for parts in zip(*result, strict=True)]

    tokenizer.save(tmp_path)
    collator = transformers.DataCollatorForLanguageModeling(
        transformers.AutoTokenizer.from_pretrained(tmp_path), mlm_probability=0.15
    )
    torch.manual_seed(0)
    ids = ours[0][: len(ours[0]) // 32 * 32].view(-1, 32)
    made = collator([{"input_ids": row} for row in ids])
    theirs = [ids.flatten(), made["input_ids"].flatten(), made["labels"].flatten()]

    special = torch.tensor(list(tokenizer.special.values()))
    for name, (truth, seen, targets) in {"ours": ours, "theirs": theirs}.items():
        free, chosen = ~torch.isin(truth, special), targets != IGNORE
        assert not bool((chosen & ~free).any()), name
        assert bool((seen == truth)[~chosen].all()) and bool((targets == truth)[chosen].all()), name
        n = int(chosen.sum())
        wide = 2 if whole else 1  # the draws of one word's tokens are one draw
        assert abs(n / int(free.sum()) - 0.15) < 4 * wide * (0.15 * 0.85 / int(free.sum())) ** 0.5, name
        masks = float((seen[chosen] == tokenizer.id("[MASK]")).float().mean())
        stays = float((seen[chosen] == truth[chosen]).float().mean())
        assert abs(masks - 0.8) < 4 * (0.16 / n) ** 0.5 + 0.1 / tokenizer.rows, name
        assert abs(stays - 0.1) < 4 * (0.09 / n) ** 0.5 + 0.1 / tokenizer.rows, name


@pytest.mark.parametrize("name", SHAPES)
def test_a_saved_classifier_is_the_same_in_transformers(
    tokenizers: Callable[[str], Tokenizer], tmp_path: Path, name: str
) -> None:
    tokenizer = tokenizers("masked" if "bert" in name else "chat")
    objective = Classify(tokenizer, examples(), context=64)
    ours = start_model(None, SHAPES[name], objective, context=64, seed=0)
    stirred(ours)
    batch, _ = next(objective.batches(SimpleNamespace(rows=8, cursor=None, seed=0)))  # type: ignore[arg-type]
    loss, count, metrics = objective.loss(ours.eval(), objective.prepare(ours, batch))
    save(ours, tmp_path)
    tokenizer.save(tmp_path)

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == {0: "many", 1: "none", 2: "some"}
    assert theirs.config.label2id == {"many": 0, "none": 1, "some": 2}
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["Tree 7 has birds", "Birds and a nest and a nest and a nest", "a"]
    inputs = opened(texts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        expected = theirs(**inputs).logits
    ids, _ = encode_framed(tokenizer, texts, 64)
    np.testing.assert_allclose(predict(ours, ids), expected.numpy(), atol=1e-5)

    numbers = batch.labels_B
    own = [
        batch.inputs.ids_RT[r, a : b + 1][None]
        for r, a, b in zip(  # type: ignore[union-attr]
            batch.inputs.row_B, batch.inputs.first_B, batch.inputs.last_B, strict=True
        )
    ]  # type: ignore[union-attr]
    with torch.no_grad():
        nats = sum(
            theirs(input_ids=ids, labels=label[None]).loss.item() for ids, label in zip(own, numbers, strict=True)
        )
    assert count == 8 and loss.item() == pytest.approx(nats, rel=1e-5) and 0 <= metrics["accuracy"] <= 8


def test_a_saved_picture_classifier_is_the_same_in_transformers(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    objective = Classify(None, (pixels, np.arange(12) % 3))
    shape = {"dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48, "image": {"size": 8, "patch": 2, "channels": 3}}
    ours = start_model(None, shape, objective, context=None, seed=0)
    stirred(ours)
    save(ours, tmp_path)
    objective.write(tmp_path)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == {0: "0", 1: "1", 2: "2"}
    seen = objective.examples.take(list(range(12)))
    with torch.no_grad():
        expected = theirs(pixel_values=seen).logits
    np.testing.assert_allclose(predict(ours, objective.examples.inputs), expected.numpy(), atol=1e-5)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5).flatmap(lambda C: st.tuples(st.just(C), st.lists(
    st.tuples(st.integers(0, C - 1), st.integers(0, C - 1)), min_size=1, max_size=30))))  # fmt: skip
def test_figures_are_scikit_learns(case: tuple[int, list[tuple[int, int]]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    C, pairs = case
    truth, predicted = [t for t, _ in pairs], [p for _, p in pairs]
    names, every = [f"c{i}" for i in range(C)], list(range(C))
    result = figures(truth, predicted, names)
    assert result["confusion"] == metrics.confusion_matrix(truth, predicted, labels=every).tolist()
    assert result["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    macro = metrics.f1_score(truth, predicted, labels=every, average="macro", zero_division=0)
    assert result["f1_macro"] == pytest.approx(macro)
    by = metrics.precision_recall_fscore_support(truth, predicted, labels=every, zero_division=0)
    for i, name in enumerate(names):
        assert list(result["by_class"][name].values()) == pytest.approx([column[i] for column in by])
    if C == 2:
        assert result["f1"] == pytest.approx(metrics.f1_score(truth, predicted, labels=every, zero_division=0))
        assert figures(truth, predicted, names, "c0")["f1"] == pytest.approx(
            metrics.f1_score(truth, predicted, labels=every, pos_label=0, zero_division=0)
        )
    else:
        assert result["f1"] is None
