"""How long a run will take: before its first step, and as its first steps have shown it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapis.training.config import TrainConfig
from lapis.training.forecast.memory import peak
from lapis.training.forecast.pauses import Pauses, seconds_to_save
from lapis.training.loop.progress import Watch, format_time, live
from lapis.training.loop.state import TrainState
from lapis.training.optim.footprint import checkpoint_bytes
from lapis.wording import format_count

PREDICTED_AFTER = 5  # steps
_LONG = 2.0  # seconds of a step, from which a line says so


def show_estimate(state: TrainState, facts: Mapping[str, Any], rows: int, watch: Watch) -> None:
    """Shows what the measured speed says of a step, before the first one. rows: That one process computes in it."""
    total = state.schedule.total
    text = f"step {state.step + 1:,}" + (f" of {total:,}" if total else "")
    pace = facts.get("seconds_per_token")
    if pace and total:
        seconds = float(pace) * rows * state.objective.tokens_per_row
        text += f": about {format_time(seconds)} for a step, {format_time(seconds * (total - state.step))} left"
        if seconds > _LONG:
            watch.note(f"train: {text}")
    live(watch).stage(text)


def predict(state: TrainState, config: TrainConfig, pace: float, pauses: Pauses, place: Path | None = None) -> None:
    """Notes what the whole run will take: its steps, with what comes between them.

    Of a run that is bounded by time it is the steps that are predicted, too.

    Args:
        state: After some steps.
        config: Of the run.
        pace: Seconds of a step.
        pauses: How long an evaluation took, and a checkpoint; 0 where none was yet.
        place: Where checkpoints are written while the steps wait; None where they do not.
    """
    total, budget = state.schedule.total, (config.minutes or 0) * 60
    room = max(0.0, budget - state.seconds)
    expected = total or state.step + pauses.steps_within(config, pace, room)
    saves = Pauses(saving=1.0).to_come(config, state.step, expected, pace)
    if place is not None and saves and not pauses.saving:
        pauses = replace(pauses, saving=seconds_to_save(place, checkpoint_bytes(state.model, config)))
        expected = total or state.step + pauses.steps_within(config, pace, room)
    left = pace * (expected - state.step) + pauses.to_come(config, state.step, expected, pace)
    seconds = state.seconds + left if total is not None else budget + pauses.evaluating
    state.predicted = {"after_steps": state.step, "seconds": seconds, "memory_bytes": peak(state.device)}
    if config.minutes is not None:
        state.predicted["steps"] = expected


def why_not_predicted(steps: int) -> str:
    """A sentence for a run of so many steps that has no prediction."""
    if steps < PREDICTED_AFTER:
        return f"The run ended after {format_count(steps, 'step')}; what it takes is predicted after {PREDICTED_AFTER}."
    return f"Nothing was predicted after {format_count(PREDICTED_AFTER, 'step')} of this run."
