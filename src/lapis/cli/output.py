"""What commands print: one JSON object on standard output, or something for people. Progress goes to standard error."""

import json as jsonlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def show(result: Mapping[str, Any], json: bool, render: Callable[[], None]) -> None:
    """Print `result` as the one JSON object of `--json`, or call `render` to print it for people."""
    if json:
        sys.stdout.write(jsonlib.dumps(_finite(result), ensure_ascii=False) + "\n")
    else:
        render()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, note: str = "") -> None:
    """Print a table; numbers are set to the right, the first column to the left."""
    shown = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, caption=note)
    shown.caption_justify = "left"
    body = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right", header_style="dim", no_wrap=i > 0)
    for row in body:
        shown.add_row(*row)
    console.print(shown)


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


def progress(unit: str = "") -> Progress:
    """A bar on standard error with share done, `{task.fields[rate]}` and time left; a context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]} " + unit),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,  # a log gets lines, not bars
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
