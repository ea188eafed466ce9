"""What a person sees while a model trains: a bar on a terminal, a line now and then in a log, or nothing."""

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text


class Watch(Protocol):
    """Told of each entry of the learning curve, and of notes (samples, checkpoints, warnings)."""

    def row(self, row: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing."""

    def row(self, row: Mapping[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Bar:
    """A live bar on standard error; notes scroll above it."""

    def __init__(self, label: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self.progress = Progress(*columns, console=Console(stderr=True, highlight=False))
        self.task = self.progress.add_task(label, total=1.0, said="")
        self.progress.start()

    def row(self, row: Mapping[str, Any]) -> None:
        self.progress.update(self.task, completed=row["share"], said=spelled(row))

    def note(self, text: str) -> None:
        self.progress.console.print(Text(text, "dim"))

    def close(self) -> None:
        self.progress.stop()


class Lines:
    """A line on standard error at most every `seconds`, for logs and pipes."""

    def __init__(self, label: str, seconds: float = 15.0) -> None:
        self.label, self.seconds, self.last = label, seconds, 0.0

    def row(self, row: Mapping[str, Any]) -> None:
        if time.monotonic() - self.last >= self.seconds or row["share"] >= 1:
            self.last = time.monotonic()
            self.note(f"{self.label}  {row['share']:4.0%}  {spelled(row)}")

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def watcher(label: str) -> Watch:
    """A bar where standard error is a terminal, lines where not."""
    return Bar(label) if sys.stderr.isatty() else Lines(label)


def spelled(row: Mapping[str, Any]) -> str:
    """An entry of the learning curve in one line."""
    said = f"loss {row['loss']:.3f}"
    if row.get("bits_per_byte") is not None:
        said += f"  {row['bits_per_byte']:.3f} bits/byte"
    for name, value in list(row.get("metrics", {}).items())[:5]:
        said += f"  {name.replace('_', ' ')} {value:.3g}"
    left = round(row["seconds_left"])
    return f"{said}  {row['tokens_per_second']:,.0f} tok/s  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
