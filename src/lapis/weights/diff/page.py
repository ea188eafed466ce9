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
from lapis.wording import format_count

FIGURES = [
    Column("relative_norm", "|b − a| / |a|", ".2e"), Column("angle", "angle", ".3f", unit="°"),
    Column("identical", "identical", ".1%"), Column("mean_abs", "mean", ".1e"), Column("max_abs", "max", ".1e"),
    Column("cosine", "cosine", ".5f"), Column("rounding_floor", "floor", ".0e"),
]  # fmt: skip
LEGEND = "Mean and max are of |b − a|, element by element. A change below the floor may be rounding alone."
CURVES = 6  # spectra drawn in one picture
EXTREMES = 8  # tensors in the lists of those that changed most and least


def diff_page(table: DiffTable, a: str, b: str) -> Page:
    """The page of one difference. a, b: what the models are called."""
    total = table.total
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
    page.figure(table.plot())
    _add_extremes(page, table)
    layers = [{**g, "layer": "outside" if g["layer"] is None else str(g["layer"])} for g in table.by("layer")]
    page.beside(
        lambda: page.table(layers, ["layer", *FIGURES], "By layer"),
        lambda: page.table(table.by("component"), ["component", *FIGURES], "By component", caption=LEGEND),
    )
    if table.rows:
        _add_rows(page, table)
    with_spectra = [line for line in table.tensors if line.get("singular_values")]
    if with_spectra:
        _add_spectra(page, with_spectra)
    if table.directions:
        _add_directions(page, table.directions)
    for note in table.notes:
        if not table.rows or note != table.rows_finding():  # the section of the rows says it
            page.text(f"Note: {note}")
    return page


def _add_extremes(page: Page, table: DiffTable) -> None:
    """The tensors that changed most and least, as two short lists."""
    lines = [
        {**line, "name": line["name"].removeprefix("model.").removesuffix(".weight")}
        for line in sorted(table.tensors, key=lambda line: -line["relative_norm"])
    ]
    columns = [
        Column("name"), Column("relative_norm", "|b − a| / |a|", ".2%"), Column("angle", "turned by", ".2f", unit="°"),
        Column("identical", "identical", ".0%"),
    ]  # fmt: skip
    changed = [line for line in lines if line["relative_norm"]]
    if changed:
        few = min(EXTREMES, -(-len(changed) // 2))
        page.beside(
            lambda: page.table(changed[:few], columns, "Changed most"),
            lambda: page.table(changed[::-1][:few], columns, "Changed least"),
        )
    if len(changed) < len(lines):
        same = dict.fromkeys(line["component"] for line in lines if not line["relative_norm"])
        count = f"{len(lines) - len(changed):,} of {format_count(len(lines), 'tensor')}"
        page.text(f"{count} did not change at all: {', '.join(same)}.")


def _add_rows(page: Page, table: DiffTable) -> None:
    page.section(
        "Which tokens moved",
        "Rows of the embedding and of the head, one per token. A row stands apart where its robust z-score is above 6.",
    )
    if not any(row["relative_norm"] for row in table.rows):
        page.text("**No row moved.**")
        return
    page.figure(table.plot(rows=True))
    page.table(
        [
            {"tensor": entry["tensor"], "apart": entry["outliers"], "special": entry["special"],
             "with": entry["with"]["relative_norm"], "without": entry["without"]["relative_norm"]}
            for entry in table.outliers()
        ],
        ["tensor", Column("apart", "rows that stand apart", ","), Column("special", "of them special", ","),
         Column("with", "all rows", ".2%", group="|b − a| / |a|"),
         Column("without", "without those", ".2%", group="|b − a| / |a|")],
        "Is it the template's tokens?",
    )  # fmt: skip
    moved = [{**row, "token": repr(row["token"])} for row in table.moved(15) if row["relative_norm"]]
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


def _add_directions(page: Page, rows: list[dict[str, Any]]) -> None:
    page.section(
        "Directions of the change, as tokens",
        "The first singular directions of the change of each matrix. What writes to the residual stream is read by the"
        " head; what reads from it is compared with the embedding. A direction has no sign: both ends are shown.",
    )
    lines = [
        {**row, "what": f"{row['component']} {row['side']}", **{
            end: " ".join(repr(entry["token"]) for entry in row[end]) for end in ("one_end", "other_end")}}
        for row in rows
    ]  # fmt: skip
    columns = [
        Column("layer"), Column("what", "matrix"), Column("number", "direction"),
        Column("share", "share of the change", ".1%"), Column("one_end", "one end"),
        Column("other_end", "the other end"),
    ]  # fmt: skip
    page.table(lines, columns, "The first directions of the change", sortable=True)


def lineage_page(lineage: Lineage) -> Page:
    """The page of several models on one base."""
    page = Page(f"Who descends from {short(lineage.base)}", "Cosines between what each model changed of the base.")
    names = [short(model) for model in lineage.models]
    names = names if len(set(names)) == len(names) else lineage.models
    page.section("The differences beside each other", "Independent fine-tunes of one base are nearly orthogonal.")
    page.figure(plots.matrix(lineage.cosines, names, names, lineage.notes[0], unit="cosine", format=".2f", signed=True))
    rows = [
        {"model": model, "norm": norm} for model, norm in zip(lineage.models, lineage.relative_norms, strict=True)
    ]  # fmt: skip
    page.table(
        rows, ["model", Column("norm", "size of its change", ".3e", unit="of the base's length")], "How far each went"
    )
    for note in lineage.notes[1:]:
        page.text(f"Note: {note}")
    return page


def short(source: str) -> str:
    """A model's name without the folders that lead to it; a hub id whole."""
    return source if source.count("/") == 1 and not source.startswith((".", "/")) else PurePath(source).name or source
