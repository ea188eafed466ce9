"""A step that breaks or jumps is named, and stops the run or is left out; changes on resume need a name."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lapis.config import build
from lapis.errors import ConfigError, TrainingError
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import ChatRecord, Document
from lapis.text.rows.coverage import members, named_rows
from lapis.text.rows.mixture import Mixture
from lapis.text.rows.packing import pack
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import GuardOptions, TrainConfig
from lapis.training.loop.changes import check_allowed
from lapis.training.loop.guards import LEAST, StepGuard
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.result import TrainResult

Make = Callable[[], Transformer]
Broken = Callable[[Any, Any], Any]
CONFIG = TrainConfig(
    steps=6, batch=4, lr=1e-2, warmup=2, log_every=1, precision="float32", threads=1, sample_every=0, save_every=2,
    compile="off",
)  # fmt: skip
SKIP = GuardOptions(nan="skip")


class Notes(Silent):
    """Keeps what is said, and the rows."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def row(self, row: Any) -> None:
        self.rows.append(row)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Breaking(Causal):
    """The loss is multiplied where a batch holds one of these rows."""

    bad: frozenset[int] = frozenset()
    factor = torch.nan

    def loss(self, model: Transformer, batch: Any) -> Any:
        total, count, metrics = super().loss(model, batch)
        return total * (self.factor if self.is_bad else 1.0), count, metrics

    def prepare(self, model: Transformer, batch: Any) -> Any:
        self.is_bad = hasattr(batch, "rows") and bool(self.bad & {*batch.rows.tolist()})
        return super().prepare(model, batch)


@pytest.fixture
def objective(tokenizer: Tokenizer, documents: list[Document]) -> Breaking:
    return Breaking(tokenizer, documents, context=32)


def order(objective: Causal, count: int) -> list[int]:
    rows, _ = objective.examples.indices(objective.examples.start(CONFIG.seed), count)
    return [int(row) for row in rows]


def trained(make: Make, objective: Causal, config: TrainConfig, out: Path, **more: Any) -> tuple[TrainResult, Notes]:
    watch = Notes()
    return train(make(), objective, config, out, watch=watch, **more), watch


def test_fault_66_a_nan_names_batch_and_last_good(new_model: Make, objective: Breaking, tmp_path: Path) -> None:
    third = order(objective, 12)[8:]
    objective.bad = frozenset(third[:1])
    with pytest.raises(
        TrainingError, match=r"loss is nan at step 3; the last good checkpoint is \S+step-2\. "
    ) as error:
        trained(new_model, objective, CONFIG, tmp_path / "out")
    rows = re.search(r"The batch: rows ([\d, -]+) \(documents ([\d, -]+)\), which begin '", str(error.value))
    assert rows and str(min(third)) in rows[1] and len(str(error.value).splitlines()) == 1


def test_fault_66_a_nan_batch_is_left_out(new_model: Make, objective: Breaking, tmp_path: Path) -> None:
    """The result is that of a run whose data never had this batch."""
    objective.bad = frozenset(order(objective, 12)[8:9])
    result, watch = trained(new_model, objective, replace(CONFIG, guards=SKIP), tmp_path / "out")
    assert result.steps == 6 and [entry["step"] for entry in result.skipped] == [3]
    assert "it is left out" in watch.notes[0] and "rows" in result.skipped[0]["batch"]
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["skipped"] == result.skipped and written["config"]["guards"]["nan"] == "skip"

    class Without(Breaking):
        def batches(self, state: Any) -> Any:
            return (pair for number, pair in enumerate(super().batches(state)) if number != 2)

    without = Without(objective.tokenizer, objective.examples, context=32)
    trained(new_model, without, replace(CONFIG, guards=SKIP), tmp_path / "without")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "without" / "model.safetensors"
    ).read_bytes()


def test_too_many_batches_left_out_stop_the_run(new_model: Make, objective: Breaking, tmp_path: Path) -> None:
    objective.bad = frozenset(range(len(objective.examples)))
    guards = GuardOptions(nan="skip", most=2)
    with pytest.raises(TrainingError, match="at step 1 after 2 batches in a row that were left out; no checkpoint was"):
        trained(new_model, objective, replace(CONFIG, guards=guards), tmp_path / "out")


def test_a_gradient_that_is_not_finite_names_the_step(new_model: Make, objective: Breaking, tmp_path: Path) -> None:
    def broken(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf

    model = new_model()
    model.embed.weight.register_hook(broken)
    with pytest.raises(TrainingError, match=r"norm of the gradient is (inf|nan) at step 1; .*The batch: rows "):
        train(model, objective, CONFIG, tmp_path / "out", watch=Silent())


def test_a_spike_is_named_skipped_or_stops(new_model: Make, objective: Breaking, tmp_path: Path) -> None:
    objective.bad, objective.factor = frozenset(order(objective, 50)[48:49]), 50.0
    config = replace(CONFIG, steps=26, save_every=10, lr=1e-4, batch=2)
    _, watch = trained(new_model, objective, config, tmp_path / "warned")
    named = [note for note in watch.notes if "standard deviations above" in note]
    assert len(named) == 1 and "the loss is " in named[0] and "at step 25" in named[0] and "step-20" in named[0]
    stop = replace(config, guards=GuardOptions(spike="stop"))
    with pytest.raises(TrainingError, match=r"standard deviations above .* at step 25; the last good .*step-20"):
        trained(new_model, objective, stop, tmp_path / "out")
    skip = replace(config, guards=GuardOptions(spike="skip"))
    assert [e["step"] for e in trained(new_model, objective, skip, tmp_path / "skip")[0].skipped] == [25]


def test_a_guard_counts_as_float64_does() -> None:
    guard, chance = StepGuard(GuardOptions(spike="warn", deviations=5.0, window=30)), np.random.default_rng(0)
    losses = chance.normal(3.0, 0.2, 60)
    for loss in losses[: LEAST - 1]:
        guard.take(loss, 1.0)
    assert guard.fault(1e9, 1.0) is None  # too few to know
    for loss in losses[LEAST - 1 :]:
        guard.take(loss, 1.0)
    bound = losses[-30:].mean() + 5 * losses[-30:].std()
    assert guard.fault(bound + 1e-9, 1.0) is not None and guard.fault(bound - 1e-9, 1.0) is None
    assert guard.fault(3.0, 1.04) is None and guard.fault(3.0, 1.06) is not None  # a flat curve: one percent of it
    again = StepGuard(guard.options)
    again.restore(json.loads(json.dumps(guard.to_json())))
    assert again.to_json() == guard.to_json()


def test_rows_name_their_documents(tokenizer: Tokenizer, documents: list[Document]) -> None:
    """Against the segments of the rows, where a document goes on unless the row before ends with an end-of-text."""
    rows = pack(documents, tokenizer, None, 32)
    count, ended = 0, True
    for row in range(len(rows)):
        _, targets, segments, _ = rows.arrays(np.array([row]))
        here = int(segments.max())
        count += here if ended else here - 1
        assert [*members(rows, row)] == list(range(count - here + 1, count + 1))
        ended = targets[0, -1] == rows.info["end"]
    assert count == len(documents)
    mixture = Mixture({"a": (rows, 0.5), "b": (rows, 0.5)})
    text = named_rows(mixture, np.array([0, len(rows) + 1, len(rows) + 2]))
    assert re.fullmatch(r"a: rows 0 \(documents 1[-\d]*\); b: rows 1-2 \(documents [-\d]+\)", text)


def test_rows_name_their_chats(tokenizer: Tokenizer, chats: list[ChatRecord]) -> None:
    rows = pack(chats, tokenizer, None, 256)
    seen = [chat for row in range(len(rows)) for chat in members(rows, row)]
    assert sorted(seen) == list(range(1, len(chats) + 1))


@pytest.mark.parametrize("wrong, message", [
    ({"nan": "off"}, "nan is 'off'"),
    ({"window": 5}, "guards: window is 5; give at least 20"),
    ({"spikes": "stop"}, 'unknown key "spikes"; '),
])  # fmt: skip
def test_wrong_guards_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(TrainConfig, {"steps": 1, "guards": wrong}, "run.yaml")


def test_guards_of_another_kind_name_their_keys() -> None:
    with pytest.raises(ConfigError, match="guards is 'stop'; expected a mapping with nan, spike, "):
        build(TrainConfig, {"steps": 1, "guards": "stop"}, "run.yaml")


# --- what may change when a run goes on


@pytest.fixture
def stopped(new_model: Make, objective: Breaking, tmp_path: Path) -> Path:
    """A run that broke off in step 5, saved after step 4."""
    objective.bad = frozenset(order(objective, 20)[16:])
    with pytest.raises(TrainingError, match="loss is nan at step 5"):
        trained(new_model, objective, CONFIG, tmp_path / "out")
    return tmp_path / "out"


def test_fault_68_a_change_that_is_allowed_is_noted(stopped: Path, new_model: Make, objective: Breaking) -> None:
    config = replace(CONFIG, guards=SKIP, lr=1e-3, steps=8)
    with pytest.raises(
        TrainingError, match=r"config.lr was 0.01, is 0.001.*allow it with --allow-change guards --allow-"
    ):
        trained(new_model, objective, config, stopped)
    result, watch = trained(new_model, objective, config, stopped, allow_change=("guards", "lr", "steps"))
    assert result.steps == 8 and [entry["step"] for entry in result.skipped] == [5]
    assert "config.lr was 0.01, is 0.001, which was allowed, from step 5 on" in "\n".join(watch.notes)
    assert {"after_step": 4, "what": "config.steps was 6, is 8"} in result.changes
    assert max(row["lr"] for row in watch.rows) < 2e-3 and watch.rows[-1]["lr"] < watch.rows[0]["lr"]
    assert json.loads((stopped / "training.json").read_text())["changes"] == result.changes


def test_fault_59_changed_data_may_be_allowed(
    stopped: Path, new_model: Make, tokenizer: Tokenizer, documents: list[Document]
) -> None:
    other = Causal(tokenizer, documents[:-1], context=32)
    with pytest.raises(TrainingError, match=r"data was \w{12}, is \w{12}.*allow it with --allow-change data, or start"):
        trained(new_model, other, CONFIG, stopped)
    result, _ = trained(new_model, other, CONFIG, stopped, allow_change=("data",))
    assert any(entry["what"].startswith("data was") for entry in result.changes)


def test_fault_68_what_a_checkpoint_holds_cannot_change(stopped: Path, new_model: Make, objective: Breaking) -> None:
    with pytest.raises(TrainingError, match=r'optimizer was "adamw", is "muon". Undo the change to go on with it, or'):
        trained(new_model, objective, replace(CONFIG, optimizer="muon"), stopped)
    keys = {"lr", "optimizer", "steps"}
    with pytest.raises(ConfigError, match="--allow-change optimizer: it is settled when a run begins"):
        check_allowed(("optimizer",), keys)
    with pytest.raises(ConfigError, match=r"--allow-change 'lrr': .*lr"):
        check_allowed(("lrr",), keys)
