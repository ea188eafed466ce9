"""What a run does between its steps, in seconds: evaluations of what is held out, and checkpoints."""

import hashlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lapis.training.config import TrainConfig

SAVE_SECONDS = 300.0  # between two checkpoints, where their steps are not given
_FILES = 3  # so often as long as a small file takes a checkpoint of nothing: several files, their folder, a rename
_PART = 1 << 20
_PARTS = 16  # that are written to know the speed of a disk


@dataclass(frozen=True)
class Pauses:
    """How long one of each takes.

    Args:
        evaluating: Of what is held out, once; 0 where nothing is.
        saving: Of a checkpoint; 0 where it is written beside the steps, or none is.
    """

    evaluating: float = 0.0
    saving: float = 0.0

    def share(self, config: TrainConfig) -> float:
        """Seconds that each step bears of what comes every so many steps."""
        each = ((self.evaluating, config.eval_every), (self.saving, config.save_every))
        return sum(seconds / every for seconds, every in each if every)

    def timed(self, config: TrainConfig, seconds: float) -> float:
        """Seconds of checkpoints that come by the clock, in a run of so many seconds."""
        return 0.0 if config.save_every else self.saving * (seconds // SAVE_SECONDS)

    def steps_within(self, config: TrainConfig, pace: float, seconds: float) -> int:
        """Steps of `pace` seconds that a time has room for, with what comes between them."""
        return int((seconds - self.timed(config, seconds)) / max(pace + self.share(config), 1e-9))

    def to_come(self, config: TrainConfig, step: int, total: int | None, pace: float) -> float:
        """Seconds of those after a step, the evaluation at the end of the run among them; of this one alone where a
        time bounds all that comes before."""
        if total is None:
            return self.evaluating

        def between(every: int) -> int:
            return max(0, (total - 1) // every - step // every) if every else 0

        evaluating = self.evaluating * (1 + between(config.eval_every))
        saving = self.saving * between(config.save_every)
        return evaluating + saving + self.timed(config, pace * (total - step) + evaluating)


def seconds_to_save(place: Path, size: int) -> float:
    """How long a checkpoint of so many bytes takes there, roughly: by a file without a name, which is gone at once.

    0 where the place cannot be written; whoever writes there says so.
    """
    while not place.exists() and place != place.parent:
        place = place.parent
    parts = max(1, min(_PARTS, size // _PART))
    try:
        return _FILES * _seconds_to_write(place, 1) + _seconds_to_write(place, parts) * size / (parts * _PART)
    except OSError:
        return 0.0


def _seconds_to_write(place: Path, parts: int) -> float:
    """Of so many megabytes, until they are on the disk, with their digest."""
    part, digest, started = os.urandom(_PART), hashlib.sha256(), time.perf_counter()
    with tempfile.TemporaryFile(dir=place) as file:
        for _ in range(parts):
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started
