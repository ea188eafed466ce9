"""Policies in several processes: what ends one of them within a step, where they exchange figures, ends all alike."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lapis.errors import TrainingError
from lapis.training.objectives.policy import on_policy
from lapis.training.objectives.policy.on_policy import OnPolicy
from lapis.training.objectives.policy.prompts import Replier


def run_grpo(
    bench: Any, place: Path, out: str, size: int = 2, before: Callable[[], None] | None = None, **more: Any
) -> tuple[list[int], str]:
    """In processes that hold all of the weights: their exit statuses, and what they said."""
    given = {**bench.settings(place, "grpo", 6), "shard": "none", "out": str(place / out), **more}
    codes, shown = bench.Ranks(size, given, before=before).end(60)
    return codes, str(shown)


@pytest.mark.parametrize(("rank", "updates"), [(0, 1), (1, 2)])
def test_a_signal_to_one_process_saves_the_last_whole_step(bench: Any, place: Path, rank: int, updates: int) -> None:
    """It comes between two steps, so that the other one waits within the next; alone, a process goes on to the end."""
    update, collect, here = bench.Updater.update, OnPolicy._collect, str(rank)

    def signalled(self: Any, *given: Any) -> Any:
        if self.state.step == 2 and os.environ["RANK"] == here:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *given)

    def late(self: OnPolicy, model: Any, turn: Any, own: Any) -> Any:
        if turn.round * updates == 2 and os.environ["RANK"] != here:
            time.sleep(0.5)  # until the other one has left
        return collect(self, model, turn, own)

    def before() -> None:
        bench.Updater.update, OnPolicy._collect = signalled, late  # type: ignore[method-assign]

    codes, shown = run_grpo(bench, place, f"signal-{rank}", before=before, updates=updates)
    journal = bench.journal_of(place / f"signal-{rank}")
    assert codes == [1, 1] and len(shown.strip().splitlines()) == 1, shown
    assert f"stopped by SIGTERM after step 2 of 6; saved in {journal}/step-2. Run the same command again" in shown
    if updates == 2:
        codes, shown = run_grpo(bench, place, f"signal-{rank}", 1)
        assert codes == [0], shown
        bench.train_here(place, bench.settings(place, "grpo", 6))
        assert bench.furthest(place / "grpo-6-one", place / f"signal-{rank}") <= 1e-6


def refuses(*_: Any, **__: Any) -> Any:
    raise TrainingError("it cannot reply")


def has_no_memory(*_: Any, **__: Any) -> Any:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize(("owner", "name", "fault", "line"), [
    (Replier, "score", refuses, "it cannot reply"),
    (on_policy, "reference_log_probabilities", has_no_memory, "train: out of memory; raise accumulate"),
    (on_policy, "gather_experience", refuses, "it cannot reply"),
], ids=["score", "reference", "gather"])  # fmt: skip
def test_what_one_process_refuses_in_a_step_ends_all(
    bench: Any, place: Path, owner: Any, name: str, fault: Any, line: str
) -> None:
    """Before each place where the processes exchange figures: replies and rewards, the reference, all replies."""

    def before() -> None:
        if os.environ["RANK"] == "1":
            collect = OnPolicy._collect

            def fails(self: OnPolicy, model: Any, turn: Any, own: Any) -> Any:
                if turn.round == 1:
                    setattr(owner, name, fault)
                return collect(self, model, turn, own)

            OnPolicy._collect = fails  # type: ignore[method-assign]

    codes, shown = run_grpo(bench, place, "refused", before=before)
    assert codes == [1, 1] and len(shown.strip().splitlines()) == 1 and line in shown, shown
