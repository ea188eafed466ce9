"""The chapters of the book as they lie in docs/book: cells of code, prose in five languages, their order and titles.

    book.yaml                  order, titles, and the few words that the builder itself writes
    <part>/<chapter>/code.py   a docstring, then cells: a line `# %% name` opens one
    <part>/<chapter>/en.md ... prose; a line that is only `{{ name }}` stands for a cell and what it printed

Leaves out: running the code (notebooks.py) and the pages (pages.py).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lapis.config import load_yaml
from lapis.errors import DataError

BOOK = Path(__file__).parents[2] / "docs" / "book"
LANGUAGES = {"en": "English", "ms": "Bahasa Melayu", "zh": "中文", "uk": "Українська", "ko": "한국어"}

Titles = dict[str, str]


@dataclass(frozen=True)
class Cell:
    """A place in the prose where the code of this name stands, with what it printed."""

    name: str


@dataclass(frozen=True)
class Prose:
    """What a chapter says in one language.

    Attributes:
        language: Its code; "en" where the chapter has not been translated.
        blocks: Markdown and cells in turn.
    """

    language: str
    blocks: tuple[str | Cell, ...]


@dataclass(frozen=True)
class Chapter:
    """One folder. `path` names it ("build/04-attention"); `titles` holds its title by language."""

    path: str
    titles: Titles
    root: Path = BOOK

    @property
    def folder(self) -> Path:
        return self.root / self.path

    @cached_property
    def cells(self) -> dict[str, str]:
        """Name -> code, in order.

        Raises:
            DataError: For code before the first cell, and for a cell without name, without code, or twice.
        """
        file = self.folder / "code.py"
        before, *pieces = re.split(r"^# %%[ \t]*(.*)\n", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if re.sub(r'^"""[^"]*"""', "", before).strip():
            raise DataError(f"{file}: there is code before the first cell; begin one with a line `# %% name`")
        cells: dict[str, str] = {}
        for name, code in zip(pieces[::2], pieces[1::2], strict=True):
            if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
                raise DataError(f'{file}: a cell is called "{name}"; expected lower-case words with hyphens')
            if name in cells or not code.strip():
                raise DataError(f"{file}: the cell {name} {'stands twice' if name in cells else 'is empty'}")
            cells[name] = code.strip("\n")
        return cells

    def prose(self, language: str) -> Prose:
        """The text in a language, or in English where it has none.

        Raises:
            DataError: Where a cell is missing, stands twice, or out of order.
        """
        file = self.folder / f"{language}.md"
        if not file.exists():
            language, file = "en", self.folder / "en.md"
        text, _ = read_prose(file)
        blocks: list[str | Cell] = []
        for i, piece in enumerate(re.split(r"^\{\{ (\S+) \}\}$", text, flags=re.MULTILINE)):
            if i % 2:
                blocks.append(Cell(piece))
            elif piece.strip():
                blocks.append(piece.strip())
        used = [block.name for block in blocks if isinstance(block, Cell)]
        if used != list(self.cells):
            raise DataError(f"{file}: uses the cells {', '.join(used)}; code.py has {', '.join(self.cells)}")
        return Prose(language, tuple(blocks))

    @property
    def source(self) -> str:
        """What a translation is made from: the first 12 hex digits of the sha256 of en.md and code.py."""
        return source_of(self.folder / "en.md", self.folder / "code.py")


@dataclass(frozen=True)
class Part:
    """Chapters under one heading."""

    titles: Titles
    chapters: tuple[Chapter, ...]


@dataclass(frozen=True)
class Book:
    """What book.yaml says: `words` holds the builder's own words, word -> language -> text."""

    titles: Titles
    words: dict[str, Titles]
    parts: tuple[Part, ...]
    root: Path = BOOK

    @property
    def chapters(self) -> list[Chapter]:
        return [chapter for part in self.parts for chapter in part.chapters]

    @property
    def source(self) -> str:
        """What a translation of the first page is made from."""
        return source_of(self.root / "en.md")

    def opening(self, language: str) -> str:
        """The text of the first page, in English where a language has none."""
        file = self.root / f"{language}.md"
        return read_prose(file if file.exists() else self.root / "en.md")[0]

    def older(self) -> Iterator[str]:
        """The translations that are older than what they translate, as "build/04-attention/ms.md: ..."."""
        pairs = [(chapter.folder, chapter.source) for chapter in self.chapters]
        for folder, source in [(self.root, self.source), *pairs]:
            for language in LANGUAGES:
                file = folder / f"{language}.md"
                if language != "en" and file.exists() and (stated := read_prose(file)[1]) != source:
                    name = file.relative_to(self.root).as_posix()
                    yield f"{name}: made from {stated or 'an unknown source'}; its source now is {source}"


def read_book(root: Path = BOOK, paths: Sequence[str] = ()) -> Book:
    """The book in `root`, or only the chapters at `paths`.

    Raises:
        DataError: For a title that a language lacks, a chapter without code, or a path that is no chapter.
    """
    file = root / "book.yaml"
    content: dict[str, Any] = load_yaml(file)
    parts = []
    for entry in content["parts"]:
        chapters = [
            Chapter(f"{entry['name']}/{chapter['name']}", _titles(chapter["title"], f"{file}: {chapter['name']}"), root)
            for chapter in entry["chapters"]
        ]
        parts.append(Part(_titles(entry["title"], f"{file}: {entry['name']}"), tuple(chapters)))
    every = [chapter for part in parts for chapter in part.chapters]
    for chapter in every:
        if not (chapter.folder / "code.py").exists():
            raise DataError(f"{file}: names {chapter.path}, which has no code.py; write one, or take the line out")
    known = [chapter.path for chapter in every]
    if unknown := [path for path in paths if path not in known]:
        raise DataError(f"{file}: no chapter {unknown[0]}; there are {', '.join(known)}")
    listed = [Part(part.titles, tuple(c for c in part.chapters if c.path in paths or not paths)) for part in parts]
    words = {word: _titles(texts, f"{file}: {word}") for word, texts in content["words"].items()}
    return Book(
        _titles(content["title"], f"{file}: title"), words, tuple(part for part in listed if part.chapters), root
    )


def read_prose(file: Path) -> tuple[str, str]:
    """The text of a file without its front matter, and the `source` that stands there."""
    text = file.read_text(encoding="utf-8")
    matched = re.match(r"---\nsource: *([0-9a-f]{12})\n---\n", text)
    return (text[matched.end() :], matched[1]) if matched else (text, "")


def source_of(*files: Path) -> str:
    """The first 12 hex digits of the sha256 of files, one after the other."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _titles(texts: dict[str, str], where: str) -> Titles:
    if set(texts) != set(LANGUAGES):
        raise DataError(f"{where}: has {', '.join(texts)}; expected {', '.join(LANGUAGES)}")
    return texts
