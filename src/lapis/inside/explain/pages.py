"""The JSON of an explanation as one page: six views, each drawn from this data, which lies in the page as it is.

The page's own files are in page/: a block of HTML for each view, one style sheet, and scripts that are joined into one,
so that the policy of the page names a single hash. Leaves out: writing it to disk (cli/explain.py).
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from lapis.inside.prompt import show, visible_marks
from lapis.model.size import GROWTH
from lapis.report import theme
from lapis.report.figures.scores import short as in_short
from lapis.report.markup import Column
from lapis.report.page import Page, data_block, variables

SCRIPTS = ("data", "dom", "flow", "attention", "inside", "sampling", "cost", "against", "main")  # in this order

WAY = """A model reads a text as a row of tokens, and each token travels on its own: a vector that every layer adds
to, and that becomes the next token at its end."""
ATTENTION = """Attention is the one place where tokens see each other. One head on this text is a look-up, a weighted
sum and a product of matrices: the same numbers, read in three ways."""
SAMPLING = """The model gives a probability to every token behind the whole text. Settings decide among how many of
them the die is thrown."""
COST = """Three ways to map tokens x features to the same shape. A fully connected layer has a weight from every
number to every other; one map that all tokens share (a 1x1 convolution) mixes features only; attention mixes both,
and its parameters do not depend on the number of tokens."""


Tree = Mapping[str, Any]


def make_page(tree: Tree) -> Page:
    """The page of what `Explanation.to_json` gives."""
    name = visible_marks(PurePath(tree["model"]).name or tree["model"])
    page = Page(
        f"What {name} does with a text",
        "From the text to the next token, and into every head on the way: all pictures are drawn from what this model "
        "computed on this text.",
        footer="Everything on this page was measured once and lies in it; nothing is asked of the network.",
    )  # fmt: skip
    page.stats(_key_figures(tree))
    for note in tree["notes"]:
        page.text(visible_marks(note))
    page.drawing(_file("reader.html"))
    page.section("The way of a token", WAY).drawing(_file("flow.html"))
    page.section("Attention, three ways", ATTENTION)
    if tree["attention"]:
        page.drawing(_file("attention.html"))
    else:
        page.text("This model's attention cannot be looked into, so there are no maps; the other views are whole.")
    page.section("Inside a block", "Heads and MLPs write to one stream, and what they write can be read at any layer.")
    if tree["words"]:
        page.drawing(_file("shares.html"))
    else:
        page.text("What each part adds to a word is not known of this model: its blocks are not plain sums.")
    page.drawing(_file("grid.html"))
    page.section("Choosing the next token", SAMPLING).drawing(_file("sampling.html"))
    _add_cost(page, tree)
    if tree["against"] is not None:
        page.section("Two models on the text", visible_marks(tree["against"]["finding"])).drawing(_file("against.html"))
    return page.drawing(
        f'<div id="explanation-data" hidden>{data_block(tree, "explanation")}</div>',
        style=variables(theme.shades()) + _file("style.css"),
        script="(() => {\n\"use strict\";\n" + "\n".join(_file(f"{name}.js") for name in SCRIPTS) + "})();\n",
    )  # fmt: skip


def _key_figures(tree: Tree) -> list[tuple[str, str, str]]:
    build, best = tree["build"], tree["next"]
    figures = [
        ("the next token", f"“{show(best['token'])}”", f"with {best['probability']:.1%}, of {build['vocab']:,}"),
        ("tokens of the text", f"{tree['total']:,}", f"of {build['context']:,} that the model was made for"),
        ("layers", f"{build['layers']}", _heads_text(build)),
    ]
    if build["parameters"]:
        figures.append(("parameters", in_short(build["parameters"]), f"{build['parameters']:,}"))
    figures.append(("decided in layer", f"{tree['decided']}", "from there on the next token leads"))
    return figures


def _heads_text(build: Tree) -> str:
    heads, groups = build["heads"], build["kv_heads"]
    if heads is None:
        return ""
    windows = [window for window in build["windows"] if window]
    text = f"{heads} heads each" + (f" in {groups} groups" if groups and groups != heads else "")
    return text + (f"; windows of {max(windows):,}" if windows else "")


def _add_cost(page: Page, tree: Tree) -> None:
    cost = tree["cost"]
    columns = [Column("name", "layer"), Column("parameters", format=","), Column("flops", "FLOPs", ","),
               Column("mixes", "what it mixes")]  # fmt: skip
    own = f"This text: {cost['tokens']:,} tokens of {tree['build']['dim']:,} features"
    page.section("What it costs", COST).beside(
        lambda: page.table(cost["example"], columns, "512 tokens of 768 features"),
        lambda: page.table(cost["own"], columns, own),
    )
    if cost["lengths"]:
        page.drawing(_file("growth.html"))
    page.table([{"what": what, "growth": growth} for what, growth in GROWTH], ["what", Column("growth", "with length")],
               "What grows with the length of the text, and what does not")  # fmt: skip
    if cost["lengths"]:
        page.table(cost["lengths"], [
            Column("context", "tokens", ","), Column("weights", "weights", ",", unit="bytes"),
            Column("cache", "KV cache", ",", unit="bytes"), Column("flops", "FLOPs per token", ","),
            Column("attention", "of them attention", ","),
        ], folded="This model at several lengths, in numbers")  # fmt: skip


@cache
def _file(name: str) -> str:
    return files("lapis.inside.explain").joinpath("page", name).read_text(encoding="utf-8")
