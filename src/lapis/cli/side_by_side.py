"""Two replies in two columns while they come. The last lines stay in sight; at the end the whole is printed.

Leaves out more than a terminal's width: long words are folded.
"""

from collections.abc import Generator, Mapping

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lapis.cli.output import console
from lapis.generation.text import for_terminal

GAP = 3  # columns between the two


def side_by_side(replies: Mapping[str, Generator[str, None, None]]) -> None:
    """Takes a piece from each reply in turn, until all have ended or Ctrl-C stops them."""
    texts = dict.fromkeys(replies, "")
    going = dict(replies)
    try:
        with Live(console=console, refresh_per_second=10, transient=True) as live:
            while going:
                for name, pieces in list(going.items()):
                    try:
                        texts[name] += for_terminal(next(pieces))
                    except StopIteration:
                        del going[name]
                live.update(columns(texts, console, console.height - 4))
    except KeyboardInterrupt:
        pass
    finally:
        for pieces in replies.values():
            pieces.close()
    console.print(columns(texts, console))


def columns(texts: Mapping[str, str], console: Console, most: int | None = None) -> Table:
    """One column per name, of equal width; of each text the last `most` lines."""
    width = (console.width - GAP * (len(texts) - 1)) // len(texts)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, expand=False)
    cells = []
    for name, text in texts.items():
        table.add_column(Text(name, style="bold"), width=width, overflow="fold")
        lines = Text(text).wrap(console, width, overflow="fold")
        cells.append(Text("\n").join(lines if most is None else lines[-most:]))
    table.add_row(*cells)
    return table
