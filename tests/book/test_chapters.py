"""Chapters: cells are used once and in order, run as notebooks, and translations say what they were made from."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import pytest
import yaml

from lapis.errors import DataError
from scripts.book.chapters import BOOK, LANGUAGES, Cell, read_book
from scripts.book.notebooks import relink, run_chapters, shown

ROOT = Path(__file__).parents[2]
CHAPTERS = {chapter.path: chapter for chapter in read_book().chapters}


def notebook(folder: Path, path: str, language: str = "en"):
    return nbformat.read(folder / "notebooks" / language / f"{path}.ipynb", as_version=4)


def code_cells(folder: Path, path: str, language: str = "en"):
    return [cell for cell in notebook(folder, path, language).cells if cell.cell_type == "code"]


@pytest.fixture
def small_book(tmp_path):
    """A book of one chapter of two cells, to be damaged."""
    folder = tmp_path / "a" / "01-one"
    folder.mkdir(parents=True)
    content = yaml.safe_load((BOOK / "book.yaml").read_text(encoding="utf-8"))
    titles = dict.fromkeys(LANGUAGES, "One")
    content["parts"] = [{"name": "a", "title": titles, "chapters": [{"name": "01-one", "title": titles}]}]
    (tmp_path / "book.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (tmp_path / "en.md").write_text("The beginning.\n")
    (folder / "code.py").write_text('"""One."""\n\n# %% first\nx = 1\n\n# %% second\nprint(x + 1)\n')
    (folder / "en.md").write_text("See.\n\n{{ first }}\n\nThen.\n\n{{ second }}\n")
    return tmp_path


def test_the_book_has_every_chapter_that_its_order_names():
    folders = {file.parent.relative_to(BOOK).as_posix() for file in BOOK.rglob("code.py")}
    content = yaml.safe_load((BOOK / "book.yaml").read_text(encoding="utf-8"))
    named = {f"{part['name']}/{chapter['name']}" for part in content["parts"] for chapter in part["chapters"]}
    assert folders == named
    assert all((BOOK / path / "en.md").exists() for path in named)


def test_a_chapter_without_code_is_refused(small_book):
    (small_book / "a" / "01-one" / "code.py").unlink()
    with pytest.raises(DataError, match=r"book\.yaml: names a/01-one, which has no code\.py"):
        read_book(small_book)


@pytest.mark.parametrize("path", CHAPTERS)
def test_prose_uses_every_cell_once_and_in_order(path):
    for language in LANGUAGES:
        used = [block.name for block in CHAPTERS[path].prose(language).blocks if isinstance(block, Cell)]
        assert used == list(CHAPTERS[path].cells)


@pytest.mark.parametrize(
    "prose",
    ["{{ first }}\n", "{{ second }}\n\n{{ first }}\n", "{{ first }}\n\n{{ first }}\n\n{{ second }}\n", "{{ third }}\n"],
)
def test_a_cell_that_is_missing_or_out_of_order_is_refused(small_book, prose):
    (small_book / "a" / "01-one" / "ms.md").write_text(prose)
    (chapter,) = read_book(small_book).chapters
    with pytest.raises(DataError, match=r"ms\.md: uses the cells .*; code\.py has first, second"):
        chapter.prose("ms")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os\n# %% first\nx = 1\n", "code before the first cell"),
        ("# %% First cell\nx = 1\n", "expected lower-case words with hyphens"),
        ("# %% a\nx = 1\n# %% a\nx = 2\n", "the cell a stands twice"),
        ("# %% a\n\n# %% b\nx = 2\n", "the cell a is empty"),
    ],
)
def test_code_that_is_not_in_cells_is_refused(small_book, code, message):
    (small_book / "a" / "01-one" / "code.py").write_text(code)
    (chapter,) = read_book(small_book).chapters
    with pytest.raises(DataError, match=message):
        _ = chapter.cells


def test_translations_that_are_older_than_their_source_are_told():
    """As for README.md: a translation stays until somebody translates anew, and is named meanwhile."""
    for line in read_book().older():
        warnings.warn(line, stacklevel=1)


def test_a_translation_that_is_older_is_named(small_book):
    book = read_book(small_book)
    (chapter,) = book.chapters
    translation = chapter.folder / "uk.md"
    translation.write_text(f"---\nsource: {chapter.source}\n---\n{{{{ first }}}}\n\n{{{{ second }}}}\n")
    assert not list(book.older())
    assert chapter.prose("uk").blocks == (Cell("first"), Cell("second"))
    code = chapter.folder / "code.py"
    code.write_text(code.read_text() + "print(3)\n")
    assert [line.partition(":")[0] for line in book.older()] == ["a/01-one/uk.md"]
    shutil.copy(chapter.folder / "en.md", chapter.folder / "ko.md")
    assert any("a/01-one/ko.md: made from an unknown source" in line for line in book.older())


def test_a_cell_that_fails_is_named_with_its_chapter(small_book):
    (small_book / "a" / "01-one" / "code.py").write_text("# %% first\nx = 1\n# %% second\nprint(x / 0)\n")
    with pytest.raises(DataError, match="a/01-one: the cell second fails: ZeroDivisionError: division by zero"):
        run_chapters(read_book(small_book).chapters)


def test_links_lead_to_chapters_and_to_nothing_else(small_book):
    (chapter,) = read_book(small_book).chapters
    assert relink("[one](../01-one/en.md#x)", chapter, "ipynb") == "[one](01-one.ipynb#x)"
    assert relink("[w](https://example.org)", chapter, "md") == "[w](https://example.org)"
    with pytest.raises(DataError, match=r"a/01-one: links to \.\./02-two/en\.md, which is no chapter"):
        relink("[two](../02-two/en.md)", chapter, "md")


@pytest.mark.parametrize("path", CHAPTERS)
def test_each_chapter_is_a_notebook_with_what_it_printed(book_folder, path):
    nbformat.validate(notebook(book_folder, path))
    cells = code_cells(book_folder, path)
    assert {cell.id: cell.source for cell in cells} == CHAPTERS[path].cells
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert any(cell.outputs for cell in cells)
    lines = [len(shown(cell.outputs).text.splitlines()) for cell in cells]
    assert max(lines) <= 20
    for language in LANGUAGES:
        translated = code_cells(book_folder, path, language)
        assert [(c.source, c.outputs) for c in translated] == [(c.source, c.outputs) for c in cells]


@pytest.mark.parametrize("path", CHAPTERS)
def test_the_page_shows_what_was_printed(book_folder, path):
    page = (book_folder / "pages" / "en" / f"{path}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^(`{3,}) \{ \.text \.output \}\n(.*?)\n\1$", page, re.DOTALL | re.MULTILINE)
    printed = [text for cell in code_cells(book_folder, path) if (text := shown(cell.outputs).text)]
    assert [text for _, text in blocks] == printed
    assert page.count('<div class="plot"') == sum(
        len(shown(cell.outputs).figures) for cell in code_cells(book_folder, path)
    )


def test_a_chapter_prints_the_same_as_a_plain_script(book_folder, tmp_path):
    path = "build/02-sampling"
    command = [sys.executable, str(BOOK / path / "code.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [text for cell in code_cells(book_folder, path) if (text := shown(cell.outputs).text)]
    assert done.stdout.splitlines() == "\n".join(printed).splitlines()


def test_without_the_extra_there_is_one_line_that_says_so():
    code = (
        "import sys, runpy; sys.modules['material'] = None; sys.argv = ['book'];"
        "runpy.run_module('scripts.book', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line = "book: mkdocs-material, which makes the book, is not installed; pip install 'lapis[book]'\n"
    assert (done.returncode, done.stderr) == (1, line)
