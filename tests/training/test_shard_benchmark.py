"""benchmarks/shard.py: the pause that a checkpoint makes holds the wait for the one before it, too."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lapis.training.distributed.sharded_state import ShardedSaves

WRITING = 0.2  # seconds, which is lower than any measure of them


@pytest.fixture(scope="module")
def bench(benchmark_module: Callable[[str], ModuleType]) -> Any:
    return benchmark_module("shard")


def test_a_pause_holds_the_wait_and_the_copy(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a checkpoint is still being written when the next one comes: for so long after that one asks."""
    asked, commit, finish = threading.Event(), ShardedSaves._commit, ShardedSaves.finish

    def slow_commit(self: ShardedSaves, *given: Any) -> None:
        asked.wait()
        time.sleep(WRITING)
        commit(self, *given)

    def asking(self: ShardedSaves) -> None:
        if self._thread is not None:
            asked.set()
        finish(self)
        asked.clear()

    monkeypatch.setattr(ShardedSaves, "_commit", slow_commit)
    monkeypatch.setattr(ShardedSaves, "finish", asking)
    bench.prepare(tmp_path)
    figures = bench.pause(tmp_path, 7, bench.SHAPE)
    first, second = figures["pauses"]
    assert first["wait"] < WRITING <= second["wait"] and first["copy"] > 0 and second["copy"] > 0, figures


def test_a_pause_is_judged_and_told_as_a_whole(bench: Any) -> None:
    figures = {"pauses": [{"wait": 0.0, "copy": 0.2}, {"wait": 0.5, "copy": 0.1}], "step": 0.55}
    assert not bench.good("pause", figures) and bench.good("pause", {**figures, "step": 0.6})
    assert "stops the training for 0.600 s at most: 0.500 s until the one before it is written, and 0.100 s" in (
        "\n".join(bench.table({"pause": figures}, 50))
    )
