"""How far a tour is and how long it will take: shown at the start, and brought up to date on standard error.

Work is counted in tokens: those that the runs learn, and for everything else as many as would be learned in the same
time. So one pace, tokens a second, foretells the whole; it is measured before the first run, and again as the tour goes
on. Leaves out: what a tour consists of (recipe.py).
"""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

_MEMORY = 60.0  # seconds over which the pace is averaged


class Screen(Protocol):
    """Where a tour shows how far it is."""

    def note(self, text: str, heading: bool = False) -> None: ...

    def at(self, share: float, detail: str) -> None: ...

    def close(self) -> None: ...


class Clock:
    """The parts of a tour in their order, and the time left. Is the training loop's Watch as well.

    Args:
        work: Part -> tokens, for the parts that are still to be done.
        pace: Tokens a second, as measured beforehand.
        screen: Where to tell it.
    """

    def __init__(self, work: Mapping[str, float], pace: float, screen: Screen) -> None:
        self.work = dict(work)
        self._learned, self._seconds = _MEMORY / 2 * pace, _MEMORY / 2
        self.screen = screen
        self.total = sum(self.work.values())
        self._part, self._share, self._last, self._detail = "", 0.0, time.monotonic(), ""

    @property
    def seconds_left(self) -> float:
        """Of the whole tour, at the present pace."""
        return (sum(self.work.values()) - self._share * self.work.get(self._part, 0.0)) / self.pace

    @property
    def pace(self) -> float:
        """Tokens a second of late, or their equal."""
        return self._learned / self._seconds

    def begin(self, part: str, what: str) -> None:
        """Part `part` begins; the part before it is done."""
        self.end()
        self._part, self._last = part, time.monotonic()
        self.screen.note(what, heading=True)
        self.at(0.0)

    def end(self) -> None:
        """The part that was begun last is done."""
        if self._part:
            self.at(1.0, self._detail)
            self.work.pop(self._part, None)
            self._part, self._share, self._detail = "", 0.0, ""

    def at(self, share: float, detail: str = "") -> None:
        """`share` of the part is done."""
        now = time.monotonic()
        done, spent = (share - self._share) * self.work.get(self._part, 0.0), now - self._last
        if done > 0:
            fade = math.exp(-spent / _MEMORY)
            self._learned = self._learned * fade + done
            self._seconds = self._seconds * fade + spent
            self._share, self._last = share, now
        self._detail = detail
        whole = 1 - (sum(self.work.values()) - self._share * self.work.get(self._part, 0.0)) / max(self.total, 1.0)
        words = [self._part, f"{share:4.0%}", detail, f"whole tour {whole:.0%}", f"{spelled(self.seconds_left)} left"]
        self.screen.at(whole, "  ".join(word for word in words if word))

    def row(self, row: Mapping[str, Any]) -> None:
        """An entry of a run's learning curve."""
        bits = row.get("bits_per_byte")
        detail = f"loss {row['loss']:.3f}" + ("" if bits is None else f"  {bits:.3f} bits/byte")
        self.at(float(row["share"]), f"{detail}  {row['tokens_per_second']:,.0f} tokens/s")

    def note(self, text: str) -> None:
        """A sample of text, or a warning."""
        self.screen.note(text)

    def close(self) -> None:
        """A run is over, and the tour goes on."""


class TourBar:
    """One live bar on standard error, for the whole tour; notes scroll above it."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns = (BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.fields[detail]}"))
        self.progress = Progress(*columns, console=self.console, transient=True)
        self.task = self.progress.add_task("", total=1.0, detail="")
        self.progress.start()

    def note(self, text: str, heading: bool = False) -> None:
        self.console.print(Text(text, "bold" if heading else "dim"))

    def at(self, share: float, detail: str) -> None:
        self.progress.update(self.task, completed=share, detail=detail)

    def close(self) -> None:
        self.progress.stop()


class TourLines:
    """A line on standard error at most every `seconds`, for logs and pipes."""

    def __init__(self, seconds: float = 15.0) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def note(self, text: str, heading: bool = False) -> None:
        print(text, file=sys.stderr, flush=True)

    def at(self, share: float, detail: str) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            self.note(f"  {detail}")

    def close(self) -> None:
        pass


def on_terminal() -> Screen:
    """A bar where standard error is a terminal, lines where not."""
    return TourBar() if sys.stderr.isatty() else TourLines()


def spelled(seconds: float) -> str:
    """A length of time as m:ss."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02}"
