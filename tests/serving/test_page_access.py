"""Who can use the chat page: by keyboard, by ear, in five languages, on a narrow screen, in the dark, with a key."""

import json
import re
from pathlib import Path

import httpx
import pytest

import lapis
from lapis.report import theme

from .conftest import make_folder
from .pages import LONG, visiting

FOLDER = Path(lapis.__file__).parent / "serving" / "page"
LANGUAGES = ("en", "ms", "ko", "uk", "zh")

FAULTS = Path(__file__).with_name("page_faults.js").read_text(encoding="utf-8")


def words(code: str) -> dict[str, str]:
    """A language file, which is JSON behind its first sentence."""
    text = (FOLDER / "languages" / f"{code}.js").read_text(encoding="utf-8")
    comment, _, body = text.partition("export default ")
    assert comment.startswith("// ") and body.endswith("};\n")
    return json.loads(body.rstrip(";\n"))


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_language_has_the_same_words(code):
    english, other = words("en"), words(code)
    assert list(other) == list(english)
    for name, text in other.items():
        assert text.strip(), name
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", english[name])), name


def test_the_page_uses_exactly_the_words_that_there_are():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js"))
    used = set(re.findall(r'\bt\(\s*"(\w+)"', sources)) | set(re.findall(r'data-(?:text|label|hint)="(\w+)"', html()))
    kinds = ("unreachable", "key", "busy", "missing", "large", "refused", "broken", "failed")
    used |= {f"error_{kind}" for kind in kinds}
    assert used <= set(words("en")), used - set(words("en"))
    unused = set(words("en")) - used - set(re.findall(r'"(\w+)"', sources))  # a name may be chosen before it is used
    assert not unused


def html() -> str:
    return (FOLDER / "index.html").read_text(encoding="utf-8")


def test_no_script_or_style_stands_in_the_page():
    assert not re.search(r"<style|style=|<script(?! type=\"module\" src=\"page/)| on\w+=|javascript:|https?://", html())
    for path in [*FOLDER.glob("*.js"), *FOLDER.glob("*.css")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://|@import", text
        ), path


def test_every_module_opens_with_a_sentence():
    for path in FOLDER.rglob("*.js"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert re.match(r"// [A-Z]", first) and path.stat().st_size < 20_000, path


def test_the_files_come_under_a_policy_and_nothing_else_does(server):
    answer = httpx.get(f"{server.url}/")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(f"{server.url}/page/languages/ko.js").headers["content-type"].startswith("text/javascript")
    colors = httpx.get(f"{server.url}/page/colors.css").text
    assert f"--lapis:{theme.COLORS['lapis'][0]};" in colors and f"--amber-3:{theme.AMBERS[3][1]};" in colors
    for name in ("../pages.py", "..%2fpages.py", "languages", "page.py", "%2e%2e/pages.py"):
        assert httpx.get(f"{server.url}/page/{name}").status_code == 404


@pytest.fixture(scope="module")
def pair(start, tmp_path_factory):
    """A server of two models, one with a very long name."""
    root = tmp_path_factory.mktemp("pair")
    folders = [make_folder(root / "base", context=1024), make_folder(root / LONG[:200], seed=1, context=1024)]
    with start(*folders, "--dtype", "float32", "--rows", "4") as server:
        yield server


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (400, "light"), (400, "dark"), (1280, "light")])
def test_nothing_is_hard_to_read_unnamed_or_too_wide(browser, pair, width, scheme):
    with visiting(browser, pair.url, width, color_scheme=scheme, locale="uk-UA") as visitor:
        assert visitor.page.evaluate(FAULTS) == []
        visitor.set(temperature=1.4, seed=3, longest=40)
        assert visitor.page.evaluate(FAULTS) == []
        visitor.talk(f"{LONG} \n```\n{LONG}\n```")
        for reply in range(2):
            place = visitor.look(reply)
            place.locator("[role=option]").nth(3).click()
            place.locator(".lens-line button").click()
            place.locator(".lens table").wait_for()
        shades = {name for shade in range(5) for name in [f"shade-{shade}"] if visitor.page.locator(f".{name}").count()}
        assert len(shades) == 5
        assert visitor.page.evaluate(FAULTS) == []
        assert visitor.page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.browser
def test_everything_can_be_done_by_keyboard(browser, pair):
    with visiting(browser, pair.url) as visitor:
        page = visitor.page

        def tab_to(selector: str, back: bool = False) -> None:
            for _ in range(60):
                if page.evaluate("s => document.activeElement.matches(s)", selector):
                    return
                page.keyboard.press("Shift+Tab" if back else "Tab")
            raise AssertionError(f"Tab does not lead to {selector}")

        assert page.evaluate("document.activeElement.id") == "message"
        tab_to("#longest", back=True)
        page.keyboard.press("Control+A")
        page.keyboard.type("25")
        tab_to("#message")
        page.keyboard.type("the cat")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("sat")
        page.keyboard.press("Enter")
        visitor.settle()
        assert visitor.turn().locator(".prompt").text_content() == "the cat\nsat"
        tab_to("[data-name=look]", back=True)
        page.keyboard.press("Enter")
        tab_to("[role=option]", back=True)
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        chosen = page.locator(".chosen").inner_text()
        assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
        page.keyboard.press("ArrowLeft")
        assert page.locator(".chosen").inner_text() != chosen
        page.keyboard.press("End")
        page.keyboard.press("Home")
        assert " 1 " in page.locator(".chosen").inner_text()
        tab_to(".lens-line button")
        page.keyboard.press("Enter")
        page.locator(".lens table").wait_for()
        page.evaluate("document.activeElement.blur()")
        page.evaluate("scrollTo(0, 0)")
        page.keyboard.press("Tab")


@pytest.mark.browser
def test_enter_that_ends_a_composition_sends_nothing(browser, pair):
    with visiting(browser, pair.url) as visitor:
        visitor.page.fill("#message", "고양")
        visitor.page.evaluate(
            "document.getElementById('message').dispatchEvent("
            "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true }))"
        )
        assert visitor.page.locator("article").count() == 0 and visitor.page.input_value("#message") == "고양"


@pytest.mark.browser
def test_a_reply_is_announced_once_and_as_a_whole(browser, pair):
    with visiting(browser, pair.url, locale="en-US") as visitor:
        visitor.page.select_option("#second", "")
        visitor.set(temperature=1, seed=5, longest=60)
        visitor.page.evaluate(
            "window.heard = []; new MutationObserver(changes => changes.forEach(change => "
            "change.addedNodes.forEach(node => heard.push(node.textContent))))"
            ".observe(document.getElementById('announcer'), { childList: true, subtree: true, characterData: true })"
        )
        visitor.talk("the cat")
        body = {"model": "base", "messages": [{"role": "user", "content": "the cat"}], "temperature": 1, "seed": 5,
                "max_tokens": 60}  # fmt: skip
        reply = httpx.post(f"{pair.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
        assert visitor.page.evaluate("heard") == ["base is writing", f"base replied: {reply['message']['content']}"]
        live = visitor.page.locator("[aria-live=polite], [role=log]")
        assert live.count() == 1 and visitor.page.locator("#conversation [aria-live]").count() == 0


@pytest.mark.browser
def test_the_language_is_the_browsers_and_can_be_changed(browser, pair):
    with visiting(browser, pair.url, locale="ko-KR") as visitor:
        page = visitor.page
        assert page.locator("html").get_attribute("lang") == "ko" and page.locator("#send").inner_text() == "보내기"
        visitor.set(longest=8)
        visitor.talk("the cat")
        page.select_option("#language", "ms")
        page.locator("#send", has_text="Hantar").wait_for()
        assert page.locator("[data-name=copy]").first.inner_text() == "Salin"
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.title() == words("ms")["title"]
    for locale, code in (("fr-FR", "en"), ("zh-TW", "zh-Hans"), ("uk", "uk")):
        with visiting(browser, pair.url, locale=locale) as visitor:
            assert visitor.page.locator("html").get_attribute("lang") == code


@pytest.mark.browser
def test_no_other_origin_can_be_reached(browser, pair):
    with visiting(browser, pair.url) as visitor:
        blocked = visitor.page.evaluate(
            "() => new Promise(resolve => { addEventListener('securitypolicyviolation', event => "
            "resolve(event.effectiveDirective)); fetch('http://127.0.0.1:9/').catch(() => {}); })"
        )
        assert blocked == "connect-src"
        assert visitor.complaints and all("Content Security Policy" in text or "127.0.0.1:9" in text
                                          for text in visitor.complaints)  # fmt: skip
        visitor.complaints.clear()


@pytest.mark.browser
def test_a_key_is_asked_for_and_what_is_wrong_is_told(browser, start, folder):
    with (
        start(folder, "--dtype", "float32", "--api-key-env", "LAPIS_TEST_KEY", LAPIS_TEST_KEY="open sesame") as server,
        visiting(browser, server.url, locale="en-US") as visitor,
    ):
        page = visitor.page
        assert page.locator("#key-form").is_visible() and page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.locator("#notice", has_text="does not take this key").wait_for()
        page.fill("#key", "open sesame")
        page.keyboard.press("Enter")
        page.locator("#key-form").wait_for(state="hidden")
        visitor.set(longest=8)
        visitor.talk("the cat")
        assert visitor.texts()[0].strip() or visitor.turn().locator("[data-name=look]").count()
        stored = page.evaluate("JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie])")
        assert "sesame" not in stored and page.input_value("#key") == ""
        visitor.set(longest=99999)
        visitor.talk(f"the dog {'the cat ' * 400}")
        assert "The server refused this. It says: " in visitor.turn().inner_text()
        assert "tokens" in visitor.turn().locator(".failed").inner_text()
        server.stop()
        visitor.talk("the bird")
        assert "The server does not answer. Is lapis serve still running?" in visitor.turn().inner_text()
        visitor.turn().locator("[data-name=retry]").wait_for()
        visitor.complaints[:] = [text for text in visitor.complaints if "Failed to load resource" not in text]


@pytest.mark.browser
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"status": 429, "headers": {"Retry-After": "7"}, "json": {"error": {"message": "64 requests are waiting"}}},
         "too much to do at the moment. Try again in 7 s. It says: 64 requests are waiting"),
        ({"status": 413, "json": {"error": {"message": "the body"}}}, "too large for the server"),
        ({"status": 502, "body": "<html>bad gateway</html>"}, "could not finish this."),
        ({"status": 200, "body": 'data: {"choices": [{"delta": {"content": "half a"}}]}\n\ndata: {"choi'}, "broke off"),
        ({"status": 200, "body": 'data: {"choices": [{"delta": {"content": "half a"}}]}\n\n'}, "broke off"),
        ({"status": 200, "body": 'data: {"choices": [{"delta": {"content": "half a"}}]}\r\n\r\n'
                                 'data: {"error": {"message": "the model failed"}}\n\ndata: [DONE]\n\n'},
         "could not finish this. It says: the model failed"),
    ],
)  # fmt: skip
def test_what_goes_wrong_on_the_way_is_told(browser, pair, answer, told):
    with visiting(browser, pair.url, locale="en-US") as visitor:
        visitor.page.select_option("#second", "")
        visitor.page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))
        visitor.talk("the cat")
        assert told in visitor.turn().locator(".failed").inner_text()
        assert visitor.texts()[0].strip() == ("half a" if answer["status"] == 200 else "")
        assert "bad gateway" not in visitor.page.locator("body").inner_text()
        visitor.page.unroute("**/v1/chat/completions")
        visitor.set(longest=8)
        visitor.turn().locator("[data-name=retry]").click()
        visitor.settle()
        assert visitor.turn().locator(".failed").count() == 0
        visitor.complaints[:] = [text for text in visitor.complaints if "Failed to load resource" not in text]
