"""The page of `lapis.explain` in Chromium: the numbers are those of Python, keys work, and nothing of a text is run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.generation.options import Sampling
from lapis.generation.sampling import filtered
from lapis.inside.explain.explain import explain
from lapis.inside.explain.explanation import Explanation
from lapis.inside.explain.options import ExplainOptions
from lapis.inside.prompt import show
from lapis.text.tokenizer.tokenizer import train_tokenizer

from .conftest import make_model

pytestmark = pytest.mark.browser

HOSTILE = "<script>alert(1)</script>\u202eMalaysia </script> Kuala"


def in_page(share: float) -> str:
    return f"{100 * share:.1f} %"


def number(value: float) -> str:
    """As the page writes one: three digits or so."""
    size = abs(value)
    text = (
        f"{value:,.0f}"
        if size >= 1000
        else f"{value:.0f}"
        if size >= 100
        else f"{value:.1f}"
        if size >= 10
        else f"{value:.2f}"
    )
    return text.replace("-", "−")


@pytest.fixture(scope="module")
def shown(words) -> Explanation:
    one, other = make_model("window", context=99), make_model("window", context=99)
    with torch.no_grad():
        other.blocks[1].mlp.down.weight.add_(torch.randn_like(other.blocks[1].mlp.down.weight) * 0.5)
    text = "in Malaysia they say Kuala Lumpur is the capital"
    return explain(one, words, text, "Kuala, Jakarta", against=(other, words), names=("one", "the/other <b>"))


@pytest.fixture
def visit(browser, tmp_path):
    """visit(explanation, width, scheme) -> its opened page; at the end nothing may have been complained of."""
    contexts, complaints = [], []

    def open_page(explanation: Explanation, width: int = 1280, scheme: str = "light") -> Any:
        file = Path(tmp_path / "explain.html")
        file.write_text(explanation.page().render(), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
        page.on(
            "request", lambda ask: complaints.append(ask.url) if not ask.url.startswith(("file:", "data:")) else None
        )
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def choose(page: Any, place: int) -> None:
    page.locator("#tokens [role=option]").nth(place).click()


def test_the_data_in_the_page_is_the_json_of_python(visit, shown):
    page = visit(shown)
    assert json.loads(page.locator("#explanation").text_content()) == json.loads(json.dumps(shown.to_json()))


def test_numbers_of_every_view_are_those_of_python(visit, shown):
    page, place = visit(shown), 5
    choose(page, place)
    page.select_option("#choose-layer", "2")
    page.select_option("#choose-head", "1")
    token, stream = shown.tokens[place], shown.stream
    assert f"{token.id}" == page.locator("#way-in .big").inner_text()
    detail = page.locator("#layer-detail").inner_text()
    for value in (
        stream.states_PN[place, 2],
        stream.states_PN[place, 3],
        stream.attention_PL[place, 2],
        stream.mlp_PL[place, 2],
    ):
        assert number(float(value)) in detail
    assert in_page(float(shown.grid.shares_PNK[place, 3, 0])) in detail
    rank, chance = shown.ending.actual[place]
    assert f"rank {rank} with {in_page(chance)}" in page.locator("#way-out").inner_text()
    weights = shown.weights(2, 1)[place, : place + 1]
    order = weights.nan_to_num(-1).argsort(descending=True)[:3].tolist()  # a window of three
    lines = page.locator("#lookup tbody tr")
    assert lines.count() == 3
    for line, s in enumerate(order):
        cells = lines.nth(line).locator("th, td").all_inner_texts()
        assert (cells[0], cells[1]) == (show(shown.tokens[s].text), str(s + 1)) and in_page(float(weights[s])) in cells
    assert page.locator("#map .cell").count() == sum(min(t + 1, 3) for t in range(len(shown.tokens)))
    cell = page.locator("#grid tbody tr").nth(2).locator("td").nth(place)
    best = shown.texts[shown.grid.ids_PNK[place][2][0]]
    assert cell.inner_text() == show(best) and in_page(float(shown.grid.shares_PNK[place, 2, 0])) in cell.get_attribute(
        "title"
    )
    page.select_option("#grid-color", "rank of Kuala")
    assert cell.get_attribute("title").endswith(f"rank {shown.grid.ranks['Kuala'][place][2]}")
    parts = page.locator("#share-list li .share").all_inner_texts()
    word = shown.words[0]
    largest = max((float(v) for v in [*word.heads_LH.flatten(), *word.mlp_L, *word.rest.values()]), key=abs)
    assert parts[0] == ("+" if largest > 0 else "") + number(largest)
    assert page.locator("#share-list strong").inner_text() == number(word.logit)
    row = page.locator("#token-kl tbody tr").nth(place).locator("td")
    assert row.nth(0).inner_text() == f"{float(shown.against.kl_P[place]):.3f}"
    parted = shown.against.parted[place]
    assert row.nth(3).inner_text() == (
        "nowhere" if parted is None else f"layer {parted - 1}" if parted else "embedding"
    )
    distances = page.locator("#layer-by-layer tbody td.number").all_inner_texts()
    assert distances == [number(float(d)) for d in shown.against.distance_PN[place]]


def test_a_head_in_detail_shows_its_scores_ranks_and_sum(visit, shown):
    page, detail = visit(shown), shown.attention.heads[0]
    page.locator("#detailed button").first.click()
    t = len(shown.tokens) - 1
    best = int(shown.weights(detail.layer, detail.head)[t].nan_to_num(-1).argmax())
    cells = page.locator("#lookup tbody tr").first.locator("td").all_inner_texts()
    assert cells[1] == number(float(detail.scores_AA[t, best])) and cells[-1] == number(float(detail.moved_AA[t, best]))
    ranks = page.locator("#products .rank").all_inner_texts()
    r = detail.ranks
    expected = [r.states, r.queries, r.keys, r.scores, r.weights, r.values, r.mixed, r.states, r.gram, r.cubic]
    assert ranks == [f"rank {rank}" for rank in expected]
    mixed = shown.weights(detail.layer, detail.head).nan_to_num().double() @ detail.values_AE
    assert page.locator("#sum li").last.locator(".size").inner_text() == number(float(mixed[t].norm()))


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 7}, {"top_p": 0.9}, {"top_p": 0.35, "min_p": 0.2},
     {"temperature": 1.65, "min_p": 0.11}, {"temperature": 0.4, "top_k": 40, "top_p": 0.8, "min_p": 0.05}],
)  # fmt: skip
def test_the_chosen_set_is_the_one_of_sampling(visit, shown, settings):
    page = visit(shown)
    for name, value in settings.items():
        page.locator("#" + name.replace("_", "-")).evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", str(value)
        )
    sampling, logits_1V = Sampling(**{"temperature": 1.0, **settings}), shown.ending.logits_V[None]
    if sampling.temperature == 0:
        chances_V = torch.zeros(logits_1V.shape[1], dtype=torch.float64).index_fill_(0, torch.tensor([0]), 1.0)
    else:
        chances_V = filtered(logits_1V, sampling).double().softmax(1)[0]
    count = int((chances_V > 0).sum())
    assert page.locator("#chosen").get_attribute("data-count") == str(count)
    assert f"{count:,} of {logits_1V.shape[1]:,} tokens are left" in page.locator("#chosen-text").inner_text()
    rows = page.locator("#chosen li")
    assert rows.count() == 20 and page.locator("#chosen li.out").count() == max(0, 20 - count)
    for i in range(min(count, 5)):
        assert rows.nth(i).get_attribute("data-id") == str(shown.ending.ids[i])
        assert rows.nth(i).locator(".share").inner_text() == in_page(float(chances_V[i]))


def test_it_works_by_keyboard(visit, shown):
    page = visit(shown)
    options = page.locator("#tokens [role=option]")
    options.last.focus()
    page.keyboard.press("ArrowLeft")
    assert options.nth(len(shown.tokens) - 2).get_attribute("aria-selected") == "true"
    page.keyboard.press("Home")
    assert page.locator("#chosen-token").inner_text() == f"token 1 of {shown.total}"
    layer = page.locator("#river [role=option][tabindex='0']")
    layer.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.locator("#layer-detail strong").inner_text().strip() == "Layer 1."
    assert page.locator("#choose-layer").input_value() == "1"
    cell = page.locator("#grid td[tabindex='0']")
    cell.focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#layer-detail strong").inner_text().strip() == "Layer 2."
    page.locator("#temperature").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#temperature-out").inner_text() == "0.95"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (400, "light")])
def test_it_keeps_to_its_width_and_colors(visit, shown, width, scheme):
    page = visit(shown, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    fill = "getComputedStyle(document.querySelector('.stream')).fill"
    before = page.evaluate(fill)
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    assert page.evaluate(fill) != before
    page.set_viewport_size({"width": 1680 - width, "height": 900})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") == 1680 - width


def test_what_a_model_or_a_text_lacks_leaves_the_other_views(visit, words):
    """One token, no attention, tokens that are cut otherwise, a single layer: every page draws without complaint."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=3, vocab_size=330, state_size=4, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    mamba = transformers.MambaForCausalLM(config).eval()
    other = make_model(seed=1), train_tokenizer(["zebra giraffe " * 60], 280)
    pages = {
        "token": explain(make_model(), words, " Malaysia"), "attention": explain(mamba, words, " Malaysia Kuala"),
        "otherwise": explain(make_model(), words, " Malaysia Kuala", against=other),
        "layer": explain(make_model("gpt2", layers=1), words, " Malaysia Kuala"),
    }  # fmt: skip
    for name, explanation in pages.items():
        page = visit(explanation)
        assert page.locator("#chosen li").count() == 20 and page.locator("#grid tbody td").count() > 1
        assert page.locator("#map svg").count() == (name != "attention")
        assert page.locator("#river .stream").count() == 1
    assert page.locator("#token-kl").count() == 0
    ends = visit(pages["otherwise"]).locator("#token-kl h4").all_inner_texts()
    assert len(ends) == 2 and all(text.endswith("says next") for text in ends)


def test_a_text_with_markup_and_bidi_is_text(visit, words):
    one, other = make_model(context=99), make_model(seed=1, context=99)
    names = "<img src=x onerror=alert(1)>\u202e", "</script><b>\u202e"
    result = explain(one, words, HOSTILE, options=ExplainOptions(places=64), against=(other, words), names=names)
    page = visit(result)
    assert page.locator("main img, main b").count() == 0
    assert "".join(page.locator("#tokens [role=option]").all_inner_texts()).startswith("<script>alert(1)</script>")
    text = page.locator("body").inner_text()
    assert "\u202e" not in text and "⟨U+202E⟩" in text
