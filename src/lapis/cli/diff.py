"""`lapis diff`: what a fine-tune changed, from the command line."""

from typing import TYPE_CHECKING

from lapis.cli.output import console, progress, show, table

if TYPE_CHECKING:
    from lapis.weights.table import DiffTable


def diff(a: str, b: str, /, *, rows: bool = False, top: int = 20, html: str | None = None, json: bool = False) -> None:
    """Direction and magnitude of b - a, per tensor, layer and component.

    Parameters
    ----------
    a
        The model to start from: a base, a parent.
    b
        The model to compare with it.
    rows
        Also row by row for the embedding and the head, with the tokens.
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

    with progress() as shown:
        task = shown.add_task("reading", total=None, rate="")
        found = run(a, b, rows, progress=lambda done, total: shown.update(task, completed=done, total=total))
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
    page.table([{**g, "layer": str(g["layer"])} for g in found.by("layer")], ["layer", *figures], "By layer")
    page.table(found.by("component"), ["component", *figures], "By component")
    if found.rows:
        page.section("Which tokens", "Rows of the embedding: how far each token's vector moved.")
        page.figure(found.plot(rows=True))
        moved = [{**row, "token": repr(row["token"])} for row in found.moved(30)]
        page.table(moved, ["token", "id", "kind", figures[0], figures[1]], "The rows that moved most")
    with commit_file(path, overwrite=True) as temporary:
        temporary.write_text(page.render(), encoding="utf-8")
