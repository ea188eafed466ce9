"""Figures, tables and text -> one HTML file that needs nothing else.

The page works offline and makes no request: plotly.js is packed into it once (deflated, so 2 MB instead of 4.8; the
browser unpacks it), and a content security policy inside the page forbids every connection and every script but ours.
It follows the reader's light or dark preference, prints in light, and keeps within 400 pixels of width.

Writing the string to disk is the caller's (checkpoint/commit.py), so that a report is committed like all else.

    page = Page("Chat, grafted onto Malay", "Five models, two languages, no training step.")
    page.section("What the graft brought", "The score of every model on held-out text.")
    page.table(rows, ["model", Column("nll", "response NLL", ".2f", best="min")], "The graft closes half the gap")
    page.figure(plots.learning_curves(rows, "The loss falls in all four runs"))
    html = page.render()
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Self

from lapis.report import markup, theme
from lapis.report.markup import Column, escape, prose

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = Mapping[str, Any]

SERIF = "'Iowan Old Style', Charter, 'Sitka Text', Palatino, 'Palatino Linotype', 'Noto Serif', 'DejaVu Serif', serif"
MONO = "ui-monospace, 'Cascadia Code', Menlo, Consolas, 'Noto Sans Mono', 'DejaVu Sans Mono', monospace"


class Page:
    """A page that grows from top to bottom. Every method adds a block and returns the page.

    Titles and text are plain text in which only `code` and **strong** have a meaning; everything is escaped.
    """

    def __init__(self, title: str, lead: str = "", *, language: str = "en", footer: str = "") -> None:
        self.title = title
        self._lead = lead
        self._language = language
        self._footer = footer
        self._blocks: list[str] = []
        self._sections: list[str] = []
        self._figures = 0
        self._style = ""
        self._scripts: list[str] = []

    @property
    def sections(self) -> list[str]:
        """The titles of the sections so far."""
        return list(self._sections)

    def section(self, title: str, text: str = "") -> Self:
        """Begin a section."""
        if self._sections:
            self._blocks.append("</section>")
        self._sections.append(title)
        number = len(self._sections)
        self._blocks.append(f'<section aria-labelledby="s{number}">\n<h2 id="s{number}">{prose(title)}</h2>')
        return self.text(text)

    def chapter(self, title: str, blocks: str, figures: int, *, folded: bool = False) -> Self:
        """Adds a section made of blocks of another page of ours; the sections of that page are headings here.

        Args:
            title: Of the section.
            blocks: HTML, as pages/joined.py reads it.
            figures: How many pictures are among the blocks.
            folded: Whether the blocks are hidden until the reader opens them.
        """
        self.section(title)
        self._figures += figures
        return self._add(
            f'<details class="chapter"><summary>Open</summary>\n{blocks}\n</details>' if folded else blocks
        )

    def text(self, text: str) -> Self:
        """Paragraphs, parted by blank lines."""
        return self._add(markup.paragraphs(text))

    def stats(self, figures: Sequence[tuple[str, str, str]]) -> Self:
        """A few key figures in large type: (label, value, note)."""
        return self._add(markup.stats(figures))

    def table(
        self,
        rows: Sequence[Row],
        columns: Sequence[Column | str],
        title: str = "",
        *,
        caption: str = "",
        mark: Collection[str] = (),
        sortable: bool = False,
        folded: str = "",
    ) -> Self:
        """A table. `mark` names rows (by their first column) to set off; `folded` hides it behind that summary."""
        block = markup.table(
            rows, columns, title, caption=caption, mark=mark, sortable=sortable, level=self._level()
        )  # fmt: skip
        return self._add(f"<details><summary>{prose(folded)}</summary>\n{block}\n</details>" if folded else block)

    def beside(self, *blocks: Callable[[], object]) -> Self:
        """Puts blocks next to each other where there is room, and below each other where not.

        Args:
            blocks: Each adds to this page what stands in one column: `lambda: page.table(...)`.
        """
        self._blocks.append('<div class="beside">')
        for add in blocks:
            self._blocks.append("<div>")
            add()
            self._blocks.append("</div>")
        return self._add("</div>")

    def replies(self, rows: Sequence[Row]) -> Self:
        """Replies of several models, side by side under their prompt.

        A row holds `prompt`, `replies` (model -> text), and, where known, `wanted` (the right answer), `right` (the
        models that gave it) and `language` (a BCP 47 tag, so that the browser picks the right glyphs).
        """
        return self._add(markup.replies(rows))

    def samples(self, texts: Sequence[str], title: str = "", *, language: str = "") -> Self:
        """Texts that a model wrote, as a numbered list."""
        return self._add(markup.samples(texts, title, language, self._level()))

    def figure(
        self,
        figure: go.Figure | Mapping[str, Any],
        caption: str = "",
        *,
        alt: str = "",
        rows: Sequence[Row] = (),
        columns: Sequence[Column | str] = (),
    ) -> Self:
        """A plotly figure. Its title becomes a heading of the page, which can wrap on a narrow screen.

        alt: what a reader who cannot see it should know (default: title and caption). rows: the numbers behind the
        figure, offered as a folded table (all keys of the first row, or `columns`).
        """
        title, data, layout = split_title(figure)
        meta = layout.get("meta") or {}
        height = layout.setdefault("height", 400)
        self._figures += 1
        level = self._level()
        heading = f"<h{level}>{prose(title)}</h{level}>\n" if title else ""
        words = alt or ". ".join(part.rstrip(".") for part in (title, caption) if part) or "figure"
        spec = data_block({"data": data, "layout": layout})
        block = (
            f'<figure>\n{heading}<div class="wide">'
            f'<div class="plot" role="img" aria-label="{escape(words)}" style="--height:{int(height)}px">'
            f"<p>The picture is drawn here once the page has loaded.</p></div>\n"
            f"{spec}</div>\n"
        )
        if meta.get("more"):
            block += f'<p class="more">{prose(meta["more"])}</p>\n'
        if caption:
            block += f"<figcaption>{prose(caption)}</figcaption>\n"
        block += '<div class="tools"><button class="keep" type="button" hidden>Save as PNG</button></div>\n'
        if rows:
            inner = markup.table(rows, columns or list(rows[0]), "", sortable=True)
            block += f"<details><summary>The numbers</summary>\n{inner}\n</details>\n"
        return self._add(block + "</figure>")

    def drawing(self, block: str, *, style: str = "", script: str = "") -> Self:
        """A block of HTML of ours, which draws itself: in it nothing is escaped.

        Args:
            block: HTML; data for the script stands in it as a `data_block`.
            style: A style sheet behind that of the page.
            script: Runs behind all blocks.
        """
        self._style += style
        self._scripts += [script] if script else []
        return self._add(block)

    def render(self) -> str:
        """The whole page as one string of HTML, to be written as UTF-8."""
        script = _asset("page.js")
        sources = [script, *self._scripts]
        blocks = "\n".join(self._blocks) + ("\n</section>" if self._sections else "")
        tail = "\n".join(f"<script>{source}</script>" for source in sources)
        if self._figures:
            packed, bundle, notice = _plotly()
            sources.append(bundle)
            look = _json({"template": theme.template(), "dark": theme.to_dark()})
            tail = (
                f'<script type="application/json" id="look">{look}</script>\n<!-- {notice} -->\n'
                f'<script type="application/octet-stream" id="plotly">{packed}</script>\n{tail}'
            )
        hashes = " ".join(f"'sha256-{_sha256(source)}'" for source in sources)
        policy = (
            f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
            f"base-uri 'none'; form-action 'none'"
        )
        lead = markup.paragraphs(self._lead, "lead")
        footer = f'<footer class="foot">{markup.paragraphs(self._footer)}</footer>\n' if self._footer else ""
        noscript = "<noscript><p>The pictures need JavaScript; text and tables do not.</p></noscript>\n"
        return (
            f'<!doctype html>\n<html lang="{escape(self._language)}">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta name="generator" content="lapis">\n<meta name="color-scheme" content="light dark">\n'
            f'<meta name="referrer" content="no-referrer">\n'
            f'<title>{escape(self.title)}</title>\n<link rel="icon" href="data:,">\n'
            f"<style>{_styles()}{self._style}</style>\n</head>\n"
            f'<body>\n<header class="top">\n<h1>{prose(self.title)}</h1>\n{lead}\n{self._contents()}'
            f"{noscript if self._figures or self._scripts else ''}</header>\n"
            f"<main>\n{blocks}\n</main>\n{footer}{tail}\n</body>\n</html>\n"
        )

    def _add(self, block: str) -> Self:
        if block:
            self._blocks.append(block)
        return self

    def _level(self) -> int:
        """The level of a heading inside the current block: headings are never skipped."""
        return 3 if self._sections else 2

    def _contents(self) -> str:
        if len(self._sections) < 3:
            return ""
        items = "\n".join(f'<li><a href="#s{i}">{prose(title)}</a></li>' for i, title in enumerate(self._sections, 1))
        return f'<nav aria-label="On this page"><ol>\n{items}\n</ol></nav>\n'


def split_title(figure: go.Figure | Mapping[str, Any]) -> tuple[str, list[Any], dict[str, Any]]:
    """The title of a plotly figure, its data, and its layout without title and template.

    Args:
        figure: Or the object of its JSON. One of theme.new_figure loses the room that the title took.
    """
    spec: dict[str, Any] = (
        json.loads(figure.to_json(engine="json")) if hasattr(figure, "to_json") else copy.deepcopy(dict(figure))
    )
    layout = dict(spec.get("layout", {}))
    layout.pop("template", None)
    meta = layout.get("meta") or {}
    title = meta.get("title", "") or (layout.get("title") or {}).get("text", "")
    layout.pop("title", None)
    if "title" in meta:
        layout["margin"] = {**layout["margin"], "t": layout["margin"]["t"] - theme.TITLE}
        layout["height"] -= theme.TITLE
        if "height" in meta["narrow"]:
            meta["narrow"]["height"] -= theme.TITLE
    return title, spec.get("data", []), layout


def data_block(value: Any, name: str = "") -> str:
    """The data of a figure as a script element that runs nothing; `name` is its id."""
    mark = f' id="{name}"' if name else ""
    return f'<script type="application/json"{mark}>{_json(value)}</script>'


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return files("lapis.report").joinpath(name).read_text(encoding="utf-8")


def variables(more: Mapping[str, tuple[str, str]] | None = None) -> str:
    """The fonts, and the colors of theme.py, as variables of a style sheet: light ones, and dark ones on a dark screen.

    Args:
        more: Further colors: name -> (light, dark).
    """
    colors = {**theme.COLORS, **(more or {})}
    fonts = f"--sans:{theme.SANS};--serif:{SERIF};--mono:{MONO};"
    light, dark = ("".join(f"--{role}:{pair[mode]};" for role, pair in colors.items()) for mode in (0, 1))
    return f":root{{{fonts}{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"


def _styles() -> str:
    """The style sheet, with its variables."""
    return variables() + _asset("page.css")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _plotly() -> tuple[str, str, str]:
    """plotly.js as (deflated and base64, source, its copyright notice); from the installed package, never the web."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    packed = base64.b64encode(zlib.compress(source.encode(), 9)).decode()
    comment = source[source.index("/*") + 2 : source.index("*/")]
    notice = "; ".join(line.strip(" *") for line in comment.splitlines() if line.strip(" *"))
    return packed, source, notice.replace("--", "- -")
