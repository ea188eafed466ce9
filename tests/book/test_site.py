"""The site of the book in a browser, from a folder: no request, search, figures, languages, narrow screens."""

import re

import pytest

from scripts.book.chapters import LANGUAGES, read_book

PAGE = "build/04-attention.html"  # it has figures


@pytest.fixture
def visit(browser, book_folder):
    """visit(place, width, scheme) -> an opened page; at the end nothing may have been asked for or complained of."""
    contexts, complaints = [], []

    def open_page(place=PAGE, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda ask: complaints.append(ask.url) if not ask.url.startswith(("file:", "blob:", "data:")) else None,
        )
        page.goto((book_folder / "site" / place).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def test_no_page_names_another_host_for_what_it_loads(book_folder):
    pages = sorted((book_folder / "site").rglob("*.html"))
    assert len(pages) >= len(LANGUAGES) * (1 + len(read_book().chapters))
    loaded = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    assert not [f"{page}: {tag}" for page in pages for tag in loaded.findall(page.read_text(encoding="utf-8"))]
    styles = [style.read_text(encoding="utf-8") for style in (book_folder / "site").rglob("*.css")]
    assert styles and not [style for style in styles if re.search(r"url\([\"']?(?:https?:)?//|@import", style)]


@pytest.mark.browser
def test_figures_are_drawn_in_the_colors_of_the_page(visit):
    page = visit()
    page.wait_for_selector("div.plot[data-drawn=light] svg", timeout=60_000)
    page.locator("form[data-md-component=palette] label:not([hidden])").click()
    page.wait_for_selector("body[data-md-color-scheme=slate] div.plot[data-drawn=dark] svg", timeout=60_000)
    page = visit(scheme="dark")
    page.wait_for_selector("div.plot[data-drawn=dark] svg", timeout=60_000)


@pytest.mark.browser
@pytest.mark.parametrize("place", ["index.html", PAGE, f"zh/{PAGE}"])
def test_nothing_runs_out_of_a_narrow_screen(visit, place):
    page = visit(place, width=400)
    if "attention" in place:
        page.wait_for_selector("div.plot[data-drawn] svg", timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.browser
def test_the_search_finds_a_chapter_in_a_folder(visit):
    page = visit("index.html")
    page.locator("input.md-search__input").click()
    page.locator("input.md-search__input").press_sequentially("softmax", delay=20)
    page.wait_for_selector("a.md-search-result__link[href*='04-attention']", timeout=60_000)


@pytest.mark.browser
def test_a_reader_stays_on_the_page_when_the_language_changes(visit):
    page = visit()
    for code, name in LANGUAGES.items():
        page.locator(f"a.md-select__link[hreflang={code}]").evaluate("link => link.click()")
        page.wait_for_url(f"**/{PAGE}" if code == "en" else f"**/{code}/{PAGE}")
        assert page.locator("html").get_attribute("lang") == code
        assert name in page.locator("ul.md-select__list").inner_text() or page.locator("h1").count() == 1
        titles = next(c.titles for c in read_book().chapters if f"{c.path}.html" == PAGE)
        assert page.locator("h1").inner_text().strip("¶ ") == titles[code]
