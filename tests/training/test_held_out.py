"""Held-out figures: early stop, the best weights, and both over a restart."""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lapis.errors import ConfigError, TrainingError
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.report.pages.certificate import certificate_page
from lapis.report.pages.training import run_page
from lapis.text.corpus.corpus import ChatRecord, Document
from lapis.text.rows.rows import IGNORE
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.held_out import better, overfitting, update_best, watched_metric
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent, format_row
from lapis.training.loop.state import Best
from lapis.training.objectives.objective import FirstRows
from lapis.training.objectives.supervised.next_token import Causal, Chat

Make = Callable[[], Transformer]
CONFIG = TrainConfig(
    steps=20, batch=4, lr=1e-2, warmup=2, log_every=2, precision="float32", threads=1, sample_every=0, save_every=2,
    eval_every=2,
)  # fmt: skip


PACE = {"tokens_per_second": 1000.0, "seconds_left": 0.0}  # what the log leaves to times.json


class Scored(Causal):
    """Causal, with figures that rise until the third evaluation; the evaluation draws random numbers."""

    means = frozenset({"answer"})

    def __init__(self, tokenizer: Tokenizer, data: Any, context: int = 512) -> None:
        super().__init__(tokenizer, data, context=context)
        self.seen: dict[int, dict[str, Tensor]] = {}
        self.values = iter([0.5, 0.6, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])

    def loss(self, model: Transformer, batch: Any) -> Any:
        loss, count, metrics = super().loss(model, batch)
        return loss, count, {**metrics, "answer": 42.0, "tokens_again": float(count)}

    def evaluate(self, model: Transformer) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        self.seen[len(self.seen)] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return {"accuracy": next(self.values), "loss": 1.0}


@pytest.fixture
def make(tokenizer: Tokenizer, documents: list[Document]) -> Callable[[], Scored]:
    return lambda: Scored(tokenizer, documents, context=32)


def test_early_stop_and_the_best_weights(new_model: Make, make: Callable[[], Scored], tmp_path: Path) -> None:
    objective, model = make(), new_model()
    result = train(model, objective, replace(CONFIG, early_stop=2, best=True), tmp_path / "out", watch=Silent())
    assert result.steps == 10 and result.best_step == 6  # 0.9 was the third evaluation, two more were worse
    saved = load(tmp_path / "out").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in objective.seen[2].items())
    assert [row["held_out"]["accuracy"] for row in result.log if "held_out" in row] == [0.5, 0.6, 0.9, 0.8, 0.7]
    assert result.held_out == {"accuracy": 0.6, "loss": 1.0}  # asked once more, for what was written
    assert result.metrics["answer"] == 42.0 and result.metrics["tokens_again"] == 1.0


def test_evaluation_leaves_no_trace(new_model: Make, make: Callable[[], Scored], tmp_path: Path) -> None:
    one, other = new_model(), new_model()
    train(one, make(), CONFIG, tmp_path / "one", watch=Silent())
    train(other, make(), replace(CONFIG, eval_every=0), tmp_path / "other", watch=Silent())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class StopError(Exception):
    pass


class Breaks(Silent):
    def row(self, row: Any) -> None:
        if row["step"] == 8:
            raise StopError


def test_the_best_weights_outlive_a_kill(new_model: Make, make: Callable[[], Scored], tmp_path: Path) -> None:
    config = replace(CONFIG, best=True, ema=0.9)
    first = make()
    with pytest.raises(StopError):
        train(new_model(), first, config, tmp_path / "out", watch=Breaks())
    after = make()
    after.values = iter([0.1] * 20)  # nothing after the kill is better
    result = train(new_model(), after, config, tmp_path / "out", watch=Silent())
    saved = load(tmp_path / "out").state_dict()
    assert result.best_step == 6 and all(torch.equal(saved[n], w) for n, w in first.seen[2].items())


def test_what_cannot_be_watched_is_refused(
    new_model: Make, make: Callable[[], Scored], tokenizer: Tokenizer, documents: list[Document], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match='watch_metric is "acuracy"; did you mean "accuracy"'):
        train(
            new_model(),
            make(),
            replace(CONFIG, watch_metric="acuracy", best=True),
            tmp_path / "out",
            watch=Silent(),
            fresh=True,
        )
    with pytest.raises(TrainingError, match="the objective has no held-out data"):
        train(new_model(), Causal(tokenizer, documents, context=32), CONFIG, tmp_path / "two", watch=Silent())
    with pytest.raises(ConfigError, match="need eval_every"):
        replace(CONFIG, eval_every=0, best=True)


def test_what_is_better() -> None:
    assert better("accuracy", 0.9, 0.8) and not better("accuracy", float("nan"), 0.8)
    assert better("valid_loss", 1.0, 2.0) and better("bits_per_byte", 1.0, 2.0) and better("test/nll", 1.0, 2.0)
    assert watched_metric({"b": 1.0, "a": 2.0}, "") == "b"


@pytest.mark.parametrize("name, values, best", [
    ("reward", [math.nan, 0.5, 0.9, math.nan], (3, 0.9, 1)), ("loss", [math.nan, 0.9, 0.5], (3, 0.5, 0)),
    ("loss", [math.nan, math.nan], (None, 0.0, 2)),
])  # fmt: skip
def test_what_is_no_number_is_never_the_best(name: str, values: list[float], best: Any, new_model: Make) -> None:
    model, found = new_model(), Best()
    for step, value in enumerate(values, 1):
        update_best(found, step, name, value, model, True)
    assert (found.step, found.value, found.stale) == best and bool(found.weights) == (best[0] is not None)


def test_a_run_that_measures_no_number_says_so(new_model: Make, make: Callable[[], Scored], tmp_path: Path) -> None:
    objective, model = make(), new_model()
    objective.values = iter([math.nan] * 20)
    result = train(model, objective, replace(CONFIG, early_stop=2, best=True), tmp_path / "out", watch=Silent())
    assert (result.steps, result.best_step) == (4, None)
    assert result.ended == "accuracy was no number in 2 evaluations; stopped early"
    losses = [{"step": i, "held_out": {"valid_loss": loss}} for i, loss in enumerate((math.nan, 2.0, 1.9, math.nan))]
    assert overfitting(losses) is None
    rises = [*losses, {"step": 9, "held_out": {"valid_loss": 3.0}}]
    assert "lowest at step 2 (1.900) and rose to 3.000" in (overfitting(rises) or "")
    rows = [{"loss": math.nan, "tokens": 9, "seconds": 1.0, **row} for row in rises]
    assert "lowest at step 2, at 1.900, and rose to 3.000" in run_page(rows, {}, "out").render()
    facts = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert "nan" not in re.findall('class="held-out" d="(.*?)"', certificate_page(facts, rows).render())[0]
    assert "<svg" not in certificate_page(facts, [rows[0], rows[3]]).render()


@pytest.mark.parametrize("kind", ["causal", "chat"])
@pytest.mark.parametrize("valid", ["data", 0.25])
def test_next_tokens_have_a_held_out_part(
    kind: str, valid: Any, new_model: Make, tokenizer: Tokenizer, documents: list[Document], chats: list[ChatRecord],
    tmp_path: Path,
) -> None:  # fmt: skip
    records: list[Any] = documents if kind == "causal" else chats
    learned, held_out = (records[:-8], records[-8:]) if valid == "data" else (records, valid)
    make: Any = Causal if kind == "causal" else Chat
    objective = make(tokenizer, learned, context=32 if kind == "causal" else 64, valid=held_out)
    config = replace(CONFIG, steps=6, eval_every=2, lr=3e-3)
    result = train(new_model(), objective, config, tmp_path / "out", watch=Silent())
    curve = [row["held_out"]["valid_loss"] for row in result.log if "held_out" in row]
    assert len(curve) == 3 and curve[-1] == result.held_out["valid_loss"] < curve[0]
    model = load(tmp_path / "out")
    rows = objective.held_out[""].draws()[0].to("cpu")
    logits = model(rows.ids_BT, positions_BT=rows.positions_BT, segments_BT=rows.segments_BT)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.targets_BT.flatten(), ignore_index=IGNORE)
    assert curve[-1] == pytest.approx(expected.item(), rel=1e-5)
    assert ("valid_bits_per_byte" in result.held_out) == (kind == "causal")
    if valid == 0.25:  # what is held out is never learned from
        total = len(objective.held_out[""].data)
        assert objective.rows == total - round(total / 4)
        batches = objective.batches(FirstRows(1, 0))
        learned_rows = {int(next(batches)[0].rows[0]) for _ in range(2 * objective.rows)}
        assert learned_rows == set(range(objective.rows))


def test_a_share_that_cannot_be_held_out_is_refused(tokenizer: Tokenizer, documents: list[Document]) -> None:
    for share in (0.0, 1.0, 1e-6):
        with pytest.raises(ConfigError, match=r"of .* rows. Give another share, or files"):
            Causal(tokenizer, documents, context=32, valid=share)


def test_a_held_out_part_makes_another_run(tokenizer: Tokenizer, documents: list[Document]) -> None:
    plain, split = (Causal(tokenizer, documents, context=32, valid=valid).describe() for valid in (None, 0.2))
    assert set(plain["counts"]) == set(split["counts"]) - {"held_out"}
    assert plain["counts"]["rows"] > split["counts"]["rows"]


def test_over_fitting_is_named(
    new_model: Make, tokenizer: Tokenizer, documents: list[Document], tmp_path: Path
) -> None:
    few = [Document("one two three four", Path("a.txt"), 1)]
    notes: list[str] = []
    watch = Silent()
    watch.note = notes.append  # type: ignore[method-assign]
    config = replace(CONFIG, steps=30, batch=1, eval_every=5, lr=3e-3)
    objective = Causal(tokenizer, few, context=32, valid=documents[:5])
    result = train(new_model(), objective, config, tmp_path / "out", watch=watch)
    assert result.overfitting and "the held-out loss was lowest at step" in result.overfitting
    (note,) = [note for note in notes if "over-fitting" in note]
    assert "best: true ends with the weights of that step" in note
    best = train(new_model(), objective, replace(config, best=True), tmp_path / "best", watch=Silent())
    assert best.held_out["valid_loss"] < result.held_out["valid_loss"]
    losses = [{"step": i, "held_out": {"valid_loss": loss}} for i, loss in enumerate((3.0, 2.0, 2.01))]
    assert overfitting(losses) is None and overfitting(losses[:1]) is None


def test_there_is_one_final_loss(new_model: Make, make: Callable[[], Scored], tmp_path: Path) -> None:
    result = train(new_model(), make(), replace(CONFIG, eval_every=0), tmp_path / "out", watch=Silent())
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert result.loss == facts["loss"] == rows[-1]["loss"]
    page = run_page(rows, facts, "out").render()
    assert f"{result.loss:.3f}" in page and f"loss {result.loss:.3f}" in format_row(rows[-1] | PACE)


class Listens(Silent):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.left: dict[int, float] = {}

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def step(self, row: Any) -> None:
        self.left[row["step"]] = row["seconds_left"]


def test_an_evaluation_says_how_far_it_is(
    new_model: Make, tokenizer: Tokenizer, documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.training.objectives.supervised.next_token.BATCH_TOKENS", 64)
    objective, watch = Causal(tokenizer, documents, context=32, valid=documents[:8]), Listens()
    evaluate = objective.evaluate

    def slowly(model: Transformer) -> dict[str, float]:
        time.sleep(1)
        return evaluate(model)

    monkeypatch.setattr(objective, "evaluate", slowly)
    train(new_model(), objective, replace(CONFIG, steps=6, eval_every=3), tmp_path / "out", watch=watch)
    heard = [text for text in watch.stages if text.startswith("evaluating held-out data  ")]
    assert heard[0] == "evaluating held-out data  0%"
    assert any(re.search(r"\d%  0:\d\d left$", text) for text in heard)
    assert watch.left[4] >= 1  # one evaluation of more than a second is still to come


BIRDS = [Document(f"Birds sing {i} songs over the {'north south east west'.split()[i % 4]} sea.", Path("b"), i)
         for i in range(40)]  # fmt: skip


class Recorded(Causal):
    """Causal that keeps the weights of each evaluation."""

    def evaluate(self, model: Transformer) -> dict[str, float]:
        metrics = super().evaluate(model)
        seen = self.__dict__.setdefault("seen", [])
        seen.append((metrics, {name: p.detach().clone() for name, p in model.named_parameters()}))
        return metrics


@pytest.fixture
def forgets(new_model: Make, tokenizer: Tokenizer, documents: list[Document], tmp_path: Path) -> Callable[[], Any]:
    """() -> a model that knows birds, and an objective that teaches cats and watches both."""
    model = new_model()
    config = replace(CONFIG, steps=30, eval_every=0)
    train(model, Causal(tokenizer, BIRDS[8:], context=32), config, tmp_path / "birds", watch=Silent())

    def make_both() -> tuple[Transformer, Recorded]:
        learned, valid = documents[:-8], {"cats": documents[-8:], "birds": BIRDS[:8]}
        return load(tmp_path / "birds", torch.float32), Recorded(tokenizer, learned, context=32, valid=valid)

    return make_both


def test_each_held_out_text_has_a_name(forgets: Callable[[], Any], tokenizer: Tokenizer) -> None:
    model, objective = forgets()
    figures = objective.evaluate(model)
    assert list(figures) == ["cats/bits_per_byte", "birds/bits_per_byte"]
    alone = Causal(tokenizer, BIRDS, context=32, valid=BIRDS[:8])
    assert figures["birds/bits_per_byte"] == alone.evaluate(model)["valid_bits_per_byte"]
    assert "rows of cats, " in objective.coverage()[-1] and set(objective.describe()["valid"]) == {"cats", "birds"}
    with pytest.raises(ConfigError, match="valid: 'a b' is no name"):
        Causal(tokenizer, BIRDS, context=32, valid={"a b": BIRDS})


LIMITED = replace(CONFIG, steps=40, eval_every=2, lr=3e-3, schedule="constant", limits={"birds/bits_per_byte": "20%"})


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_run_ends_within_its_limits(ema: float, forgets: Callable[[], Any], tmp_path: Path) -> None:
    notes: list[str] = []
    watch = Silent()
    watch.note = notes.append  # type: ignore[method-assign]
    model, objective = forgets()
    result = train(model, objective, replace(LIMITED, ema=ema), tmp_path / "out", watch=watch)
    start, *evaluated = [metrics["birds/bits_per_byte"] for metrics, _ in objective.seen]
    limit = 1.2 * start
    assert result.start == objective.seen[0][0] and start <= limit
    *within, beyond, again = evaluated  # what was written is measured once more
    assert all(value <= limit for value in within) and beyond > limit and again == within[-1]
    assert result.steps == 2 * (len(within) + 1) < 40 and result.best_step == 2 * len(within)
    assert result.held_out["birds/bits_per_byte"] == again
    saved = load(tmp_path / "out").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in objective.seen[-3][1].items())
    assert result.ended and result.ended in notes[-1]
    assert f"beyond its limit of {limit:.4g}, 20% from {start:.4g} at the start" in result.ended
    assert f"ends with the weights of step {result.best_step}, the last within" in result.ended
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    page = run_page(result.log, facts, "out").render()
    assert "Why it ended: birds/bits_per_byte is" in page and "bits per byte, birds" in page


def test_limits_outlive_a_kill(forgets: Callable[[], Any], tmp_path: Path) -> None:
    digests = []
    config = replace(LIMITED, limits={"birds/bits_per_byte": "60%"})
    for name in ("whole", "killed"):
        if name == "killed":
            with pytest.raises(StopError):
                train(*forgets(), config, tmp_path / name, watch=Breaks())
        result = train(*forgets(), config, tmp_path / name, watch=Silent())
        assert result.ended and result.steps > 8
        digests.append([(tmp_path / name / "model.safetensors").read_bytes(), result.start, result.ended])
    assert digests[0] == digests[1]


def test_limits_that_are_left_at_once_or_never_met(forgets: Callable[[], Any], tmp_path: Path) -> None:
    model, objective = forgets()
    result = train(model, objective, replace(LIMITED, limits={"birds/bits_per_byte": "0%"}), tmp_path / "a",
                   watch=Silent())  # fmt: skip
    assert result.steps == 2 and result.best_step == 0 and "weights before the first step" in (result.ended or "")
    assert all(torch.equal(p, objective.seen[0][1][name]) for name, p in model.named_parameters())
    result = train(*forgets(), replace(LIMITED, steps=6, limits={"birds/bits_per_byte": 0.01}), tmp_path / "b",
                   watch=Silent())  # fmt: skip
    assert result.steps == 6 and result.ended is None
    model, objective = forgets()  # left by the very last steps
    config = replace(LIMITED, steps=3, lr=3e-2, eval_every=9, limits={"birds/bits_per_byte": "50%"})
    result = train(model, objective, config, tmp_path / "c", watch=Silent())
    assert result.steps == 3 and result.ended and result.best_step is not None and result.best_step < 3
    assert result.held_out["birds/bits_per_byte"] <= 1.5 * result.start["birds/bits_per_byte"]


def test_limits_that_cannot_be_are_refused(forgets: Callable[[], Any], tmp_path: Path) -> None:
    for limits, text in (({"birds": "3"}, 'a share such as "3%"'), ({"birds": "-3%"}, "birds is")):
        with pytest.raises(ConfigError, match=text):
            replace(CONFIG, limits=limits)
    with pytest.raises(ConfigError, match="limits need eval_every"):
        replace(LIMITED, eval_every=0)
    with pytest.raises(ConfigError, match=r"birds/bits_per_bite. is not measured; did you mean"):
        train(*forgets(), replace(LIMITED, limits={"birds/bits_per_bite": 1.0}), tmp_path / "out", watch=Silent())
