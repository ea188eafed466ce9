"""A page of ours, read again, so that several can be put together into one.

The file is untrusted like any other: only the elements and attributes that our pages are made of come through, data of
figures is parsed and written anew, and everything else is left out. Leaves out: what to join (folders.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from html.parser import HTMLParser
from pathlib import Path

from lapis.errors import DataError
from lapis.parsing import ParseError, parse_json
from lapis.report.page import data_block

LIMIT = 64_000_000  # bytes of a page
ALLOWED_TAGS = frozenset(
    "p h2 h3 h4 h5 div span section figure figcaption details summary table thead tbody tr th td ol ul li dl dt dd pre "
    "code strong em small button br wbr".split()
)
LESS = {"h2": "h3", "h3": "h4", "h4": "h5", "section": "div"}  # a page becomes a section
VOID = frozenset({"br", "wbr"})
ATTRIBUTES = {
    "class": re.compile(r"[\w -]{1,80}"), "role": re.compile(r"img|region"), "tabindex": re.compile("0"),
    "aria-label": re.compile(r".*", re.DOTALL), "aria-hidden": re.compile("true"), "dir": re.compile("auto"),
    "lang": re.compile(r"[\w-]{1,20}"), "style": re.compile(r"--height:\d{1,5}px"), "scope": re.compile(r"[a-z]+"),
    "colspan": re.compile(r"\d{1,3}"), "data-column": re.compile(r"\d{1,3}"), "type": re.compile("button"),
    "data-value": re.compile(r".*", re.DOTALL), "hidden": re.compile(""),
}  # fmt: skip


@dataclass(frozen=True)
class Joined:
    """What is inside a page. blocks: HTML, safe to be put into another page; figures: how many pictures it holds."""

    title: str
    blocks: str
    figures: int


def is_ours(path: Path) -> bool:
    """Whether a file says that it is a page of lapis."""
    with path.open("rb") as file:
        return b'<meta name="generator" content="lapis">' in file.read(4096)


def read_page(path: Path) -> Joined:
    """The title and the body of a page that lapis wrote. Raises DataError for one that is too large or not text."""
    if path.stat().st_size > LIMIT:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes of HTML; the limit is {LIMIT:,}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; write the page again") from None
    reader = _Reader(path)
    reader.feed(text)
    reader.close()
    reader.finish()
    return Joined(reader.title or path.stem, "".join(reader.out), reader.figures)


class _Reader(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.path, self.title, self.figures = path, "", 0
        self.out: list[str] = []
        self._open: list[str] = []  # kept elements that are open, as they are written
        self._inside = self._dropped = 0
        self._data: list[str] | None = None
        self._titled = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "h1":
            self._titled = True
        if tag in ("main", "header"):
            self._inside += tag == "main"
            return
        if tag in ("script", "style"):
            self._dropped += 1
            if tag == "script" and self._inside and dict(attrs).get("type") == "application/json":
                self._data = []
            return
        if not self._inside or tag not in ALLOWED_TAGS:
            return
        attributes = "".join(
            f' {name}="{escape(value or "")}"' if value else f" {name}"
            for name, value in attrs if name in ATTRIBUTES and ATTRIBUTES[name].fullmatch(value or "")
        )  # fmt: skip
        self.out.append('<div class="part">' if tag == "section" else f"<{LESS.get(tag, tag)}{attributes}>")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "h1":
            self._titled = False
        if tag in ("script", "style"):
            self._dropped = max(0, self._dropped - 1)
            if self._data is not None:
                self._close_data()
            return
        if tag == "main":
            self.finish()
            self._inside = max(0, self._inside - 1)
        elif tag in self._open:
            while True:  # what was left open inside ends with it
                last = self._open.pop()
                self.out.append(f"</{LESS.get(last, last)}>")
                if last == tag:
                    break

    def finish(self) -> None:
        """Ends what was left open."""
        while self._open:
            self.handle_endtag(self._open[-1])

    def handle_data(self, data: str) -> None:
        if self._titled:
            self.title += data
        elif self._data is not None:
            self._data.append(data)
        elif self._inside and not self._dropped:
            self.out.append(escape(data))

    def _close_data(self) -> None:
        raw, self._data = "".join(self._data or ()), None
        try:
            self.out.append(data_block(parse_json(raw)))
        except ParseError:
            raise DataError(f"{self.path}: the data of a picture is damaged; write the page again") from None
        self.figures += 1
