"""Talking on the chat page: send, stream, stop, retry, edit, copy, export, two models, tokens, and the lens."""

import json
import math
import re
import time

import httpx
import pytest

from lapis.text.corpus.chat_records import chat_of

from .conftest import make_folder
from .pages import visiting

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pair(start, tmp_path_factory):
    """A server of two models; one has a name that would be markup."""
    root = tmp_path_factory.mktemp("pair")
    folders = [make_folder(root / "base", context=2048), make_folder(root / "graft<b>ed", seed=1, context=2048)]
    with start(*folders, "--dtype", "float32", "--rows", "4") as server:
        yield server


@pytest.fixture
def visitor(browser, pair):
    with visiting(browser, pair.url) as opened:
        opened.set(temperature=1, seed=5, longest=20)
        yield opened


def complete(server, messages, model="base", **fields):
    body = {"model": model, "messages": messages, "temperature": 1, "seed": 5, "max_tokens": 20, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]


@pytest.fixture(scope="module")
def endless(pair) -> str:
    """A message to which both models reply without an end, where they are greedy."""
    for word in "the cat dog bird fish sang mat sat ate while name true a and".split():
        for text in (word, f"{word} on", f"{word}, {word}"):
            greedy = [
                complete(pair, user(text), name, temperature=0, max_tokens=600) for name in ("base", "graft<b>ed")
            ]
            if all(reply["finish_reason"] == "length" for reply in greedy):
                return text
    raise AssertionError("every reply ends")


def said(reply: dict) -> str:
    """A reply as a browser shows its text: white space at the ends of it is not seen."""
    return reply["message"]["content"].strip()


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def shown(visitor, turn: int = -1) -> list[str]:
    return [text.strip() for text in visitor.texts(turn)]


def test_two_models_reply_side_by_side(visitor, pair):
    visitor.talk("the cat")
    names = visitor.turn().locator(".who").all_text_contents()
    assert names == ["base", "graft<b>ed"]
    assert shown(visitor) == [said(complete(pair, user("the cat"), name)) for name in names]
    left, right = (place.bounding_box() for place in visitor.turn().locator(".reply").all())
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert "20" in visitor.turn().locator(".how").first.inner_text()


def test_each_model_reads_its_own_conversation(visitor, pair):
    visitor.set(system="be brief")
    visitor.talk("the cat")
    first = [complete(pair, [{"role": "system", "content": "be brief"}, *user("the cat")], name)
             for name in ("base", "graft<b>ed")]  # fmt: skip
    visitor.talk("and the dog")
    for name, before, text in zip(("base", "graft<b>ed"), first, shown(visitor), strict=True):
        messages = [{"role": "system", "content": "be brief"}, *user("the cat"),
                    {"role": "assistant", "content": before["message"]["content"]}, *user("and the dog")]  # fmt: skip
        assert text == said(complete(pair, messages, name))


def test_markup_in_words_and_names_is_shown_as_text(visitor):
    visitor.page.select_option("#second", "")
    text = "<img src=x onerror=alert(1)> & <script>alert(2)</script>"
    visitor.talk(text)
    assert visitor.turn().locator(".prompt").inner_text() == text
    assert visitor.page.locator("img, article script").count() == 0


def test_stop_keeps_what_came_and_frees_the_server(visitor, pair, endless):
    visitor.page.select_option("#second", "")
    visitor.set(temperature=0, longest=1900)
    visitor.send(endless)
    visitor.page.locator(".reply [data-name=look]").wait_for()
    assert visitor.turn().locator(".reply").get_attribute("aria-busy") == "true"
    visitor.page.keyboard.press("Escape")
    visitor.settle()
    assert "Stopped." in visitor.turn().inner_text() and visitor.texts()[0].strip()
    assert visitor.turn().locator(".reply").get_attribute("aria-busy") == "false"
    whole = complete(pair, user(endless), temperature=0, max_tokens=1900)
    assert len(visitor.texts()[0]) < len(whole["message"]["content"])
    for _ in range(200):
        if httpx.get(f"{pair.url}/health").json()["running"] == 0:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the server goes on with a reply that nobody reads")


def test_stop_by_its_button(visitor, endless):
    visitor.set(temperature=0, longest=1900)
    visitor.send(endless)
    visitor.page.locator(".reply [data-name=look]").first.wait_for()
    visitor.page.locator("#stop").click()
    visitor.settle()
    assert "Stopped." in visitor.turn().inner_text()
    assert visitor.page.locator("#message").evaluate("field => field === document.activeElement")


def test_the_inside_can_be_open_while_the_reply_grows(visitor, endless):
    visitor.page.select_option("#second", "")
    visitor.set(temperature=0, longest=1900)
    visitor.send(endless)
    # a click would wait until the page stands still, which on a busy machine is when the reply has ended
    visitor.page.locator(".reply [data-name=look]").dispatch_event("click")
    options = visitor.turn().locator("[role=option]")
    options.nth(5).wait_for()
    early = options.count()
    options.nth(early + 10).wait_for(state="attached", timeout=10_000)
    visitor.page.locator("#stop").click()
    visitor.settle()
    assert options.count() > early + 10


def test_retry_draws_from_the_next_seed(visitor, pair):
    visitor.talk("the cat")
    other = shown(visitor)[1]
    visitor.turn().locator("[data-name=retry]").first.click()
    visitor.settle()
    assert "seed 6" in visitor.turn().locator(".how").first.inner_text()
    assert shown(visitor) == [said(complete(pair, user("the cat"), seed=6)), other]
    assert visitor.page.locator("article").count() == 1


def test_editing_a_message_sends_it_again_and_drops_what_follows(visitor, pair):
    visitor.talk("the cat")
    visitor.talk("the dog")
    visitor.turn(0).locator(".said button").first.click()
    editor = visitor.turn(0).locator("textarea")
    assert editor.input_value() == "the cat"
    editor.fill("the fish")
    editor.press("Control+Enter")
    visitor.settle()
    assert visitor.page.locator("article").count() == 1
    assert visitor.turn().locator(".prompt").inner_text() == "the fish"
    assert shown(visitor)[0] == said(complete(pair, user("the fish")))


def test_editing_can_be_called_off(visitor):
    visitor.talk("the cat")
    before = shown(visitor)
    visitor.turn().locator(".said button").first.click()
    visitor.turn().locator("textarea").press("Escape")
    assert visitor.turn().locator(".prompt").inner_text() == "the cat" and shown(visitor) == before
    visitor.turn().locator("[data-name=edit]").first.click()
    visitor.turn().locator("textarea").fill("something else")
    visitor.turn().get_by_role("button", name="Cancel").click()
    assert shown(visitor) == before


def exported(visitor, path) -> list[dict]:
    with visitor.page.expect_download() as download:
        visitor.page.locator("#export").click()
    assert download.value.suggested_filename == "chat.jsonl"
    download.value.save_as(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_what_is_exported_is_what_lapis_train_reads(visitor, pair, tmp_path):
    visitor.set(system="be brief")
    visitor.talk("the cat \u2028 кіт")
    visitor.turn().locator("[data-name=edit]").nth(1).click()
    visitor.turn().locator("textarea").fill("words of mine\n\n```\ncode\n```")
    visitor.turn().locator("textarea").press("Control+Enter")
    assert "Edited by hand." in visitor.turn().inner_text()
    assert visitor.turn().locator("pre").inner_text().strip() == "code"
    visitor.talk("the dog")
    path = tmp_path / "chat.jsonl"
    records = exported(visitor, path)
    assert len(records) == 2
    system = {"role": "system", "content": "be brief"}
    first = complete(pair, [system, *user("the cat \u2028 кіт")])["message"]["content"]
    for number, (record, reply) in enumerate(zip(records, (first, "words of mine\n\n```\ncode\n```"), strict=True)):
        messages = chat_of(record, None, path, number + 1).messages
        assert messages[:3] == [system, *user("the cat \u2028 кіт"), {"role": "assistant", "content": reply}]
        assert [m["role"] for m in messages[3:]] == ["user", "assistant"] and messages[3]["content"] == "the dog"
        messages.pop()
        name = ("base", "graft<b>ed")[number]
        assert record["messages"][-1]["content"] == complete(pair, messages, name)["message"]["content"]


def test_a_model_that_joins_later_goes_on_from_what_was_said(visitor, pair, tmp_path):
    visitor.page.select_option("#second", "")
    visitor.talk("the cat")
    first = complete(pair, user("the cat"))["message"]["content"]
    visitor.page.select_option("#second", "graft<b>ed")
    visitor.turn().get_by_role("button", name="Let it answer, too").click()
    visitor.settle()
    assert shown(visitor)[1] == said(complete(pair, user("the cat"), "graft<b>ed"))
    visitor.page.select_option("#first", "graft<b>ed")
    visitor.page.select_option("#second", "")
    visitor.talk("the dog")
    assert len(exported(visitor, tmp_path / "chat.jsonl")) == 2
    assert first.strip() == shown(visitor, 0)[0]


def test_copy_puts_the_reply_on_the_clipboard(browser, pair):
    with visiting(browser, pair.url, permissions=["clipboard-read", "clipboard-write"]) as visitor:
        visitor.set(temperature=1, seed=5, longest=20)
        visitor.talk("the cat")
        visitor.turn().locator("[data-name=copy]").first.click()
        visitor.page.locator("#announcer p", has_text="Copied").wait_for(state="attached")
        text = visitor.page.evaluate("navigator.clipboard.readText()")
        assert text == complete(pair, user("the cat"))["message"]["content"]


def test_a_cleared_conversation_can_be_brought_back(visitor):
    visitor.talk("the cat")
    before = shown(visitor)
    visitor.page.locator("#new").click()
    assert visitor.page.locator("article").count() == 0 and visitor.page.locator("#welcome").is_visible()
    visitor.page.get_by_role("button", name="Bring it back").click()
    assert shown(visitor) == before


def shade(probability: float) -> int:
    return sum(probability < step for step in (0.9, 0.6, 0.3, 0.1))


def test_tokens_are_shaded_by_their_probability(visitor, pair):
    visitor.set(temperature=0.4)
    visitor.talk("the cat")
    place = visitor.look()
    entries = complete(pair, user("the cat"), temperature=0.4, logprobs=True, top_logprobs=5)["logprobs"]["content"]
    groups, pending = [], []
    for entry, after in zip(entries, [*entries[1:], {"bytes": []}], strict=True):
        pending.append(entry)  # tokens that are characters only together stand in one group
        raw = bytes(byte for each in pending for byte in each["bytes"])
        unfinished = re.search(rb"([\xc0-\xff]|[\xe0-\xff][\x80-\xbf]|[\xf0-\xff][\x80-\xbf]{2})$", raw)
        if not (unfinished and after["bytes"] and 0x80 <= after["bytes"][0] < 0xC0):
            groups.append((raw.decode(errors="replace"), math.exp(sum(each["logprob"] for each in pending))))
            pending = []
    options = place.locator("[role=option]")
    ended = entries[-1]["token"].startswith("<|")
    assert options.count() == len(groups) + (not ended)
    for option, (text, probability) in zip(options.all(), groups, strict=False):
        shown_as = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda c: chr(0x2400 + ord(c[0])), text).replace("\n", "↵\n")
        assert option.text_content() == re.sub(r"[\x7f-\x9f]", "\ufffd", shown_as) or not text
        assert f"shade-{shade(probability)}" in option.get_attribute("class")
    assert len({shade(probability) for _, probability in groups}) > 1


def test_the_alternatives_of_a_token(visitor, pair):
    visitor.talk("the cat")
    place = visitor.look()
    entry = complete(pair, user("the cat"), logprobs=True, top_logprobs=5)["logprobs"]["content"][0]
    place.locator("[role=option]").first.click()
    rows = place.locator(".bars li")
    shares = [math.exp(top["logprob"]) for top in entry["top_logprobs"]]
    assert rows.count() == 5 + (entry["token"] not in [top["token"] for top in entry["top_logprobs"]])
    for row, share in zip(rows.all(), shares, strict=False):
        told = float(re.sub(r"[^\d.]", "", row.locator(".share").inner_text()))
        assert told == pytest.approx(100 * share, abs=0.51)
    assert place.locator(".bars .said").count() == 1
    place.get_by_role("button", name="The next token").click()
    assert place.locator("[role=option]").nth(0).get_attribute("aria-selected") == "true" or (
        place.locator("[role=option]").nth(1).get_attribute("aria-selected") == "true"
    )
    assert "Token 2 of" in place.locator(".chosen").inner_text()


def test_the_live_lens_shows_every_layer(visitor, pair):
    visitor.set(temperature=0)
    visitor.talk("the cat")
    place = visitor.look()
    place.locator("[role=option]").nth(2).click()
    place.get_by_role("button", name="What every layer would have said").click()
    place.locator(".lens table").wait_for()
    number = int(re.search(r"Token (\d+) of", place.locator(".chosen").inner_text())[1]) - 1
    ids = [e["id"] for e in complete(pair, user("the cat"), temperature=0, logprobs=True)["logprobs"]["content"]]
    body = {"model": "base", "messages": user("the cat"), "reply": ids, "place": number}
    seen = httpx.post(f"{pair.url}/lapis/lens", json=body, timeout=60).json()
    rows = place.locator(".lens tbody tr")
    assert rows.count() == 3
    for row, layer in zip(rows.all(), [seen["embedding"], *seen["layers"]], strict=True):
        best = layer["top"][0]
        text = best["token"].replace(" ", "␣") if best["token"] else f"<row {best['id']}>"
        assert row.locator(".what").inner_text() == text or not text.isprintable() or "\ufffd" in text
        assert row.locator("td.number").inner_text() == f"{layer['rank']:,}"
    assert f"Layer {seen['decided']} decided" in place.locator(".verdict").inner_text()
    place.locator("[role=option]").last.click()
    place.locator(".verdict", has_text="would come next").wait_for()


def test_the_lens_tells_of_a_token_that_was_drawn_by_chance(visitor):
    visitor.set(temperature=2, longest=60)
    visitor.talk("the cat")
    place = visitor.look()
    place.locator(".token.shade-4").first.click()
    place.get_by_role("button", name="What every layer would have said").click()
    place.locator(".verdict").wait_for()
    drawn = "said" not in (place.locator(".bars li").first.get_attribute("class") or "")
    assert ("drawn by chance" in place.locator(".verdict").inner_text()) == drawn


def test_what_cannot_be_seen_has_a_name(visitor):
    names = visitor.page.evaluate(
        """async () => {
          const { blocksOf, tokenName } = await import("/page/text.js");
          const { groupsOf } = await import("/page/tokens.js");
          const token = (...bytes) => ({ token: "\\ufffd", bytes, logprob: -1 });
          return [
            [" a", "\\n", "\\u00a0", "\\u200d", "\\u0007", ""].map(text => tokenName({ token: text, id: 7 })),
            tokenName(token(0xea, 0x41)),
            groupsOf([token(0xea), token(0xb3), token(0xa0), token(0xe2), token(0x61)])
              .map(group => [group.first, group.last, group.text]),
            groupsOf([token(0xea), token(0xb3)], 0, false).length,
            blocksOf("a\\n```py\\nb\\n\\n c\\n```\\nd\\n```\\ne").map(block => [block.code, block.text]),
          ];
        }"""
    )
    assert names == [
        ["␣a", "↵", "<U+00A0>", "<U+200D>", "␇", "<row 7>"],
        "\\xeaA",
        [[0, 2, "고"], [3, 3, "\ufffd"], [4, 4, "a"]],
        0,
        [[False, "a"], [True, "b\n\n c"], [False, "d"], [True, "e"]],
    ]
