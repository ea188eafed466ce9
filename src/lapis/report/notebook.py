"""What an object shows of itself at the end of a notebook's cell: its finding, and a table.

The picture is one call away (`.plot()` gives a figure that draws itself), since it needs plotly and some room. Leaves
out: everything that a page does.
"""

from collections.abc import Sequence

from lapis.report import markup
from lapis.report.markup import Column, Row


def bundle(text: str, title: str, rows: Sequence[Row], columns: Sequence[Column | str], hint: str) -> dict[str, str]:
    """A mime bundle: HTML for notebooks, plain text for everything else."""
    table = markup.table(rows, columns, title, level=4)
    return {"text/plain": text, "text/html": f"<div>\n{table}\n<p><small>{markup.prose(hint)}</small></p>\n</div>"}
