"""An explanation as one page: six views, each drawn from the same data, which lies in the page as it was measured.

The page's own files are in page/: a block of HTML for each view, one style sheet, and scripts that are joined into one,
so that the policy of the page names a single hash. Leaves out: writing it to disk (cli/explain.py).
"""

from functools import cache
from importlib.resources import files

from lapis.inside.explain.explanation import Build, Explanation, state_name
from lapis.inside.page import short
from lapis.inside.prompt import show
from lapis.model.size import GROWTH, Mixer
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


def make_page(explanation: Explanation) -> Page:
    """The page of an explanation."""
    e = explanation
    page = Page(
        f"What {show(short(e.trace))} does with a text",
        "From the text to the next token, and into every head on the way: all pictures are drawn from what this model "
        "computed on this text.",
        footer="Everything on this page was measured once and lies in it; nothing is asked of the network.",
    )  # fmt: skip
    page.stats(_key_figures(e))
    for note in e.notes:
        page.text(show(note))
    page.drawing(_file("reader.html"))
    page.section("The way of a token", WAY).drawing(_file("flow.html"))
    page.section("Attention, three ways", ATTENTION)
    if e.attention:
        page.drawing(_file("attention.html"))
    else:
        page.text("This model's attention cannot be looked into, so there are no maps; the other views are whole.")
    page.section("Inside a block", "Heads and MLPs write to one stream, and what they write can be read at any layer.")
    if e.words:
        page.drawing(_file("shares.html"))
    else:
        page.text("What each part adds to a word is not known of this model: its blocks are not plain sums.")
    page.drawing(_file("grid.html"))
    page.section("Choosing the next token", SAMPLING).drawing(_file("sampling.html"))
    _add_cost(page, e)
    if e.against is not None:
        _add_against(page, e)
    return page.drawing(
        f'<div id="explanation-data" hidden>{data_block(e.to_json(), "explanation")}</div>',
        style=variables(theme.shades()) + _file("style.css"),
        script="(() => {\n\"use strict\";\n" + "\n".join(_file(f"{name}.js") for name in SCRIPTS) + "})();\n",
    )  # fmt: skip


def _key_figures(e: Explanation) -> list[tuple[str, str, str]]:
    end = e.trace.readings[-1]
    figures = [("the next token", f"“{show(e.trace.next_token)}”", f"with {end.top[0][2]:.1%}, of {e.build.vocab:,}"),
               ("tokens of the text", f"{e.total:,}", f"of {e.build.context:,} that the model was made for"),
               ("layers", f"{e.build.layers}", _heads_text(e.build))]  # fmt: skip
    if e.build.parameters:
        figures.append(("parameters", in_short(e.build.parameters), f"{e.build.parameters:,}"))
    figures.append(("decided in layer", f"{e.trace.decided}", "from there on the next token leads"))
    return figures


def _heads_text(build: Build) -> str:
    if build.heads is None:
        return ""
    groups = f" in {build.kv_heads} groups" if build.kv_heads and build.kv_heads != build.heads else ""
    windows = {window for window in build.windows if window}
    return f"{build.heads} heads each{groups}" + (f"; windows of {max(windows):,}" if windows else "")


def _add_cost(page: Page, e: Explanation) -> None:
    columns = [Column("name", "layer"), Column("parameters", format=","), Column("flops", "FLOPs", ","),
               Column("mixes", "what it mixes")]  # fmt: skip
    own = f"This text: {e.cost.tokens:,} tokens of {e.build.dim:,} features"
    page.section("What it costs", COST).beside(
        lambda: page.table(_rows(e.cost.example), columns, "512 tokens of 768 features"),
        lambda: page.table(_rows(e.cost.own), columns, own),
    )
    if e.cost.lengths:
        page.drawing(_file("growth.html"))
    page.table([{"what": what, "growth": growth} for what, growth in GROWTH], ["what", Column("growth", "with length")],
               "What grows with the length of the text, and what does not")  # fmt: skip
    if e.cost.lengths:
        page.table(e.cost.lengths, [
            Column("context", "tokens", ","), Column("weights", "weights", ",", unit="bytes"),
            Column("cache", "KV cache", ",", unit="bytes"), Column("flops", "FLOPs per token", ","),
            Column("attention", "of them attention", ","),
        ], folded="This model at several lengths, in numbers")  # fmt: skip


def _rows(mixers: list[Mixer]) -> list[dict[str, object]]:
    return [dict(vars(mixer)) for mixer in mixers]


def _add_against(page: Page, e: Explanation) -> None:
    parting = e.against
    assert parting is not None
    text = f"`{show(e.model)}` beside `{show(parting.name)}`. "
    if parting.most is None or parting.kl_P is None:
        text += "They cut the text into different tokens, so only what they say at its end stands side by side."
    else:
        row = parting.parted[parting.most]
        text += (
            f"They differ most behind “{show(e.tokens[parting.most].text)}”, by {float(parting.kl_P.max()):.3f} nats "
            f"(KL of the next token), and "
            + ("agree on the best token there." if row is None else f"part {state_name(row)}: from there on their best "
               "tokens differ.")
        )  # fmt: skip
    page.section("Two models on the text", text)
    page.drawing(_file("against.html"))


@cache
def _file(name: str) -> str:
    return files("lapis.inside.explain").joinpath("page", name).read_text(encoding="utf-8")
