"""Where the learning curve goes while a run is at work: metrics.jsonl beside the checkpoints, and trackers by name.

TensorBoard, Weights & Biases and Trackio get every number of an entry under its own name, held-out ones under
`held_out/`, with the step. A tracker that fails ends no run: a line says so. Their files lie beside the output
(TensorBoard's in `tensorboard/NAME`), since the output itself is written at the end, whole.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lapis.errors import MissingExtra
from lapis.training.config import TrainConfig
from lapis.training.loop.progress import LiveWatch, Watch, live

METRICS = "metrics.jsonl"
PROJECT = "lapis"

Send = Callable[[dict[str, float], int], None]


class Tracker:
    """One place where numbers go. send: numbers by name, and the step. finish: nothing more comes."""

    def __init__(self, name: str, send: Send, finish: Callable[[], object]) -> None:
        self.name, self.send, self.finish = name, send, finish


class TrackedWatch(LiveWatch):
    """A watch whose entries also go to a file and to trackers."""

    def __init__(self, inner: Watch, trackers: list[Tracker]) -> None:
        self.inner, self.trackers = inner, trackers
        self._file: Path | None = None
        self._stepped = False

    def keep_file(self, folder: Path) -> None:
        """From now on entries are appended to metrics.jsonl in this folder."""
        self._file = folder / METRICS

    def stage(self, text: str) -> None:
        live(self.inner).stage(text)

    def step(self, row: Mapping[str, Any]) -> None:
        live(self.inner).step(row)
        if self._file is not None and not self._stepped:
            _cut(self._file, row["step"])
            self._stepped = True

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        live(self.inner).evaluated(step, metrics)
        self._send({f"held_out/{name}": value for name, value in metrics.items()}, step)

    def row(self, row: Mapping[str, Any]) -> None:
        self.inner.row(row)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self._send(numbers(row), row["step"])

    def note(self, text: str) -> None:
        self.inner.note(text)

    def close(self) -> None:
        self.inner.close()
        for tracker in self.trackers:
            self._try(tracker, tracker.finish)
        self.trackers = []

    def _send(self, values: dict[str, float], step: int) -> None:
        for tracker in list(self.trackers):
            if not self._try(tracker, lambda tracker=tracker: tracker.send(values, step)):  # type: ignore[misc]
                self.trackers.remove(tracker)

    def _try(self, tracker: Tracker, act: Callable[[], object]) -> bool:
        try:
            act()
        except Exception as error:  # whatever a library or its network raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.inner.note(f"train: {tracker.name} failed ({reason:.100}); the run goes on without it")
            return False
        return True


def tracked(watch: Watch, config: TrainConfig, out: Path) -> TrackedWatch:
    """The watch, with the trackers of `config.track`. Raises MissingExtra for one that is not installed."""
    check_installed(config.track)
    return TrackedWatch(watch, [_OPENERS[name](out, asdict(config)) for name in dict.fromkeys(config.track)])


def check_installed(names: tuple[str, ...]) -> None:
    """Raises MissingExtra for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise MissingExtra(f"track: {name}", "track")


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an entry of the curve by name, its metrics among them."""
    flat = {**row, **row.get("metrics", {})}
    return {k: float(v) for k, v in flat.items() if k != "step" and isinstance(v, (int, float))}


def _cut(path: Path, step: int) -> None:
    """Leaves the entries before a step: what a run that was stopped wrote beyond its checkpoint comes again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        before = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
        path.write_text("".join(before), encoding="utf-8")


def _identity(out: Path) -> str:
    """The same for every part of a run that was stopped and went on."""
    return hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:16]


def _tensorboard(out: Path, settings: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out.parent / "tensorboard" / out.name))
    writer.add_text("config", f"```\n{json.dumps(settings, indent=1, default=str)}\n```")

    def send(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("tensorboard", send, writer.close)


def _wandb(out: Path, settings: dict[str, Any]) -> Tracker:
    import wandb

    run = wandb.init(project=PROJECT, name=out.name, dir=str(out.absolute().parent), id=_identity(out), resume="allow",
                     config=settings)  # fmt: skip
    return Tracker("wandb", lambda values, step: run.log(values, step=step), run.finish)


def _trackio(out: Path, settings: dict[str, Any]) -> Tracker:
    import trackio

    trackio.init(project=PROJECT, name=f"{out.name}-{_identity(out)[:4]}", resume="allow", config=settings)
    return Tracker("trackio", lambda values, step: trackio.log(values, step=step), trackio.finish)


_OPENERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
