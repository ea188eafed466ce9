"""How long a run will take: before its first step, and as its first steps have shown it."""

from collections.abc import Mapping
from typing import Any

from lapis.training.config import TrainConfig
from lapis.training.forecast.memory import peak
from lapis.training.loop.progress import Watch, format_time, live
from lapis.training.loop.state import TrainState
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


def predict(state: TrainState, config: TrainConfig, pace: float, evaluating: float) -> None:
    """Notes what the whole run will take, at so many seconds a step and `evaluating` seconds of evaluations to come.

    Of a run that is bounded by time it is the steps that are predicted, too.
    """
    total, budget = state.schedule.total, (config.minutes or 0) * 60
    seconds = budget if total is None else state.seconds + pace * (total - state.step) + evaluating
    state.predicted = {"after_steps": state.step, "seconds": seconds, "memory_bytes": peak(state.device)}
    if config.minutes is not None:
        left = max(0.0, budget - state.seconds) / max(pace, 1e-9)
        state.predicted["steps"] = state.step + int(left) if total is None else total


def why_not_predicted(steps: int) -> str:
    """A sentence for a run of so many steps that has no prediction."""
    if steps < PREDICTED_AFTER:
        return f"The run ended after {format_count(steps, 'step')}; what it takes is predicted after {PREDICTED_AFTER}."
    return f"Nothing was predicted after {format_count(PREDICTED_AFTER, 'step')} of this run."
