"""Builds the book into build/book: a site that works offline, in five languages, and the chapters as notebooks.

    python -m scripts.book                        the whole book
    python -m scripts.book build/04-attention     runs the named chapters only, and prints what they print
    python -m scripts.book --sources              what a translation of each chapter states as its source

Needs the extra `book`.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from lapis.errors import LapisError, MissingExtra
from scripts.book.chapters import BOOK, read_book

OUT = BOOK.parents[1] / "build" / "book"
NEEDS = {"material": "mkdocs-material", "nbclient": "nbclient", "nbformat": "nbformat", "ipykernel": "ipykernel"}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.book", description="Builds the book, or runs chapters.")
    parser.add_argument("chapters", nargs="*", help='run these only ("build/04-attention") and print what they print')
    parser.add_argument("--sources", action="store_true", help="print what translations state as their source")
    parser.add_argument("--out", type=Path, default=OUT, help="where the site and the notebooks go")
    options = parser.parse_args(arguments)
    book = read_book(paths=options.chapters)
    if options.sources:
        print(f"{book.source}  the first page")
        for chapter in book.chapters:
            print(f"{chapter.source}  {chapter.path}")
        return
    if missing := [package for name, package in NEEDS.items() if find_spec(name) is None]:
        raise MissingExtra(f"{missing[0]}, which makes the book,", "book")
    from scripts.book.notebooks import run_chapters, shown
    from scripts.book.site import build

    outputs = run_chapters(book.chapters, lambda path: print(f"book: {path}", file=sys.stderr))
    if not options.chapters:
        print(f"book: {build(book, outputs, options.out)}")
        for line in book.older():
            print(f"book: {line}", file=sys.stderr)
        return
    for chapter in book.chapters:
        for name, results in outputs[chapter.path].items():
            cell = shown(results)
            print(f"--- {name}", *filter(None, [cell.text]), *["(a figure)"] * len(cell.figures), sep="\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LapisError as error:
        sys.exit(f"book: {error}")
