"""What a person sees while a model trains: a bar on a terminal, a line each 15 seconds in a log, or nothing."""

import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from lapis.generation.text import for_terminal
from lapis.training.distributed.forward import step_forward


class Watch(Protocol):
    """What a run reports to."""

    def row(self, row: Mapping[str, Any]) -> None:
        """An entry of the learning curve."""

    def note(self, text: str) -> None:
        """A sample, a warning, a checkpoint."""

    def close(self) -> None:
        """The run has ended."""


class LiveWatch(Watch):
    """Base class of a Watch that also hears what is being done between two entries. By itself it shows nothing."""

    def stage(self, text: str) -> None:
        """Something other than steps begins: measuring, evaluating, writing."""

    def step(self, row: Mapping[str, Any]) -> None:
        """After each step: an entry of the learning curve as it would be now."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """What was measured on held-out data after so many steps."""

    def row(self, row: Mapping[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Silent(LiveWatch):
    """Shows nothing."""


class Bar(LiveWatch):
    """A live bar on standard error; notes scroll above it."""

    def __init__(self, label: str) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self.progress = Progress(*columns, console=Console(stderr=True, highlight=False))
        self.task = self.progress.add_task(for_terminal(label), total=1.0, text="")
        self.progress.start()

    def stage(self, text: str) -> None:
        self.progress.update(self.task, text=for_terminal(text))

    def step(self, row: Mapping[str, Any]) -> None:
        self.progress.update(self.task, completed=row["share"], text=format_row(row))

    def note(self, text: str) -> None:
        self.progress.console.print(Text(for_terminal(text), "dim"))

    def close(self) -> None:
        self.progress.stop()


class LogLines(LiveWatch):
    """Lines on standard error, for logs and pipes: after the first step, then each `seconds`, whatever is being done.

    Args:
        label: What the lines begin with.
        seconds: Between two lines; 0 writes one for each entry of the curve.
    """

    def __init__(self, label: str, seconds: float = 15.0) -> None:
        self.label, self.seconds = label, seconds
        self._text = ""
        self._stepped = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def stage(self, text: str) -> None:
        self._text = text
        self._start()

    def step(self, row: Mapping[str, Any]) -> None:
        self._text = f"{row['share']:4.0%}  {format_row(row)}"
        self._start()
        if not self._stepped and row["share"] < 1:  # the last one is an entry of the curve
            self._stepped = True
            self.note(f"{self.label}  {self._text}")

    def row(self, row: Mapping[str, Any]) -> None:
        if row["share"] >= 1 or not self.seconds:
            self.note(f"{self.label}  {row['share']:4.0%}  {format_row(row)}")

    def note(self, text: str) -> None:
        print(for_terminal(text), file=sys.stderr, flush=True)

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _start(self) -> None:
        if self._thread is None and self.seconds and not self._ended.is_set():
            self._thread = threading.Thread(target=self._write, daemon=True)
            self._thread.start()

    def _write(self) -> None:
        while not self._ended.wait(self.seconds):
            self.note(f"{self.label}  {self._text}")


def live(watch: Watch) -> LiveWatch:
    """The watch itself, or where it only takes entries and notes one that shows nothing."""
    return watch if isinstance(watch, LiveWatch) else Silent()


def show_share(watch: Watch, text: str, seconds: float = 0.0) -> Callable[[int, int], None]:
    """Begins a stage that says its share and the time left, each time it is called with done and total.

    Args:
        watch: Where it is shown.
        text: What is being done.
        seconds: How long it is likely to take, before anything is done.
    """
    started = time.monotonic()
    live(watch).stage(text)

    def show(done: int, total: int) -> None:
        step_forward()
        spent = time.monotonic() - started
        left = spent / done * (total - done) if done else seconds
        ahead = f"  {format_time(left)} left" if left else ""
        live(watch).stage(f"{text}  {done / max(total, 1):.0%}{ahead}")

    return show


def watcher(label: str) -> Watch:
    """A bar where standard error is a terminal, lines where not."""
    return Bar(label) if sys.stderr.isatty() else LogLines(label)


def format_row(row: Mapping[str, Any]) -> str:
    """An entry of the learning curve in one line."""
    text = f"step {row['step']:,}  loss {row['loss']:.3f}"
    if row.get("bits_per_byte") is not None:
        text += f"  {row['bits_per_byte']:.3f} bits/byte"
    for name, value in list(row.get("metrics", {}).items())[:5]:
        text += f"  {name.replace('_', ' ')} {value:.3g}"
    for name, value in list(row.get("evaluated", {}).items())[:3]:
        text += f"  {name.replace('_', ' ')} {value:.4g}"
    return f"{text}  {row['tokens_per_second']:,.0f} tok/s  {format_time(row['seconds_left'])} left"


def format_time(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    whole = round(seconds)
    head = f"{whole // 3600}:{whole // 60 % 60:02}" if whole >= 3600 else f"{whole // 60}"
    return f"{head}:{whole % 60:02}"
