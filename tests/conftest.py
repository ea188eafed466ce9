"""Shared fixtures. Everything is made here; nothing is fetched. Real text is read in place where LAPIS_DATA has it."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # xdist fills the cores; also what makes sums repeat bit for bit
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored by what runs in their background

settings.register_profile("lapis", deadline=None)  # how long a case takes says how busy the machine is
settings.load_profile("lapis")

ROOT = Path(__file__).parents[1]
CHROMIUM = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
BROKEN_OPTIONS = """() => {
  const broken = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), range = new Range();
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (node.parentElement.closest("script, style")) continue;
    for (const match of node.data.matchAll(/--[a-z][a-z-]*/g)) {
      range.setStart(node, match.index);
      range.setEnd(node, match.index + match[0].length);
      if (new Set([...range.getClientRects()].map(box => box.top)).size > 1) broken.push(match[0]);
    }
  }
  return broken;
}"""


@pytest.fixture(scope="session", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests and their processes write elsewhere goes with the folders of the tests, killed or not."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("beside")
        patch.setenv("TMPDIR", str(place))
        patch.setattr(tempfile, "tempdir", str(place))
        yield
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real text; tests that use it carry the marker `real_data`."""
    place = Path(os.environ.get("LAPIS_DATA", ROOT.parent / "shared" / "data"))
    if not place.is_dir():
        pytest.skip(f"no real text at {place}; set LAPIS_DATA")
    return place


@pytest.fixture(scope="session")
def chromium() -> str:
    """A headless browser; tests that use it carry the marker `browser`."""
    result = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not result:
        pytest.skip("no chromium on this machine")
    return result


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """Chromium, driven by playwright."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'lapis[dev]'")
    with sync.sync_playwright() as play:
        environment = {**os.environ, "LANG": "C.UTF-8"}
        browser = play.chromium.launch(executable_path=chromium, args=CHROMIUM, env=environment)
        yield browser
        browser.close()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run(*arguments) -> exit status, standard output, standard error; in this process, which has torch already."""
    from lapis.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        status: Any = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code or 0
        return int(status), *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def broken_options() -> str:
    """JavaScript that lists the names of options in the text of a page inside which a line breaks."""
    return BROKEN_OPTIONS


@pytest.fixture
def check_narrow(browser: Any) -> Iterator[Callable[..., None]]:
    """check_narrow(html) -> nothing is wider than the screen, and no line breaks inside the name of an option."""
    context = browser.new_context()

    def check(html: str, widths: tuple[int, ...] = (1280, 400)) -> None:
        page = context.new_page()
        for width in widths:
            page.set_viewport_size({"width": width, "height": 900})
            page.set_content(html)
            if 'id="plotly"' in html:
                page.wait_for_selector("html[data-ready]", timeout=60_000)  # its pictures are drawn
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate(BROKEN_OPTIONS) == []
        page.close()

    yield check
    context.close()
