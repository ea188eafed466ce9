"""A model without a chat template on the chat page: it goes on with text, and the page says so."""

import json

import httpx
import pytest

import lapis
from lapis.inside.lens.options import LensOptions
from lapis.inside.prompt import token_word

from .conftest import make_folder
from .pages import visiting

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder without a chat template."""
    folder = make_folder(tmp_path_factory.mktemp("completions") / "plain", context=1024)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def both(start, plain):
    """A server of a model without and one with a template."""
    chats = make_folder(plain.parent / "chats", seed=1, context=1024)
    with start(plain, chats, "--dtype", "float32") as server:
        yield server


@pytest.fixture
def visitor(browser, both):
    with visiting(browser, both.url) as opened:
        opened.set(temperature=1, seed=5, longest=12)
        yield opened


def goes_on(server, prompt: str, **fields) -> dict:
    body = {"model": "plain", "prompt": prompt, "temperature": 1, "seed": 5, "max_tokens": 12, "logprobs": 5, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]


def test_who_chats_comes_first_and_the_other_is_explained(visitor):
    page = visitor.page
    assert page.input_value("#first") == "chats" and page.input_value("#second") == "plain"
    assert page.locator("#second option").all_text_contents() == ["None", "plain (goes on with text)"]
    note = page.locator("#completes-note")
    assert note.inner_text().startswith("plain: no chat template, so it goes on with your text as it stands.")
    page.select_option("#second", "")
    assert note.is_hidden()
    page.select_option("#first", "plain")
    page.select_option("#language", "ms")
    page.locator("html[lang=ms]").wait_for()
    assert note.inner_text().startswith("plain: tiada templat sembang")


def test_a_turn_is_gone_on_with_as_text(visitor, both):
    """Neither the template's tokens, the system prompt nor what was said before."""
    visitor.set(system="be brief")
    visitor.talk("the cat")
    visitor.talk("and the dog")
    names = visitor.turn().locator(".who").all_text_contents()
    assert names == ["chats", "plain"]
    for turn, text in ((0, "the cat"), (1, "and the dog")):
        assert visitor.texts(turn)[1].strip() == goes_on(both, text)["text"].strip()


def test_its_inside_is_read_from_the_text(visitor, both, plain):
    visitor.page.select_option("#first", "plain")
    visitor.talk("the cat sat")
    reply = visitor.look()
    entries = goes_on(both, "the cat sat")["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == goes_on(both, "the cat sat")["logprobs"]["tokens"]
    reply.locator("[role=option]").first.click()
    reply.get_by_role("button", name="What every layer would have said").click()
    reply.locator(".lens table").wait_for()
    model, tokenizer = lapis.load(plain)
    word = token_word(entries[0]["id"], tokenizer)
    trace = lapis.lens(model, tokenizer, tokenizer.encode("the cat sat"), [word], LensOptions(top=5))
    ranks = [reading.ranks[trace.words[0].text] for reading in (trace.readings[0], *trace.layers)]
    cells = reply.locator(".lens td.number").all_text_contents()
    assert [int(cell.replace(",", "")) for cell in cells] == ranks


def test_what_is_saved_is_text_where_no_model_chats(visitor, both):
    visitor.talk("the cat")
    with visitor.page.expect_download() as saved:
        visitor.page.click("#export")
    lines = saved.value.path().read_text(encoding="utf-8").splitlines()
    assert [list(json.loads(line)) for line in lines] == [["messages"]], "the chat alone, where one chats"
    visitor.page.reload()
    visitor.page.wait_for_selector("html[data-ready]")
    visitor.page.select_option("#first", "plain")
    visitor.set(temperature=1, seed=5, longest=12)
    visitor.talk("the cat")
    with visitor.page.expect_download() as saved:
        visitor.page.click("#export")
    text = goes_on(both, "the cat")["text"]
    assert json.loads(saved.value.path().read_text(encoding="utf-8")) == {"text": f"the cat{text}"}


def test_a_lens_wants_a_chat_or_a_text(both):
    for given in ({}, {"prompt": "the cat", "messages": [{"role": "user", "content": "the cat"}]}):
        body = {"model": "plain", "reply": [], "place": 0, **given}
        answer = httpx.post(f"{both.url}/lapis/lens", json=body, timeout=60)
        assert answer.status_code == 400 and "give one of messages" in answer.json()["error"]["message"]
