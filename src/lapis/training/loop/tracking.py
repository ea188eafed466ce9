"""Where the learning curve goes while a run is at work: metrics.jsonl beside the checkpoints, and trackers by name.

TensorBoard, Weights & Biases and Trackio get every number of an entry under its own name, held-out ones under
`held_out/`, with the step. A tracker that fails, at its start too, ends no run: a line says so. Their files lie
beside the output (TensorBoard's in `tensorboard/NAME`), since the output itself is written at the end, whole.
"""

import json
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lapis.checkpoint.commit import commit_file
from lapis.errors import MissingExtra
from lapis.training.config import TrainConfig
from lapis.training.loop.progress import LiveWatch, Watch, live

METRICS = "metrics.jsonl"
_IDENTITY = "tracked-as"  # the file beside it that holds the name of the run at trackers
PROJECT = "lapis"

Send = Callable[[dict[str, float], int], None]


class Tracker:
    """One place where numbers go. send: numbers by name, and the step. finish: nothing more comes."""

    def __init__(self, name: str, send: Send, finish: Callable[[], object]) -> None:
        self.name, self.send, self.finish = name, send, finish


@dataclass(frozen=True)
class Tracked:
    """The run that a tracker is opened for.

    Attributes:
        out: Where its result will be.
        settings: Shown with it.
        step: Steps done, in the checkpoint that it goes on from.
        identity: The same for all parts of a run that was stopped and went on, and another for one that starts anew.
    """

    out: Path
    settings: dict[str, Any]
    step: int
    identity: str


class TrackedWatch(LiveWatch):
    """A watch whose entries also go to a file and to trackers."""

    def __init__(self, inner: Watch, trackers: list[Tracker] | None = None) -> None:
        self.inner, self.trackers = inner, trackers or []
        self._file: Path | None = None
        self._stepped = False

    def keep_file(self, folder: Path) -> None:
        """From now on entries are appended to metrics.jsonl in this folder."""
        self._file = folder / METRICS

    def open_trackers(self, config: TrainConfig, out: Path, folder: Path, newest: Path | None) -> None:
        """From now on entries go to the trackers of `config.track`, too; of one that cannot be opened a line says so.

        Args:
            config: The run's.
            out: Where its result will be.
            folder: Its journal, which is there until the run is done.
            newest: The checkpoint that it goes on from; None for one that starts.
        """
        if not config.track:
            return
        step = int(newest.name.removeprefix("step-")) if newest is not None else 0
        run = Tracked(out, asdict(config), step, _identity(folder, step))
        for name in dict.fromkeys(config.track):
            self._try(name, lambda name=name: self.trackers.append(_OPENERS[name](run)))  # type: ignore[misc]

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
            self._try(tracker.name, tracker.finish)
        self.trackers = []

    def _send(self, values: dict[str, float], step: int) -> None:
        for tracker in list(self.trackers):
            if not self._try(tracker.name, lambda tracker=tracker: tracker.send(values, step)):  # type: ignore[misc]
                self.trackers.remove(tracker)

    def _try(self, name: str, act: Callable[[], object]) -> bool:
        try:
            with redirect_stdout(sys.stderr):  # standard output is for the result of the command
                act()
        except Exception as error:  # whatever a library or its network raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.inner.note(f"train: {name} failed ({reason:.100}); the run goes on without it")
            return False
        return True


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


def _identity(folder: Path, step: int) -> str:
    """The name of a run at trackers, which its journal keeps; a new one where it starts with its first step."""
    place = folder / _IDENTITY
    if not step or not place.exists():
        with commit_file(place, overwrite=True) as temporary:
            temporary.write_text(secrets.token_hex(8), encoding="utf-8")
    return place.read_text(encoding="utf-8")


def _tensorboard(run: Tracked) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    place, first = run.out.parent / "tensorboard" / run.out.name, run.step + 1 if run.step else 0
    writer = SummaryWriter(str(place), purge_step=first)  # hides what was sent of these steps before
    writer.add_text("config", f"```\n{json.dumps(run.settings, indent=1, default=str)}\n```", run.step)

    def send(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("tensorboard", send, writer.close)


def _wandb(run: Tracked) -> Tracker:
    import wandb

    there = wandb.init(project=PROJECT, name=run.out.name, dir=str(run.out.absolute().parent), id=run.identity,
                       resume="allow", config=run.settings)  # fmt: skip
    return Tracker("wandb", lambda values, step: there.log(values, step=step), there.finish)


def _trackio(run: Tracked) -> Tracker:
    import trackio

    name = f"{run.out.name}-{run.identity[:4]}"
    trackio.init(project=PROJECT, name=name, resume="allow", config=run.settings)
    return Tracker("trackio", lambda values, step: trackio.log(values, step=step), trackio.finish)


_OPENERS: dict[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
