"""What commands print and write: one JSON object or text for people, pages, and progress on standard error.

Everything that a command shows goes through this file, so that names, tokens and replies from files and models are
plain text: square brackets are no markup, and control characters are shown and never sent to the terminal.
"""

import json as jsonlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from lapis.cli.streams import NotShown
from lapis.config import environment_number
from lapis.generation.text import for_terminal
from lapis.parsing import finite_json
from lapis.training.loop.progress import format_time

if TYPE_CHECKING:
    from lapis.report.page import Page

FIRST_COLUMN = 24  # places that the first column of a table keeps, however narrow the screen is
INTERVAL = 15.0  # seconds between two lines of progress in a log

_ESCAPED = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}  # control characters that steer some terminals

console = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def show(result: Mapping[str, Any], json: bool, render: Callable[[], None]) -> None:
    """Prints `result` as the one JSON object of `--json`, or calls `render` to print it for people.

    Raises NotShown where standard output does not take it, unless the command has written what the result's "out"
    names: then it is done, and a note says so. Of several processes of one job the first one prints.
    """
    if environment_number("RANK", 0):
        return
    try:
        if json:
            text = jsonlib.dumps(finite_json(result), ensure_ascii=False)
            sys.stdout.write(text.translate(_ESCAPED) + "\n")  # JSON itself spells those below a space
        else:
            render()
        sys.stdout.flush()
    except NotShown as error:
        out = result.get("out")
        if not out or result.get("dry_run"):
            raise
        line(f"note: {out} is complete; {error}", error=True)


def line(text: object = "", style: str = "", *, error: bool = False) -> None:
    """Prints text that may hold anything, as it stands; on standard error with `error`."""
    (stderr if error else console).print(Text(for_terminal(str(text)), style), soft_wrap=True)


def notes(texts: Iterable[str]) -> None:
    """Prints each note behind a dash."""
    for text in texts:
        line(f"- {text}")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, note: str = "") -> None:
    """Prints a table; numbers are set to the right, the first column to the left.

    Where it is wider than the screen or the log, headings take several lines, then lines go beyond it: a figure is
    never cut.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    headings = [for_terminal(column) for column in columns]
    width = _table_width(headings, cells)
    if width > console.width:
        headings = [heading.replace(" ", "\n") for heading in headings]
        width = _table_width(headings, cells)
    shown = Table(
        title=Text(for_terminal(title), "bold") if title else None, title_justify="left", box=None, pad_edge=False,
        caption=Text(for_terminal(note)) if note else None, caption_justify="left",
    )  # fmt: skip
    for i, heading in enumerate(headings):
        justify: Literal["left", "right"] = "left" if i == 0 else "right"
        shown.add_column(Text(heading), justify=justify, header_style="dim", no_wrap=i > 0)
    for row in cells:
        shown.add_row(*map(Text, row))
    if width > console.width:
        shown.width = width
    console.print(shown, crop=False)


def _table_width(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Places that a table needs at least; the first column may be broken into lines."""
    widths = [
        max(cell_len(part) for text in (heading, *(row[i] for row in rows)) for part in text.split("\n"))
        for i, heading in enumerate(headings)
    ]
    return min(widths[0], FIRST_COLUMN) + sum(width + 2 for width in widths[1:])


def write_page(page: "Page", path: Path | str, *, overwrite: bool = False) -> None:
    """Writes a page to a file, whole or not at all, and says on standard error where it lies.

    Raises:
        OutputError: The file exists and `overwrite` was not given.
    """
    from lapis.checkpoint.commit import commit_file

    with commit_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(page.render(), encoding="utf-8")
    line(f"page: {path}", "dim", error=True)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else number(value)
    return for_terminal(text).replace("\n", "↵").replace("\t", "⇥")


def number(value: Any) -> str:
    """A figure as people read it: 1,234 or 0.1234; an empty place for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def size(nbytes: float) -> str:
    """Bytes in decimal units, as disks and model cards count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


class Report:
    """How far a command is: call it with what is done and what there is to do.

    On a terminal a bar follows each call. Elsewhere a line goes to standard error each `INTERVAL` seconds, also while
    no call comes, so that a log shows that the command lives.

    Args:
        label: What is being done.
        unit: Of what is counted: "bytes", "tokens", or "" for things without a name.
        counts: Whether the counts themselves are shown, too.
    """

    def __init__(self, label: str, unit: str = "", *, counts: bool = False) -> None:
        self.label, self.unit, self._counts = label, unit, counts
        self.sources: dict[str, Report] = {}
        self._done: float = 0
        self._total: float | None = None
        self._begin = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None

    def draw_on(self, bar: Progress) -> None:
        """Follows the calls on a bar of the terminal."""
        self._bar = bar, bar.add_task(for_terminal(self.label), total=None, text="")

    def __call__(self, done: float, total: float | None = None, label: str = "") -> None:
        """Takes note of progress. A new label begins a new stage, with a rate and a time left of its own."""
        if label and label != self.label:
            self.label, self._begin = label, time.monotonic()
        self._done, self._total = done, total
        if self._bar is not None:
            bar, task = self._bar
            bar.update(
                task, description=for_terminal(self.label), completed=done, total=total or None, text=self.figures()
            )

    def source(self, name: str, done: int, total: int) -> None:
        """Takes note of how far one source on a server is, in bytes; it gets a bar of its own below this one."""
        part = self.sources.get(name)
        if part is None:
            part = self.sources[name] = Report(f"  {name}", "bytes", counts=True)
            if self._bar is not None:
                part.draw_on(self._bar[0])
        part(done, total)

    def stage(self, label: str) -> None:
        """Begins something of which nobody knows how long it takes."""
        self(0, None, label)

    def figures(self) -> str:
        """Share, rate and time left, as far as they are known."""
        seconds = time.monotonic() - self._begin
        if not self._total or not self._done or seconds <= 0:
            return f"{format_time(seconds)} so far" if seconds >= 1 else ""
        rate = self._done / seconds
        left = max(0.0, self._total - self._done) / rate
        counts = f"{size(self._done)} of {size(self._total)}  " if self._counts else ""
        return f"{self._done / self._total:4.0%}  {counts}{self._rate(rate)}{format_time(left)} left"

    def _rate(self, rate: float) -> str:
        if self.unit == "bytes":
            return f"{size(rate)}/s  "
        return f"{number(float(f'{rate:.3g}'))} {self.unit}/s  " if self.unit else ""


_shown: list[Report] = []  # what is on the screen now: one, or nothing


@contextmanager
def progress(label: str, unit: str = "") -> Iterator[Report]:
    """Shows how far a command is while the block runs: a bar on a terminal, a line each 15 seconds elsewhere.

    Inside another of these it is a stage of that one: one bar is shown at a time.

    Args:
        label: What is being done.
        unit: Of what is counted.

    Yields:
        A `Report`, to be called with (done, total).
    """
    if _shown:
        outer = _shown[0]
        before = outer.label, outer.unit
        outer.unit = unit
        outer.stage(label)
        yield outer
        outer.unit = before[1]
        outer.stage(before[0])
        return
    report = Report(label, unit)
    _shown.append(report)
    try:
        with _on_screen(report):
            yield report
    finally:
        _shown.pop()


@contextmanager
def _on_screen(report: Report) -> Iterator[None]:
    if environment_number("RANK", 0):  # of several processes of one job the first one shows how far it is
        yield
        return
    if stderr.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
                   TextColumn("{task.fields[text]}", markup=False))  # fmt: skip
        with Progress(*columns, console=stderr, transient=True) as bar:
            report.draw_on(bar)
            yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_write_lines, args=(report, ended), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _write_lines(report: Report, ended: threading.Event) -> None:
    while not ended.wait(INTERVAL):
        parts = [report, *list(report.sources.values())]
        text = "; ".join(f"{part.label.strip()}  {part.figures()}" for part in parts)
        print(for_terminal(text), file=sys.stderr, flush=True)
