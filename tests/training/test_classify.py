"""Classes and masked words: what is random is a function of the place, runs resume, results say their classes."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lapis
from lapis.cli.main import main
from lapis.config import override
from lapis.errors import ConfigError, DataError
from lapis.evaluation.classification import class_scores, predict
from lapis.families.config import ModelConfig, class_names
from lapis.model.load import save
from lapis.model.transformer import Transformer, put_head
from lapis.text.corpus.corpus import Document
from lapis.text.corpus.labels import Labeled
from lapis.text.rows.sequences import together
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.classify import Classify
from lapis.training.objectives.supervised.masked import Masked
from lapis.training.run import read_settings, run
from lapis.training.setup.start import start_model

BERT = {"family": "bert", "dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48}
VIT = {"dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48, "image": {"size": 8, "patch": 2, "channels": 1}}
WORDS = {"fruit": ["apple", "pear", "plum", "fig"], "animal": ["cat", "dog", "hen", "cow"]}


def examples(count: int = 48) -> list[Labeled]:
    """The class is told by one word."""
    outcome = []
    for i in range(count):
        label = ["fruit", "animal"][i % 2]
        text = f"I saw {'the ' * (i % 5)}{WORDS[label][i // 2 % 4]} near house {i}"
        outcome.append(Labeled(text, label, Path("words.tsv"), i + 2))
    return outcome


def table(path: Path, count: int = 48) -> Path:
    path.write_text("label\ttext\n" + "".join(f"{e.label}\t{e.text}\n" for e in examples(count)))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([e.text for e in examples()], 300, "masked")


def stripes(count: int = 32) -> tuple[Any, Any]:
    """Pictures of standing and of lying stripes."""
    random = np.random.default_rng(0)
    bars = np.tile(np.array([1.0, 1.0, -1.0, -1.0]), 2)
    pixels = np.stack([np.tile(bars, (8, 1)) if i % 2 else np.tile(bars, (8, 1)).T for i in range(count)])
    return (pixels + 0.3 * random.standard_normal(pixels.shape)).astype(np.float32), np.arange(count) % 2


def state(rows: int, cursor: Any = None, seed: int = 5) -> Any:
    return SimpleNamespace(rows=rows, cursor=cursor, seed=seed)


OBJECTIVES: dict[str, Callable[[Tokenizer], Any]] = {
    "texts": lambda t: Classify(t, examples(), context=32, hide=0.3),
    "pictures": lambda t: Classify(None, stripes(), shift=1),
    "masked": lambda t: Masked(t, [Document(e.text, e.file, e.line) for e in examples()], context=24, whole_words=True),
}


def content(batch: Any) -> list[Any]:
    """The examples of a batch, one by one, whatever they share a row with."""
    if hasattr(batch, "segments_BT"):
        return [[row.tolist() for row in parts] for parts in zip(batch.ids_BT, batch.targets_BT, strict=True)]
    if isinstance(batch.inputs, torch.Tensor):
        rows: list[Any] = [picture.tolist() for picture in batch.inputs]
    else:
        at = zip(batch.inputs.row_B, batch.inputs.first_B, batch.inputs.last_B, strict=True)
        rows = [batch.inputs.ids_RT[r, a : b + 1].tolist() for r, a, b in at]
    return list(zip(rows, batch.labels_B.tolist(), strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_random_depends_on_the_place_alone(tokenizer: Tokenizer, name: str) -> None:
    """Not on the size of a micro-batch, nor on where a run was stopped; the next epoch differs."""
    objective = OBJECTIVES[name](tokenizer)
    wide, cursors = [], []
    for _, (batch, cursor) in zip(range(20), objective.batches(state(6)), strict=False):
        wide += content(batch)
        cursors.append(json.loads(json.dumps(cursor)))
    narrow: list[Any] = []
    for _, (batch, _) in zip(range(60), objective.batches(state(2)), strict=False):
        narrow += content(batch)
    assert wide == narrow
    again, _ = next(objective.batches(state(6, cursors[8])))
    assert content(again) == wide[54:60]
    epoch = objective.rows
    assert sorted(map(repr, wide[:epoch])) != sorted(map(repr, wide[epoch : 2 * epoch]))
    other, _ = next(objective.batches(state(6, seed=6)))
    assert content(other) != wide[:6]


def test_every_example_is_read_once_in_an_epoch(tokenizer: Tokenizer) -> None:
    objective = Classify(tokenizer, examples(), context=32)
    batch, cursor = next(objective.batches(state(48)))
    assert sorted(ids for ids, _ in content(batch)) == sorted(objective.examples.inputs)  # type: ignore[type-var]
    assert cursor == {"epoch": 0, "row": 48, "seed": 5}


@pytest.mark.parametrize("shape", [BERT, {"family": "gpt2", **{k: v for k, v in BERT.items() if k != "family"}}])
def test_texts_in_a_batch_score_as_each_alone(tokenizer: Tokenizer, shape: dict[str, Any]) -> None:
    objective = Classify(tokenizer, examples(), context=32)
    model = start_model(None, shape, objective, context=32, seed=0)
    inputs: Any = objective.examples.inputs
    texts = [inputs[0][:4], inputs[3], inputs[9], inputs[21][:6], inputs[8][:5]]
    batch = together(texts)
    assert len(batch.ids_RT) < 5
    side_by_side = class_scores(model, batch)
    side_by_side.square().sum().backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    alone = torch.cat([model(torch.tensor([ids])) for ids in texts])
    alone.square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(side_by_side, alone, rtol=1e-5, atol=1e-6)
    for a, p in zip(gradients, [p for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-5)


CONFIG = {"batch": 16, "lr": 1e-2, "precision": "float32", "threads": 1, "sample_every": 0, "warmup": 5}


def test_words_are_learned_and_the_folder_says_so(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masked words first, then classes from a file of settings, then `lapis eval` on the folder."""
    table(tmp_path / "train.tsv")
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    common = {**CONFIG, "data": str(tmp_path / "train.tsv"), "valid": str(tmp_path / "train.tsv"), "context": 32}
    first = {"objective": "masked", "new": BERT, "tokenizer": str(tmp_path / "tokenizer"), "steps": 40}
    masked = run(read_settings({**common, **first, "out": str(tmp_path / "masked")}, "t"), watch=Silent())
    assert masked.held_out["valid_loss"] < 4.0 < masked.log[0]["loss"]
    second = {
        "objective": "classify",
        "model": str(tmp_path / "masked"),
        "steps": 30,
        "dropout": 0.1,
        "positive": "animal",
    }
    out = tmp_path / "classes"
    settings = override({**common, **second, "out": str(out)}, ["smoothing=0.05"])
    result = run(read_settings(settings, "t"), watch=Silent())
    assert result.held_out["accuracy"] == result.held_out["f1"] == 1.0
    report = json.loads((out / "classes.json").read_text())
    assert report["confusion"] == [[24, 0], [0, 24]] and report["positive"] == "animal"
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "animal", "1": "fruit"}
    model, _ = lapis.load(out)
    assert class_names(model.config) == ["animal", "fruit"]

    main(["eval", str(out), "--classes", str(tmp_path / "train.tsv"), "--json"])
    outcome = json.loads(capsys.readouterr().out)["classes"]
    assert outcome["accuracy"] == 1.0 and outcome["by_class"]["fruit"]["n"] == 24 and outcome["positive"] == "fruit"
    main(["eval", str(out), "--classes", str(tmp_path / "train.tsv")])
    assert "taken for fruit" in capsys.readouterr().out
    (tmp_path / "odd.tsv").write_text("label\ttext\nfruit\tan apple\nfruits\ta pear\n")
    with pytest.raises(SystemExit):
        main(["eval", str(out), "--classes", str(tmp_path / "odd.tsv")])
    assert (
        'odd.tsv line 3: the label "fruits" is not one of the classes; did you mean "fruit"?' in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "part", [{"lora": {"rank": 4}}, {"freeze": ["embed", "layers.0"]}, {"tune": ["layers.1", "head"]}]
)
def test_classes_are_learned_by_a_part_of_the_model(
    tokenizer: Tokenizer, tmp_path: Path, part: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A causal model; the head is new, and trained with whatever else is."""
    table(tmp_path / "train.tsv")
    shape = ModelConfig(dim=32, layers=2, heads=4, ffn_dim=64, vocab=300, context=32)
    torch.manual_seed(0)
    before = Transformer(shape)
    save(before, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    given = {
        "objective": "classify",
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "train.tsv"),
        "context": 32,
    }
    out = tmp_path / "out"
    settings = {**CONFIG, **given, **part, "steps": 40, "valid": str(tmp_path / "train.tsv"), "out": str(out)}
    assert run(read_settings(settings, "t"), watch=Silent()).held_out["accuracy"] > 0.9
    assert lapis.load(out)[0].config.extra["id2label"] == {"0": "animal", "1": "fruit"}
    main(["eval", str(out), "--classes", str(tmp_path / "train.tsv"), "--json"])
    assert json.loads(capsys.readouterr().out)["classes"]["accuracy"] > 0.9
    if "lora" not in part:
        after, _ = lapis.load(out)
        assert torch.equal(after.blocks[0].mlp.up.weight, before.blocks[0].mlp.up.weight)  # type: ignore[union-attr]


def test_pictures_are_learned_from_a_file_of_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels, labels = stripes()
    np.savez(tmp_path / "stripes.npz", pixels=pixels, labels=np.array(["lying", "standing"])[labels])
    where, out = str(tmp_path / "stripes.npz"), tmp_path / "out"
    settings = {
        **CONFIG,
        "objective": "classify",
        "new": VIT,
        "optimizer": "muon",
        "lr": 5e-3,
        "data": where,
        "valid": where,
        "steps": 25,
        "out": str(out),
    }
    assert run(read_settings(settings, "t"), watch=Silent()).held_out["accuracy"] == 1.0
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert processor["do_rescale"] is False and processor["size"] == {"height": 8, "width": 8}
    main(["eval", str(out), "--classes", where, "--json"])
    assert json.loads(capsys.readouterr().out)["classes"]["accuracy"] == 1.0


def test_a_stopped_run_with_dropout_ends_with_the_same_weights(tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Stop(Silent):
        def row(self, row: Any) -> None:
            if row["step"] == 6:
                raise KeyError

    objective = Classify(tokenizer, examples(), context=32, dropout=0.2, hide=0.2)
    config = TrainConfig(steps=9, save_every=3, log_every=3, **CONFIG)

    def go(out: str, watch: Silent) -> bytes:
        train(start_model(None, BERT, objective, context=32, seed=0), objective, config, tmp_path / out, watch=watch)
        return (tmp_path / out / "model.safetensors").read_bytes()

    whole = go("whole", Silent())
    with pytest.raises(KeyError):
        go("stopped", Stop())
    assert (tmp_path / ".stopped.lapis").is_dir() and go("stopped", Silent()) == whole


def test_a_dropped_share_is_only_dropped_while_training(tokenizer: Tokenizer) -> None:
    objective = Classify(tokenizer, examples(), context=32, dropout=0.5)
    model = start_model(None, BERT, objective, context=32, seed=0)
    ids: Any = objective.examples.inputs
    before = predict(model, ids)
    objective.prepare(model, next(objective.batches(state(4)))[0])
    model.train()
    np.testing.assert_array_equal(predict(model, ids), before)
    batch = together(ids[:4])
    assert not torch.equal(class_scores(model, batch), class_scores(model, batch))


def test_another_head_keeps_what_fits(tokenizer: Tokenizer) -> None:
    objective = Classify(tokenizer, examples(), context=32)
    model = start_model(None, BERT, objective, context=32, seed=0)
    pooler = model.head.pooler.weight.clone()  # type: ignore[union-attr]
    assert put_head(model, "classes", ["a", "b", "c"]) == ["head.classes.weight", "head.classes.bias"]
    assert torch.equal(model.head.pooler.weight, pooler) and class_names(model.config) == ["a", "b", "c"]  # type: ignore[union-attr]
    assert "head.transform.weight" in put_head(model, "masked") and model(torch.tensor([[1, 2]])).shape == (
        1,
        2,
        tokenizer.rows,
    )
    assert class_names(model.config) == [] and "id2label" not in model.config.extra


def test_what_cannot_be_classified_is_refused_in_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    odd = [*examples(4), Labeled("a bat", "bird", Path("words.tsv"), 6)]
    with pytest.raises(DataError, match=r'words.tsv line 6: the label "bird" is not one of the classes'):
        Classify(tokenizer, odd, classes=["animal", "fruit"])
    with pytest.raises(DataError, match=r'words.tsv line 6: the label "bird"'):
        Classify(tokenizer, examples(), valid=odd)
    with pytest.raises(ConfigError, match="the classes are fruit; two or more"):
        Classify(tokenizer, examples()[:1])
    with pytest.raises(ConfigError, match='positive is "x"; the classes are animal, fruit'):
        Classify(tokenizer, examples(), positive="x")
    with pytest.raises(ConfigError, match=r"hide is 1\.5"):
        Classify(tokenizer, examples(), hide=1.5)
    pixels, labels = stripes(8)
    model = start_model(None, VIT, (small := Classify(None, (pixels, labels))), context=None, seed=0)
    large = Classify(None, (np.pad(pixels, ((0, 0), (2, 2), (2, 2))), labels))
    with pytest.raises(DataError, match=r"the pictures are 1x12x12 .* the model takes 1x8x8; give resize=8"):
        large.prepare(model, next(large.batches(state(2)))[0])
    texts = Classify(tokenizer, examples())
    with pytest.raises(ConfigError, match="a vit model takes pictures"):
        texts.prepare(model, next(texts.batches(state(2)))[0])
    put_head(model, "classes", ["a", "b", "c"])
    with pytest.raises(ConfigError, match="the model's head is classes of 3, 2 classes are needed"):
        small.prepare(model, next(small.batches(state(2)))[0])
    chat = train_tokenizer([e.text for e in examples()], 300)
    with pytest.raises(ConfigError, match="names no mask_token"):
        Masked(chat, tmp_path)
    causal = start_model(None, {**BERT, "family": "gpt2"}, texts, context=32, seed=0)
    masked = OBJECTIVES["masked"](tokenizer)
    with pytest.raises(ConfigError, match="the model is causal"):
        masked.prepare(causal, next(masked.batches(state(2)))[0])
