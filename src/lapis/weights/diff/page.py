"""The pages of `lapis diff`: what changed between two models, and who descends from whom.

Leaves out: writing them to disk (cli/diff.py), and the figures themselves (diff.py, lineage.py).
"""

from pathlib import PurePath
from typing import Any

from lapis.report import plots
from lapis.report.markup import Column
from lapis.report.page import Page
from lapis.weights.diff.lineage import Lineage
from lapis.weights.diff.table import DiffTable

FIGURES = [
    Column("cosine", "cosine", ".6f"), Column("angle", "angle", ".3f", unit="degrees"),
    Column("relative_norm", "|b − a| / |a|", ".3e"), Column("rounding_floor", "rounding floor", ".1e"),
    Column("mean_abs", "mean |b − a|", ".2e"), Column("max_abs", "max |b − a|", ".2e"),
    Column("identical", "identical", ".1%"),
]  # fmt: skip
CURVES = 6  # spectra drawn in one picture


def diff_page(found: DiffTable, a: str, b: str) -> Page:
    """The page of one difference."""
    total = found.total
    page = Page(
        f"From {short(a)} to {short(b)}", f"What changed in the weights from `{a}` to `{b}`: direction and size."
    )
    page.stats([
        ("size of the change", f"{total['relative_norm']:.2%}", "of the length of all weights"),
        ("turned by", f"{total['angle']:.2f}°", f"cosine {total['cosine']:.6f}"),
        ("identical", f"{total['identical']:.1%}", "of all elements"),
        ("rounding floor", f"{total['rounding_floor']:.1e}", "a change below it says nothing"),
    ])  # fmt: skip
    page.section("Where it changed", "Each cell is one component of one layer, taken as one vector.")
    page.figure(found.plot())
    layers = [{**g, "layer": "outside" if g["layer"] is None else str(g["layer"])} for g in found.by("layer")]
    page.table(layers, ["layer", *FIGURES], folded="By layer, in numbers")
    page.table(found.by("component"), ["component", *FIGURES], "By component")
    if found.rows:
        _add_rows(page, found)
    with_spectra = [line for line in found.tensors if line.get("singular_values")]
    if with_spectra:
        _add_spectra(page, with_spectra)
    for note in found.notes:
        page.text(f"Note: {note}")
    return page


def _add_rows(page: Page, found: DiffTable) -> None:
    page.section(
        "Which tokens moved",
        "Rows of the embedding and of the head, one per token. A row stands apart where its robust z-score is above 6.",
    )
    page.figure(found.plot(rows=True))
    page.table(
        [
            {"tensor": entry["tensor"], "apart": entry["outliers"], "special": entry["special"],
             "with": entry["with"]["relative_norm"], "without": entry["without"]["relative_norm"]}
            for entry in found.outliers()
        ],
        ["tensor", Column("apart", "rows that stand apart", ","), Column("special", "of them special", ","),
         Column("with", "all rows", ".2%", group="|b − a| / |a|"),
         Column("without", "without those", ".2%", group="|b − a| / |a|")],
        "Is it the template's tokens?",
    )  # fmt: skip
    moved = [{**row, "token": repr(row["token"])} for row in found.moved(15)]
    page.table(
        moved,
        ["token", "id", "kind", Column("relative_norm", "|b − a| / |a|", ".3f"), Column("cosine", "cosine", ".4f"),
         Column("z", "robust z", ".1f")],
        "The rows that moved most", sortable=True,
    )  # fmt: skip


def _add_spectra(page: Page, lines: list[dict[str, Any]]) -> None:
    page.section(
        "How many directions", "Singular values of the difference of each matrix: few large ones, or many alike."
    )
    step = -(-len(lines) // CURVES)
    shown = [
        {"name": line["name"], "values": [v for v in line["singular_values"] if v > 0]}
        for line in sorted(lines, key=lambda line: line["stable_rank"])[::step]
    ]  # fmt: skip
    least = min(lines, key=lambda line: line["stable_rank"])
    title = f"{least['name']} has the lowest stable rank: {least['stable_rank']:.1f} of {min(least['shape'])}"
    page.figure(plots.spectra([row for row in shown if row["values"]], title))
    columns = [
        Column("name"), Column("stable_rank", "stable rank", ".2f"),
        Column("rank_90", "rank of 90 % of the energy", ","), Column("snr", "signal to noise, difference", ".3g"),
        Column("weight_snr", "signal to noise, weights", ".3g"),
    ]  # fmt: skip
    page.table(lines, columns, sortable=True, folded="Every matrix, in numbers")


def lineage_page(found: Lineage) -> Page:
    """The page of several models on one base."""
    page = Page(f"Who descends from {short(found.base)}", "Cosines between what each model changed of the base.")
    names = [short(model) for model in found.models]
    names = names if len(set(names)) == len(names) else found.models
    page.section("The differences beside each other", "Independent fine-tunes of one base are nearly orthogonal.")
    page.figure(plots.matrix(found.cosines, names, names, found.notes[0], unit="cosine", format=".2f", signed=True))
    rows = [
        {"model": model, "norm": norm} for model, norm in zip(found.models, found.relative_norms, strict=True)
    ]  # fmt: skip
    page.table(
        rows, ["model", Column("norm", "size of its change", ".3e", unit="of the base's length")], "How far each went"
    )
    for note in found.notes[1:]:
        page.text(f"Note: {note}")
    return page


def short(source: str) -> str:
    """A model's name without the folders that lead to it; a hub id whole."""
    return source if source.count("/") == 1 and not source.startswith((".", "/")) else PurePath(source).name or source
