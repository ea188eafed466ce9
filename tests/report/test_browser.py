"""The page in a real browser: nothing on the console, nothing asked of the network, no sideways scrolling, hovering."""

import pytest

from lapis.report import Column, Page, plots

pytestmark = pytest.mark.browser

LONG = "a-word-without-any-place-to-break-" * 8


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A page with every kind of block, some of them as wide as they come."""
    diff = [
        {"layer": layer, "component": part, "cosine": 1 - 0.01 * (layer + 1), "relative_norm": 0.1}
        for layer in range(24)
        for part in ("attn.q", "mlp.down")
    ]
    lens = [
        {"layer": i, "position": p, "token": "<b>t", "top": [("<script>alert(1)</script>", 0.1 * i)]}
        for i in range(10)
        for p in range(20)
    ]
    curves = [{"run": run, "tokens": 1000 * i, "loss": 3 - i / 99} for run in ("base", "chat") for i in range(90)]
    scores = [{"model": m, "language": g, "nll": 2.0} for m in ("base", "grafted") for g in ("English", "Malay")]
    columns = [Column("name"), *(Column(f"c{i}", f"a rather long heading {i}", ".3f") for i in range(12))]
    table = [{"name": f"row {i}", **{f"c{j}": (i * 7 + j) % 5 / 3 for j in range(12)}} for i in range(4)]
    page = Page(LONG, LONG).section("Pictures " + LONG, LONG)
    page.figure(plots.layer_heatmap(diff, "Heat"), rows=diff).figure(plots.learning_curves(curves, "Curves"))
    page.figure(plots.lens_grid(lens, "Lens")).figure(plots.scores(scores, "Scores", metric="nll"))
    page.table(table, columns, "A wide table", sortable=True).samples([LONG]).stats([(LONG, LONG, LONG)])
    page.replies([{"prompt": LONG, "replies": dict.fromkeys(("adapted", "chat", "grafted", "tuned"), LONG)}])
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page.render(), encoding="utf-8")
    return file


@pytest.fixture
def visit(browser, page_file):
    """visit(width, scheme) -> an opened page; at the end nothing may have been asked for or complained of."""
    contexts, complaints = [], []

    def open_page(width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
        page.on(
            "request",
            lambda ask: complaints.append(ask.url) if not ask.url.startswith(("file:", "blob:", "data:")) else None,
        )
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def drawn(page, mode):
    """Wait until all four pictures are drawn in that mode (the page's policy forbids wait_for_function's eval)."""
    page.locator(f".plot[data-drawn={mode}]").nth(3).wait_for()


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("width", [1280, 400])
def test_draws_without_complaint_and_without_sideways_scrolling(visit, width):
    page = visit(width)
    assert page.locator(".plot .main-svg").count() >= 4
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator("details").first.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_hovering_tells_the_number(visit):
    page = visit()
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 55)
    page.mouse.move(box["x"] + 202, box["y"] + 57)
    page.wait_for_selector(".hoverlayer .hovertext")
    assert "attn.q" in page.locator(".hoverlayer .hovertext").first.text_content()


def test_follows_the_color_scheme_and_prints_in_light(visit):
    page = visit(scheme="dark")
    assert background(page) == "rgb(21, 23, 28)"
    drawn(page, "dark")
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    dark = page.evaluate(ink)
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    drawn(page, "light")
    assert page.evaluate(ink) != dark
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    drawn(page, "dark")
    page.emulate_media(color_scheme="light")
    drawn(page, "light")


def test_redraws_when_the_window_narrows(visit):
    page = visit()
    tall = page.locator(".plot").first.bounding_box()["height"]
    page.set_viewport_size({"width": 400, "height": 900})
    page.locator(".plot[data-room='368']").nth(3).wait_for()
    assert page.locator(".plot").first.bounding_box()["height"] > tall  # its panels now stand on each other
    assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_tables_sort_and_pictures_are_saved(visit):
    page = visit()
    table = page.locator("table:visible")
    table.locator("button.sort").nth(1).click()
    shown = [float(text) for text in table.locator("tbody tr td:nth-child(2)").all_text_contents()]
    assert shown == sorted(shown, reverse=True)
    table.locator("button.sort").nth(1).click()
    assert [float(t) for t in table.locator("tbody tr td:nth-child(2)").all_text_contents()] == sorted(shown)
    page.locator("figure").nth(1).hover()
    with page.expect_download() as download:
        page.locator("button.keep").nth(1).click()
    assert download.value.suggested_filename == "curves.png"


def test_no_line_breaks_inside_the_name_of_an_option(check_narrow):
    words = "give a model with `--tuned`, or `lapis card runs/ms --replay-chats FILE --base-model owner/name`, or"
    text = " ".join(f"{'x' * n} {words} {'y' * n}" for n in range(1, 40)) + " lapis card --tuned"
    page = Page("Options `--tuned`", text, footer=text).section(text, text).stats([(text, "1", text)])
    page.table([{"option --replay-choices": text}], ["option --replay-choices"], text, caption=text)
    check_narrow(page.render(), (1280, *range(400, 320, -9)))
