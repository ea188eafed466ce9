"""Chapters -> what their cells print, and notebooks in every language with these outputs.

All chapters run in one kernel, one after the other, each in an empty namespace and in an empty folder of its own. One
thread, and torch's generator begins at random, so that a chapter which forgets its seed shows it.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from traitlets.config import Config

from lapis.errors import DataError
from scripts.book.chapters import BOOK, Book, Cell, Chapter, Prose

CELL_SECONDS = 600  # the first cell that asks for the models of the book trains them
FIGURE = "application/vnd.plotly.v1+json"
SOURCE = BOOK.parents[1] / "src"
FRESH = "%reset -f\n%cd -q {folder}\n__import__('torch').seed()\n__import__('torch').set_grad_enabled(True)\nNone"

Outputs = dict[str, list[Any]]
"""Cell -> what it put out, in nbformat's form: streams and results."""


@dataclass(frozen=True)
class Shown:
    """What a reader sees under a cell: `text` as printed, and the plotly figures as JSON objects."""

    text: str
    figures: list[dict[str, Any]]


def run_chapters(chapters: Sequence[Chapter], report: Callable[[str], None] = lambda path: None) -> dict[str, Outputs]:
    """Runs every cell of the chapters, in order.

    Args:
        chapters: Each starts afresh.
        report: Called with the path of each chapter as it starts.

    Returns:
        Path of the chapter -> its outputs, without standard error (progress tells of times, which differ).

    Raises:
        DataError: For a cell that fails; it names chapter and cell.
    """
    with TemporaryDirectory(prefix="lapis-book-") as scratch:
        cells = []
        for chapter in chapters:
            folder = Path(scratch, chapter.path)
            folder.mkdir(parents=True)
            cells.append(_code_cell(FRESH.format(folder=folder), chapter.path, ""))
            cells += [_code_cell(code, chapter.path, name) for name, code in chapter.cells.items()]

        def started(cell: Any, cell_index: int) -> None:
            if not cell.metadata.cell:
                report(cell.metadata.chapter)

        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PLOTLY_RENDERER": "plotly_mimetype",
            "TMPDIR": scratch,  # chapters write whole models beside themselves
        }
        notebook = new_notebook(cells=cells)
        by_file = Config({"KernelManager": {"transport": "ipc"}})  # no port of this machine listens to what cells say
        client = NotebookClient(
            notebook, timeout=CELL_SECONDS, record_timing=False, on_cell_start=started, config=by_file
        )
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            failed = next(cell for cell in cells if any(o.output_type == "error" for o in cell.outputs))
            raise DataError(
                f"{failed.metadata.chapter}: the cell {failed.metadata.cell} fails: {error.ename}: {error.evalue}"
            ) from None
    outputs: dict[str, Outputs] = {chapter.path: {} for chapter in chapters}
    for cell in cells:
        if cell.metadata.cell:
            kept = [o for o in cell.outputs if o.get("name") != "stderr"]
            outputs[cell.metadata.chapter][cell.metadata.cell] = kept
    return outputs


def shown(outputs: Sequence[Any]) -> Shown:
    """What a page shows of the outputs of one cell."""
    texts, figures = [], []
    for output in outputs:
        data = output.get("data", {})
        if output.output_type == "stream":
            texts.append(output.text)
        elif FIGURE in data:
            figures.append(data[FIGURE])
        else:
            texts.append(data["text/plain"] + "\n")
    return Shown("".join(texts).rstrip("\n"), figures)


def make_notebook(book: Book, chapter: Chapter, prose: Prose, language: str, outputs: Outputs) -> Any:
    """The notebook of a chapter in one language, with its outputs."""
    note = book.words["untranslated"][language] if prose.language != language else ""
    first = f"# {chapter.titles[language]}" + (f"\n\n*{note}*" if note else "")
    cells = [new_markdown_cell(first, id="title")]
    for i, block in enumerate(prose.blocks):
        if isinstance(block, Cell):
            count = 1 + list(chapter.cells).index(block.name)
            results = [
                o | {"execution_count": count} if o.output_type == "execute_result" else o for o in outputs[block.name]
            ]
            cell = new_code_cell(chapter.cells[block.name], id=block.name, execution_count=count, outputs=results)
            cells.append(cell)
        else:
            cells.append(new_markdown_cell(relink(block, chapter, "ipynb"), id=f"text-{i}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    nbformat.validate(notebook)
    return notebook


def relink(text: str, chapter: Chapter, suffix: str) -> str:
    """Markdown whose links to prose of other chapters lead to their pages or notebooks ("../04-attention.md").

    Raises:
        DataError: For a link to anything else inside the repository; the site has nothing but chapters.
    """

    def target(matched: re.Match[str]) -> str:
        link, _, place = matched[1].partition("#")
        if "://" in link or not link:
            return matched[0]
        file = (chapter.folder / link).resolve()
        if not (file.name.endswith(".md") and file.exists() and (file.parent / "code.py").exists()):
            raise DataError(f"{chapter.path}: links to {link}, which is no chapter; link to ../<chapter>/<language>.md")
        path = os.path.relpath(file.parent, chapter.folder.parent)
        return f"]({path}.{suffix}{'#' + place if place else ''})"

    return re.sub(r"\]\(([^)\s]+)\)", target, text)


def _code_cell(code: str, path: str, name: str) -> Any:
    return new_code_cell(code, metadata={"chapter": path, "cell": name})
