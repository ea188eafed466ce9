"""The curve on its way: metrics.jsonl while a run is at work, trackers by name, and what a failing one does."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lapis.config import build
from lapis.errors import ConfigError, MissingExtra
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Document
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TRACKERS, TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.loop.tracking import METRICS, TrackedWatch, Tracker, check_installed, numbers
from lapis.training.objectives.supervised.next_token import Causal

Make = Callable[[], Transformer]
CONFIG = TrainConfig(
    steps=6, batch=4, lr=1e-2, warmup=2, log_every=2, precision="float32", threads=1, sample_every=0, compile="off",
    save_every=2, eval_every=2,
)  # fmt: skip


@pytest.fixture
def objective(tokenizer: Tokenizer, documents: list[Document]) -> Causal:
    return Causal(tokenizer, documents, context=32, valid=0.1)


class EndedError(Exception):
    """Ends a run from within."""


class Stopping(Silent):
    def __init__(self, step: int) -> None:
        self.at = step

    def row(self, row: Any) -> None:
        if row["step"] == self.at:
            raise EndedError


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_lie_in_a_file_while_a_run_is_at_work(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    metrics = tmp_path / ".out.lapis" / ".journal" / METRICS
    with pytest.raises(EndedError):
        train(new_model(), objective, CONFIG, tmp_path / "out", watch=Stopping(6))
    assert [row["step"] for row in entries(metrics)] == [2, 4]
    with metrics.open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # beyond the checkpoint, and cut by a kill
    train(new_model(), objective, CONFIG, tmp_path / "out", watch=(seen := Rows()))
    assert [row["step"] for row in entries(tmp_path / "out" / "log.jsonl")] == [2, 4, 6]
    assert [row["step"] for row in seen.file] == [2, 4, 6]


class Rows(Silent):
    """Reads the file before the run ends."""

    def note(self, text: str) -> None:
        if "going on from" in text:
            self.journal = Path(text.removeprefix("train: going on from ")).parent

    def close(self) -> None:
        pass

    def stage(self, text: str) -> None:
        if text == "writing the result":
            self.file = entries(self.journal / METRICS)


def test_tensorboard_gets_every_number(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install 'lapis[track]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(CONFIG, track=("tensorboard",))
    result = train(new_model(), objective, config, tmp_path / "out", watch=Silent())
    board = EventAccumulator(str(tmp_path / "tensorboard" / "out"))
    board.Reload()
    losses = [(event.step, event.value) for event in board.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in result.log]
    held_out = {event.step: event.value for event in board.Scalars("held_out/valid_loss")}
    assert held_out == {
        row["step"]: pytest.approx(row["held_out"]["valid_loss"], rel=1e-6) for row in result.log
    }  # the last one, too
    assert {"lr", "grad_norm", "tokens_per_second"} <= set(board.Tags()["scalars"])


def test_tensorboard_shows_a_step_once(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    """Of a run that was stopped beyond its checkpoint, and of one that starts anew in the same place."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install 'lapis[track]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, board = replace(CONFIG, track=("tensorboard",)), EventAccumulator(str(tmp_path / "tensorboard" / "out"))
    config = replace(config, save_every=4, log_every=1)
    for watch, steps in ((Stopping(6), [1, 2, 3, 4, 5]), (Silent(), [1, 2, 3, 4, 5, 6])):
        with suppress(EndedError):
            train(new_model(), objective, config, tmp_path / "out", watch=watch)
        board.Reload()
        assert [event.step for event in board.Scalars("loss")] == steps
    shorter = replace(config, steps=3)
    train(new_model(), objective, shorter, tmp_path / "out", watch=Silent(), overwrite=True)
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3]


@pytest.mark.parametrize("name", [name for name in TRACKERS if find_spec(name) is None])
def test_a_tracker_that_is_missing_names_its_install(name: str) -> None:
    with pytest.raises(MissingExtra, match=rf"{name}.*lapis\[track\]"):
        check_installed((name,))


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"track is 'tensorbord'; .*tensorboard"):
        build(TrainConfig, {"steps": 1, "track": "tensorbord"}, "run.yaml")


def test_a_tracker_that_fails_ends_no_run() -> None:
    sent: list[tuple[int, dict[str, float]]] = []

    def fails(values: dict[str, float], step: int) -> None:
        raise ConnectionError("no route\nto host")

    class Notes(Silent):
        notes: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.notes.append(text)

    good = Tracker("good", lambda values, step: sent.append((step, values)), lambda: None)
    watch = TrackedWatch(Notes(), [Tracker("bad", fails, lambda: None), good])
    for step in (1, 2):
        watch.row({"step": step, "loss": 2.0, "bits_per_byte": None, "metrics": {"accuracy": 0.5}})
        watch.evaluated(step, {"valid_loss": 3.0})
    assert Notes.notes == ["train: bad failed (no route); the run goes on without it"]
    assert sent == [(1, {"loss": 2.0, "accuracy": 0.5}), (1, {"held_out/valid_loss": 3.0}),
                    (2, {"loss": 2.0, "accuracy": 0.5}), (2, {"held_out/valid_loss": 3.0})]  # fmt: skip
    assert numbers({"step": 3, "metrics": {}}) == {}
