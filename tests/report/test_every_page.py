"""Every page that lapis writes, in a real browser: drawn wide and narrow, light and dark, and each picture answers."""

import pytest

from .conftest import lapis

pytestmark = pytest.mark.browser

PAGES = ["beside", "causal", "classify", "diff", "inspect", "lens", "lineage", "mixers", "plan", "report"]
WAYS = ((1280, "light"), (400, "dark"))

# Where on the screen a trace of a picture has something to say
PLACES = """plot => plot._fullData.map((trace, i) => {
  if (trace.hoverinfo === "skip" || trace.mode === "text" || trace.visible !== true) return null;
  const box = plot.getBoundingClientRect();
  if (trace.type === "treemap") return [box.left + box.width / 2, box.top + plot._fullLayout.height * 0.6];
  const axis = name => plot._fullLayout[name.replace(/^(.)/, "$1axis")];
  const [xaxis, yaxis] = [axis(trace.xaxis || "x"), axis(trace.yaxis || "y")];
  const middle = values => values[Math.floor((values.length - 1) / 2)];
  const [x, y] = [middle(trace.x), middle(trace.y)];
  if (x === undefined || y === null) return null;
  return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
}).filter(place => place !== null)"""


@pytest.fixture(scope="module")
def pages(studio) -> dict[str, str]:
    """Name -> address of a page."""
    lapis("report", str(studio / "work"), "--out", str(studio / "report.html"), "--json")
    return {path.stem: path.as_uri() for path in sorted(studio.glob("*.html"))}


@pytest.mark.parametrize("name", PAGES)
def test_it_draws_and_answers(name, pages, browser, broken_options):
    for width, scheme in WAYS:
        complaints: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.on("console", lambda message, messages=complaints: messages.append(message.text))
        page.on("pageerror", lambda error, messages=complaints: messages.append(str(error)))
        page.goto(pages[name])
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        plots = page.locator(".plot")
        assert plots.count() == page.locator(f".plot[data-drawn={scheme}]").count() > 0
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(broken_options) == []
        for i in range(plots.count() if width == 1280 else 0):
            plot = plots.nth(i)
            plot.evaluate("plot => plot.scrollIntoView({block: 'center', behavior: 'instant'})")
            x, y = plot.evaluate(PLACES)[0]
            page.mouse.move(x - 3, y - 3)
            page.mouse.move(x, y)
            plot.locator(".hoverlayer .hovertext").first.wait_for(timeout=5_000)
            page.mouse.move(2, 2)
        context.close()
        assert complaints == []
