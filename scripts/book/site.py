"""Chapters and their outputs -> Markdown pages, and of these a site for each language (mkdocs-material).

English lies at the root of the site, the others beside it (ms/, zh/, ...), with the same page names, so that a reader
stays on the page when the language changes. A chapter without translation is shown in English and says so. Nothing is
asked of another host: no web fonts, the search works from a folder, figures share one plotly.js.
"""

import html
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import yaml
from mkdocs.commands.build import build as build_site
from mkdocs.config import load_config

from lapis.report import theme
from lapis.report.page import MONO, data_block, split_title
from scripts.book.chapters import LANGUAGES, Book, Cell, Chapter
from scripts.book.notebooks import Outputs, Shown, make_notebook, relink, shown

HERE = Path(__file__).parent
ASSETS = HERE / "assets"
# what mkdocs-material calls the colors -> the role that they have in every picture and page of lapis
ROLES = {
    "accent-fg-color": "orange",
    "typeset-a-color": "lapis",
    "default-bg-color": "paper",
    "default-fg-color": "ink",
    "default-fg-color--light": "quiet",
    "default-fg-color--lighter": "shade",
    "default-fg-color--lightest": "rule",
    "code-bg-color": "wash",
    "code-fg-color": "ink",
    "footer-bg-color": "wash",
    "footer-bg-color--dark": "wash",
    "footer-fg-color": "ink",
    "footer-fg-color--light": "quiet",
    "footer-fg-color--lighter": "quiet",
}
EXTENSIONS = ["tables", "toc", "pymdownx.superfences", "pymdownx.highlight"]
FEATURES = ["navigation.sections", "navigation.footer", "navigation.top", "toc.integrate", "content.code.copy"]


def build(book: Book, outputs: dict[str, Outputs], out: Path) -> Path:
    """Writes notebooks/<language>/, pages/<language>/ and site/ into a folder, in place of what is there.

    Args:
        book: Which chapters.
        outputs: Of `run_chapters`.
        out: The folder, made if it is not there.

    Returns:
        The first page.
    """
    out = out.resolve()
    for name in ("notebooks", "pages", "site"):
        shutil.rmtree(out / name, ignore_errors=True)
    for language in LANGUAGES:
        _write_sources(book, outputs, language, out)
    logging.getLogger("mkdocs").setLevel(logging.WARNING)
    for language in LANGUAGES:  # English first: a build empties its folder
        config = out / "pages" / f"{language}.yml"
        config.write_text(yaml.safe_dump(settings(book, language, out), allow_unicode=True), encoding="utf-8")
        build_site(load_config(str(config)))
    return out / "site" / "index.html"


def page(book: Book, chapter: Chapter, language: str, outputs: Outputs) -> str:
    """The page of a chapter, as Markdown."""
    prose = chapter.prose(language)
    parts = [f"# {chapter.titles[language]}"]
    if prose.language != language:
        parts.append(f"*{book.words['untranslated'][language]}*")
    for block in prose.blocks:
        if isinstance(block, Cell):
            parts.append(_fenced(chapter.cells[block.name], "python"))
            parts += _results(shown(outputs[block.name]), book.words["figure"][language])
        else:
            parts.append(relink(block, chapter, "md"))
    parts.append(f"[{book.words['notebook'][language]}]({chapter.folder.name}.ipynb)")
    return "\n\n".join(parts) + "\n"


def settings(book: Book, language: str, out: Path) -> dict[str, Any]:
    """What mkdocs.yml would hold for the site of one language."""
    nav: list[Any] = [{book.words["home"][language]: "index.md"}]
    for part in book.parts:
        pages = [{chapter.titles[language]: f"{chapter.path}.md"} for chapter in part.chapters]
        nav.append({part.titles[language]: pages})
    sun, moon = ({"scheme": scheme, "primary": "custom", "accent": "custom", "media": f"(prefers-color-scheme: {mode})",
                  "toggle": {"icon": icon, "name": mode}}
                 for scheme, mode, icon in (("default", "light", "material/weather-sunny"),
                                            ("slate", "dark", "material/weather-night")))  # fmt: skip
    up = "" if language == "en" else "../"
    return {
        "site_name": book.titles[language],
        "docs_dir": str(out / "pages" / language),
        "site_dir": str(out / "site" / ("" if language == "en" else language)),
        "theme": {"name": "material", "custom_dir": str(HERE / "theme"), "language": language, "font": False,
                  "features": FEATURES, "palette": [sun, moon], "icon": {"logo": "material/layers-triple"}},
        "plugins": ["search", "offline"],
        "markdown_extensions": EXTENSIONS,
        "nav": nav,
        "extra_css": ["assets/book.css"],
        "extra_javascript": ["assets/figures.js"],
        "extra": {
            "generator": False,
            "polyfills": ["assets/iframe-worker.js"],
            "up": up,
            "look": json.dumps({"template": theme.template(), "dark": theme.to_dark()}),
            "alternate": True,  # a list would make pages read a sitemap for each entry, which fails in a folder
            "languages": [{"name": name, "lang": code, "link": up + ("" if code == "en" else f"{code}/")}
                          for code, name in LANGUAGES.items()],
        },
    }  # fmt: skip


def _write_sources(book: Book, outputs: dict[str, Outputs], language: str, out: Path) -> None:
    """The Markdown, the notebooks and the assets of one language."""
    pages, notebooks = out / "pages" / language, out / "notebooks" / language
    for chapter in book.chapters:
        for folder in (pages, notebooks):
            (folder / chapter.path).parent.mkdir(parents=True, exist_ok=True)
        text = page(book, chapter, language, outputs[chapter.path])
        pages.joinpath(f"{chapter.path}.md").write_text(text, encoding="utf-8")
        notebook = make_notebook(book, chapter, chapter.prose(language), language, outputs[chapter.path])
        for folder in (pages, notebooks):
            nbformat.write(notebook, folder / f"{chapter.path}.ipynb")
    text = book.opening(language)
    pages.joinpath("index.md").write_text(f"# {book.titles[language]}\n\n{text}", encoding="utf-8")
    shutil.copytree(ASSETS, pages / "assets")
    style = pages / "assets" / "book.css"
    style.write_text(_colors() + style.read_text(encoding="utf-8"), encoding="utf-8")
    if language == "en":
        from plotly.offline import get_plotlyjs

        (pages / "assets" / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")


def _fenced(text: str, *classes: str) -> str:
    """A block of code; its fence is longer than any that stands in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence} {{ {' '.join('.' + name for name in classes)} }}\n{text}\n{fence}"


def _results(cell: Shown, label: str) -> list[str]:
    blocks = [_fenced(cell.text, "text", "output")] if cell.text else []
    for figure in cell.figures:
        title, data, layout = split_title(figure)
        words = html.escape(title or label)
        blocks.append(
            f'<figure><figcaption>{words}</figcaption><div class="plot" role="img" aria-label="{words}" '
            f'style="min-height:{int(layout.setdefault("height", 400))}px">'
            f"{data_block({'data': data, 'layout': layout})}</div></figure>"
        )
    return blocks


def _colors() -> str:
    """The fonts and colors of lapis as variables of mkdocs-material; the header is the same in both modes."""
    rules = [f":root{{--md-code-font:{MONO};--md-text-font:{theme.SANS}}}"]
    for mode, scheme in enumerate(("default", "slate")):
        values = {f"--md-{name}": theme.COLORS[role][mode] for name, role in ROLES.items()}
        values |= {"--md-primary-fg-color": theme.color("lapis"), "--md-primary-bg-color": theme.color("paper")}
        rules.append(f'[data-md-color-scheme="{scheme}"]{{' + ";".join(f"{k}:{v}" for k, v in values.items()) + "}")
    return "\n".join(rules) + "\n"
