"""`lapis diff`: what a fine-tune changed, from the command line."""

from pathlib import Path
from typing import TYPE_CHECKING

from lapis.cli.output import line, notes, progress, show, table, write_page

if TYPE_CHECKING:
    from lapis.weights.diff.lineage import Lineage


def diff(
    a: str,
    b: str,
    /,
    *others: str,
    rows: bool = False,
    spectra: bool = False,
    top: int = 20,
    html: Path | None = None,
    overwrite: bool = False,
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
    overwrite
        Replace an existing page.
    json
        Print one JSON object.
    """
    from lapis.checkpoint.commit import check_output
    from lapis.errors import CheckpointError
    from lapis.weights.diff.diff import diff as run
    from lapis.weights.diff.diff import unrelated
    from lapis.weights.diff.lineage import lineage

    if html is not None:
        check_output(html, overwrite=overwrite, inputs=[a, b, *others], option="--html")
    with progress("reading") as report:
        if others:
            descent = lineage(a, [b, *others], progress=report)
        else:
            difference = run(a, b, rows, spectra, progress=report)
    if others:
        show(descent.to_json(), json, lambda: print_lineage(descent))
        if html:
            from lapis.weights.diff.page import lineage_page

            write_page(lineage_page(descent), html, overwrite=overwrite)
        return
    if unrelated(difference):
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
                    for group in difference.by(key)
                ],
            )
        moved = difference.moved(top)
        if moved:
            table(
                f"the {len(moved)} rows that moved most",
                ["token", "id", "what", "|b-a|/|a|", "cosine", "z"],
                [
                    [repr(row["token"]), row["id"], row["kind"], row["relative_norm"], row["cosine"], row["z"]]
                    for row in moved
                ],
            )
        if difference.new_rows:
            table(
                f"tokens that only b has: {len(difference.new_rows)} rows",
                ["token", "id", "what", "norm", "nearest", "cosine"],
                [
                    [repr(row["token"]), row["id"], row["kind"], row["norm"], repr(row["nearest"]),
                     row["nearest_cosine"]]
                    for row in difference.new_rows[:top]
                ],
            )  # fmt: skip
        line(difference.finding())
        notes([*filter(None, [difference.floor_finding()]), *difference.notes])

    show(difference.to_json(), json, render)
    if html:
        from lapis.weights.diff.page import diff_page

        write_page(diff_page(difference, a, b), html, overwrite=overwrite)


def print_lineage(lineage: "Lineage") -> None:
    """Who descends from whom, as a matrix of cosines."""
    table(
        f"what each changed of {lineage.base}: cosines between the differences",
        ["model", "|d|/|base|", *(str(i + 1) for i in range(len(lineage.models)))],
        [
            [f"{i + 1} {model}", norm, *row]
            for i, (model, norm, row) in enumerate(
                zip(lineage.models, lineage.relative_norms, lineage.cosines, strict=True)
            )
        ],
    )
    notes(lineage.notes)
