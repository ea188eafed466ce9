"""A page is one file that asks for nothing, and what a model wrote stays text."""

import base64
import hashlib
import itertools
import json
import re
import zlib
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lapis.report import Column, Page, plots

NASTY = '<script>alert("x")</script> & </script><!-- ${a} <img src=x onerror=alert(1)> \x00 \ud800'


class Reader(HTMLParser):
    """Collects tags, headings, ids and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.attributes = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)

    @property
    def levels(self):
        return [int(tag[1]) for tag in self.tags if re.fullmatch(r"h[1-6]", tag)]


def curves(title="The loss falls"):
    return plots.learning_curves([{"run": "base", "tokens": i, "loss": 3 - i / 9} for i in range(9)], title)


@pytest.fixture(scope="module")
def whole():
    page = Page("A report", "What it is.", footer="The end.")
    page.section("One", "Text with `code` and **weight**.").figure(curves(), "A caption.", rows=[{"a": 1, "b": 0.5}])
    page.section("Two").table([{"model": "base", "nll": 2.0}], ["model", Column("nll", best="min")], "A table")
    page.section("Three").figure(curves("Again")).replies([{"prompt": "Hi", "replies": {"chat": "Hello"}}])
    return page.samples(["one", "two"], "Samples").stats([("gap", "0.5", "half")]).render()


def test_plotly_is_inside_once_and_only_with_a_figure(whole):
    from plotly.offline import get_plotlyjs

    packed = re.findall(r'<script type="application/octet-stream" id="plotly">(.*?)</script>', whole)
    assert len(packed) == 1 and zlib.decompress(base64.b64decode(packed[0])).decode() == get_plotlyjs()
    assert len(whole) < 2_300_000 and "MIT" in whole  # half of plotly.min.js; its license notice is in sight
    assert len(Page("Words").text("only").render()) < 20_000


def test_page_asks_for_nothing(whole):
    assert "http://" not in whole and "https://" not in whole
    assert not re.search(r'(?:src|href)="(?!#|data:,)', whole)
    assert "@import" not in whole and "url(" not in whole


def test_policy_allows_exactly_our_two_scripts(whole):
    policy = re.search(r'Policy" content="(.*?)"', whole)[1]
    assert (
        policy.startswith("default-src 'none'; ")
        and "unsafe-inline' " not in policy.split("script-src")[1].split(";")[0]
    )
    ours = re.findall(r"<script>(.*?)</script>", whole, re.DOTALL)
    assert len(ours) == 1
    digest = base64.b64encode(hashlib.sha256(ours[0].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy and policy.count("sha256-") == 2


def test_headings_are_never_skipped_and_the_language_is_named(whole):
    reader = Reader(whole)
    levels = reader.levels
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert ("lang", "en") in reader.attributes
    assert Reader(Page("No sections").figure(curves()).render()).levels == [1, 2]


def test_pictures_have_words_and_links_lead_somewhere(whole):
    attributes = Reader(whole).attributes
    labels = [value for key, value in attributes if key == "aria-label"]
    assert "The loss falls. A caption" in labels and "Again" in labels
    ids = [value for key, value in attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for key, value in attributes if key == "href" and value.startswith("#")} <= set(ids)


def everywhere(text):
    """A page with `text` in every place that takes some."""
    figure = plots.learning_curves([{"run": text, "tokens": 1, "loss": 1.0}], text)
    page = (
        Page(text, text, language="en", footer=text)
        .section(text, text)
        .figure(figure, text, alt=text, rows=[{text: text}])
    )
    page.table(
        [{"a": text}], [Column("a", text, group=text, unit=text)], text, caption=text, mark=[text], sortable=True
    )
    page.table([{"a": text}], ["a"], folded=text).samples([text], text, language="ms").stats([(text, text, text)])
    return page.replies(
        [{"prompt": text, "replies": {text: text}, "wanted": text, "right": [text], "language": "ms"}]
    ).render()


def test_model_output_is_never_markup():
    tame, nasty = Reader(everywhere("plain")), Reader(everywhere(NASTY))
    assert nasty.tags == tame.tags
    assert sum('alert("x")' in text for text in nasty.text) > 15  # it is shown, as text
    everywhere(NASTY).encode("utf-8")


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet=st.sampled_from("<>&\"'/`*!-[]{}$\\ascript\n\t\0 \u2028\u202e\ud800"), max_size=40))
@example("script/script")  # a name so long that it may break at its slash
def test_no_text_adds_a_tag(text):
    known = set(Reader(everywhere("plain")).tags) | {"code", "strong", "wbr"}
    page = everywhere(text)
    reader = Reader(page)
    assert set(reader.tags) <= known and reader.tags.count("script") == 4
    page.encode("utf-8")


def test_json_of_a_figure_survives_the_page():
    figure = curves('</script><script>alert(1)</script> "x"')
    page = Page("p").figure(figure).render()
    block = re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    spec = json.loads(block)
    assert spec["data"][0]["y"] == list(figure.data[0].y)
    assert spec["layout"]["meta"]["title"].startswith("</script>") and "template" not in spec["layout"]


def test_figure_is_left_as_it_was():
    figure = curves()
    before = figure.to_json()
    Page("p").figure(figure).figure(figure.to_dict()).render()
    assert figure.to_json() == before


def test_table_formats_marks_and_groups():
    rows = [
        {"model": "base", "nll": 2.5, "stop": None, "n": 1200},
        {"model": "chat", "nll": 1.25, "stop": 0.5, "n": 7},
        {"model": "tuned", "nll": float("nan"), "stop": 0.25, "n": -3},
    ]
    columns = [
        "model",
        Column("nll", "NLL", ".2f", best="min", group="English"),
        Column("stop", format=".0%", best="max"),
    ]
    html = Page("p").table(rows, [*columns, "n"], "t", mark=["chat"]).render()
    cells = re.findall(r"<t[dh][^>]*>([^<]*)", html.split("<tbody>")[1])
    assert cells == ["base", "2.50", "–", "1,200", "chat", "1.25", "50%", "7", "tuned", "–", "25%", "−3"]
    assert html.count('class="number best"') == 2 and html.count("(best)") == 2
    assert html.count('<tr class="mark">') == 1 and '<th scope="colgroup" colspan="1">English</th>' in html


def test_same_input_same_bytes():
    assert Page("p").figure(curves()).render() == Page("p").figure(curves()).render()
