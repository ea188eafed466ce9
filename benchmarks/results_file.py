"""Dated tables in benchmarks/results: each run adds one, none is overwritten."""

from collections.abc import Sequence
from pathlib import Path


def add_table(script: str, title: str, lines: Sequence[str]) -> None:
    """Adds lines to the results of a script (its `__file__`), under a title where there are none yet."""
    name = Path(script).stem
    place = Path(script).with_name("results") / f"{name}.md"
    place.parent.mkdir(exist_ok=True)
    earlier = place.read_text() if place.exists() else f"# {title} (benchmarks/{name}.py)\n"
    place.write_text(f"{earlier}\n" + "\n".join(lines) + "\n")
