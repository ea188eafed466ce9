"""Held-out figures: early stop, the best weights, and both over a restart."""

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
from lapis.text.corpus.corpus import Document
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.held_out import better, watched_metric
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal

Make = Callable[[], Transformer]
CONFIG = TrainConfig(
    steps=20, batch=4, lr=1e-2, warmup=2, log_every=2, precision="float32", threads=1, sample_every=0, save_every=2,
    eval_every=2,
)  # fmt: skip


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
            new_model(), make(), replace(CONFIG, watch_metric="acuracy"), tmp_path / "out", watch=Silent(), fresh=True
        )
    with pytest.raises(TrainingError, match="the objective has no held-out data"):
        train(new_model(), Causal(tokenizer, documents, context=32), CONFIG, tmp_path / "two", watch=Silent())
    with pytest.raises(ConfigError, match="need eval_every"):
        replace(CONFIG, eval_every=0, best=True)


def test_what_is_better() -> None:
    assert better("accuracy", 0.9, 0.8) and not better("accuracy", float("nan"), 0.8)
    assert better("valid_loss", 1.0, 2.0) and better("bits_per_byte", 1.0, 2.0) and better("test/nll", 1.0, 2.0)
    assert watched_metric({"b": 1.0, "a": 2.0}, "") == "b"
