"""What comes between the steps of a run, evaluations and checkpoints, is in what is said of its time beforehand."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lapis.training.config import TrainConfig
from lapis.training.forecast import measured
from lapis.training.forecast.budget import Budget
from lapis.training.forecast.pauses import Pauses, seconds_to_save
from lapis.training.loop import estimate, held_out, loop
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised import next_token
from lapis.training.run import plan, read_settings, run

from .conftest import SMALL_RUN

pytestmark = pytest.mark.usefixtures("here")


def settings(**changes: Any) -> Any:
    return read_settings({**SMALL_RUN, **changes}, "run.yaml")


@pytest.mark.parametrize(("every", "steps", "seconds"), [(0, 500, 60.0), (20, 83, 58.3), (1000, 454, 55.4)])
def test_a_budget_of_time_has_room_for_checkpoints(
    every: int, steps: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 0.1 seconds here, what is held out 10, a checkpoint 10; by the clock none comes within a minute."""
    first_steps = measured._first_steps
    monkeypatch.setattr(measured, "_first_steps", lambda *given: (first_steps(*given)[0] and [0.1, 0.1], 10.0))
    monkeypatch.setattr(measured, "seconds_to_save", lambda place, size: 10.0)
    result = plan(settings(valid=0.1, save_every=every), Budget.parse("60 s"), watch=Silent())
    assert result.steps == steps and result.seconds == pytest.approx(seconds)


def test_pauses_of_a_run_are_counted() -> None:
    """Evaluations of 7 seconds, the last at the end of all, and checkpoints of 2, none of them at the end."""
    how, pauses = TrainConfig(steps=100, eval_every=10, save_every=25), Pauses(7.0, 2.0)
    assert pauses.to_come(how, 0, 100, 1.0) == 10 * 7 + 3 * 2 and pauses.to_come(how, 5, 99, 1.0) == 10 * 7 + 3 * 2
    assert pauses.to_come(how, 50, 100, 1.0) == 5 * 7 + 1 * 2 and pauses.to_come(how, 100, 100, 1.0) == 7
    assert pauses.share(how) == pytest.approx(0.78) and pauses.steps_within(how, 1.0, 178.0) == 100
    by_clock = TrainConfig(minutes=11)  # after 300 and 600 seconds
    assert pauses.to_come(by_clock, 0, 660, 1.0) == 7 + 4 and pauses.steps_within(by_clock, 1.0, 660.0) == 656
    assert pauses.to_come(by_clock, 0, None, 1.0) == 7, "a time bounds the rest"


def test_a_disk_is_tried_without_a_trace(tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    few, more = (seconds_to_save(tmp_path / "not" / "there", size) for size in (1000, 10**12))
    assert 0 < few < more and set(tmp_path.iterdir()) == before
    assert seconds_to_save(Path("/proc/none"), 1000) == 0, "whoever writes there says why it cannot"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A row that is held out takes 1,000 seconds by the clock of evaluations, and is a part of its own; the clock."""
    clock, loss = [0.0], next_token.next_token_loss

    def takes_long(*given: Any) -> Any:
        clock[0] += 1000.0 * (not torch.is_grad_enabled())
        return loss(*given)

    monkeypatch.setattr(next_token, "BATCH_TOKENS", 64)
    monkeypatch.setattr(next_token, "next_token_loss", takes_long)
    monkeypatch.setattr(held_out, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


@pytest.mark.parametrize(("every", "evaluations"), [(0, 1), (3, 4), (6, 2), (9, 2)])
def test_evaluations_to_come_are_predicted(every: int, evaluations: int, slow: list[float]) -> None:
    """From one before the fifth step, or else from the first part of one; of 12 steps' the last is at the end."""
    after = run(settings(steps=12, valid=0.4, eval_every=every), watch=Silent())
    rows = json.loads(Path("run/training.json").read_text())["counts"]["held_out"]
    left = evaluations - (every == 3)
    assert rows > 9 and round(after.predicted["seconds"] / 1000) == left * rows
    assert round(after.seconds / 1000) == rows, "by that clock the evaluation at the end"
    parts = (every != 3) * math.ceil(rows / 20)
    assert slow[0] / 1000 == evaluations * rows + parts


def test_minutes_have_room_for_evaluations(slow: list[float]) -> None:
    """Each is to take longer than half the time that there is, so that the steps end with it."""
    after = run(settings(steps=None, minutes=300, valid=0.4, eval_every=4, schedule="linear"), watch=Silent())
    rows = json.loads(Path("run/training.json").read_text())["counts"]["held_out"]
    assert after.steps == after.predicted["steps"] == 3 + int(18_000 / (rows * 250))


@pytest.mark.parametrize(("every", "saves"), [(0, 0), (2, 0), (8, 4), (40, 0)])
def test_checkpoints_to_come_are_predicted(every: int, saves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the speed of the disk, or where one was before the fifth step by that one."""
    monkeypatch.setattr(estimate, "seconds_to_save", lambda place, size: 1000.0)
    after = run(settings(save_every=every), watch=Silent())
    assert round(after.predicted["seconds"] / 1000) == saves


def test_the_first_step_is_no_measure_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 1,000 seconds here, as where blocks are compiled in it, and each of the others 2."""
    clock, step = [0.0], loop.TrainingRun.step

    def takes_long(self: loop.TrainingRun, batches: Any) -> None:
        clock[0] += 2.0 if self.state.step else 1000.0
        step(self, batches)

    monkeypatch.setattr(loop.TrainingRun, "step", takes_long)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: clock[0]))
    after = run(settings(steps=105, log_every=2), watch=Silent())
    assert after.predicted["seconds"] == pytest.approx(200.0, abs=50)
