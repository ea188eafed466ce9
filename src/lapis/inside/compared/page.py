"""What activations say of two models, as sections of the pages of `lapis diff` and `lapis lens`."""

from functools import partial

from lapis.inside.compared.difference import ActivationDifference
from lapis.inside.compared.patching import Patching
from lapis.inside.prompt import show
from lapis.report.markup import Column
from lapis.report.page import Page


def add_difference(page: Page, difference: ActivationDifference) -> None:
    """The mean difference of activations, layer by place, and its tokens at the place where it is longest."""
    info = difference.vectors.info
    page.section(
        "What activations say before anything is read",
        f"The mean difference of the states at the first places of unrelated texts ({info['texts']:,} of them), "
        "through the final norm and head of b. A narrow fine-tune shows its subject here.",
    )
    if difference.grid_rows():
        page.figure(difference.plot(), "Layer by place. Hover for the best tokens of a cell.")
    else:
        page.text("**The activations are the same.**")
    place = difference.most.place
    rows = [
        {"layer": "embed" if r.layer is None else str(r.layer), "norm": r.relative_norm,
         "toward": " ".join(show(token) for token, _, _ in r.toward), "away": " ".join(show(t) for t, _, _ in r.away)}
        for r in difference.readings if r.place == place
    ]  # fmt: skip
    columns = [Column("layer"), Column("norm", "|d| / |a|", ".2%"), Column("toward", "the difference says"),
               Column("away", "its opposite says")]  # fmt: skip
    page.table(rows, columns, folded=f"Place {place} in words")
    for note in difference.notes:
        page.text(f"Note: {note}")


def add_patching(page: Page, patching: Patching) -> None:
    """One picture for each tracked word."""
    page.section(
        "One state of the other model, put into this one",
        f"The state at one place after one layer is taken from {patching.source}, the rest of {patching.model} runs "
        "on; the cell is by how much that changes the probability of the word at the end.",
    )
    page.beside(*(partial(_add_word, page, patching, word) for word in patching.patched))


def _add_word(page: Page, patching: Patching, word: str) -> None:
    page.figure(
        patching.plot(word),
        rows=[
            {"layer": layer, "place": show(patching.tokens[position]), "p": line[place]}
            for layer, line in enumerate(patching.patched[word]) for place, position in enumerate(patching.positions)
        ],
        columns=["layer", "place", Column("p", f"probability of {show(word)}", ".3%")],
    )  # fmt: skip
