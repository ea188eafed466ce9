"""`lapis diff`: what a fine-tune changed, from the command line."""

from typing import TYPE_CHECKING

from lapis.cli.output import console, progress, show, table

if TYPE_CHECKING:
    from lapis.weights.lineage import Lineage
    from lapis.weights.table import DiffTable


def diff(
    a: str,
    b: str,
    /,
    *others: str,
    rows: bool = False,
    spectra: bool = False,
    top: int = 20,
    html: str | None = None,
    json: bool = False,
) -> None:
    """Direction and magnitude of b - a, per tensor, layer and component; with more models, who descends from whom.

    Parameters
    ----------
    a
        The model to start from: a base, a parent.
    b
        The model to compare with it.
    others
        More models: then the cosines between what each of them changed of the first.
    rows
        Also row by row for the embedding and the head, with the tokens.
    spectra
        Also stable rank, rank for 90 % of the energy, and signal-to-noise ratio of each matrix. Slow.
    top
        How many of the rows that moved most are shown.
    html
        Write a page with the pictures to this file.
    json
        Print one JSON object.
    """
    from lapis.errors import CheckpointError
    from lapis.weights.diff import diff as run
    from lapis.weights.diff import unrelated
    from lapis.weights.lineage import lineage

    with progress() as shown:
        task = shown.add_task("reading", total=None, rate="")

        def tell(done: int, total: int) -> None:
            shown.update(task, completed=done, total=total)

        if others:
            descent = lineage(a, [b, *others], progress=tell)
        else:
            found = run(a, b, rows, spectra, progress=tell)
    if others:
        show(descent.to_json(), json, lambda: tell_lineage(descent))
        return
    if unrelated(found):
        raise CheckpointError(f"{a} and {b}: cosine 0.00 in every layer: these are not parent and child")

    def render() -> None:
        for key in ("layer", "component"):
            table(
                f"by {key}",
                [key, "cosine", "angle", "|b-a|/|a|", "floor", "mean |d|", "max |d|", "identical"],
                [
                    [
                        "outside" if group[key] is None else str(group[key]),
                        *(group[name] for name in ("cosine", "angle", "relative_norm", "rounding_floor")),
                        *(group[name] for name in ("mean_abs", "max_abs")),
                        f"{group['identical']:.1%}",
                    ]
                    for group in found.by(key)
                ],
            )
        if rows:
            table(
                f"the {top} rows that moved most",
                ["token", "id", "what", "|b-a|/|a|", "cosine", "z"],
                [
                    [repr(row["token"]), row["id"], row["kind"], row["relative_norm"], row["cosine"], row["z"]]
                    for row in found.moved(top)
                ],
            )
        for note in found.notes:
            console.print(f"- {note}")

    show(found.to_json(), json, render)
    if html:
        write_page(found, a, b, html)


def tell_lineage(found: "Lineage") -> None:
    table(
        f"what each changed of {found.base}: cosines between the differences",
        ["model", "|d|/|base|", *(str(i + 1) for i in range(len(found.models)))],
        [
            [f"{i + 1} {model}", norm, *row]
            for i, (model, norm, row) in enumerate(zip(found.models, found.relative_norms, found.cosines, strict=True))
        ],
    )
    for note in found.notes:
        console.print(f"- {note}")


def write_page(found: "DiffTable", a: str, b: str, path: str) -> None:
    """The pictures and tables of a difference as one page."""
    from lapis.checkpoint.commit import commit_file
    from lapis.report.markup import Column
    from lapis.report.page import Page

    page = Page(f"From {a} to {b}", "What changed in the weights: direction and magnitude, layer by layer.")
    page.section("Where", "Each cell is one component of one layer, as one vector.")
    page.figure(found.plot())
    figures = [
        Column("cosine", "cosine", ".6f"),
        Column("relative_norm", "|b − a| / |a|", ".3e"),
        Column("rounding_floor", "rounding floor", ".1e"),
        Column("identical", "identical", ".1%"),
    ]
    page.table(
        [{**g, "layer": "outside" if g["layer"] is None else str(g["layer"])} for g in found.by("layer")],
        ["layer", *figures],
        "By layer",
    )
    page.table(found.by("component"), ["component", *figures], "By component")
    if found.rows:
        page.section("Which tokens", "Rows of the embedding: how far each token's vector moved.")
        page.figure(found.plot(rows=True))
        moved = [{**row, "token": repr(row["token"])} for row in found.moved(30)]
        page.table(moved, ["token", "id", "kind", figures[0], figures[1]], "The rows that moved most")
    with commit_file(path, overwrite=True) as temporary:
        temporary.write_text(page.render(), encoding="utf-8")
