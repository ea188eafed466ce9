"""`lapis diff`: what a fine-tune changed, from the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lapis.cli.output import line, notes, progress, show, table, write_page
from lapis.config import environment_number
from lapis.generation.options import Runtime
from lapis.inside.compared.options import DifferenceOptions
from lapis.wording import format_count

if TYPE_CHECKING:
    from lapis.inside.compared.difference import ActivationDifference
    from lapis.weights.diff.lineage import Lineage


def diff(
    a: str,
    b: str,
    /,
    *others: str,
    rows: bool = False,
    spectra: bool = False,
    directions: bool = False,
    activations: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    options: Annotated[DifferenceOptions, Parameter(name="*")] = DifferenceOptions(),  # noqa: B008
    vectors: Path | None = None,
    runtime: Annotated[Runtime, Parameter(name="*")] = Runtime(),  # noqa: B008
    top: int = 20,
    html: Path | None = None,
    out: Path | None = None,
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
    directions
        Also the first singular directions of each matrix's change, read as tokens through head and embedding. Slow.
    activations
        Text files: also run both models over the first places of unrelated texts, and read the mean difference of their
        states through the head. These models must be ones that run.
    vectors
        With --activations: write the mean differences to this file, for lapis generate --steer.
    top
        How many of the rows that moved most are shown.
    html
        Write a page with the pictures to this file.
    out
        Keep the table as diff.json in this new folder. Several processes (torchrun -m lapis diff ...) divide the work
        between them there, and a killed run goes on where it stopped.
    overwrite
        Replace an existing page or folder.
    json
        Print one JSON object.
    """
    from lapis.checkpoint.commit import check_file
    from lapis.checkpoint.sharing import process_count
    from lapis.errors import ConfigError
    from lapis.weights.diff.diff import diff as run
    from lapis.weights.diff.lineage import lineage

    if others and (activations or directions):
        raise ConfigError("diff: --activations and --directions compare two models; leave the others out")
    if others and out is not None:
        raise ConfigError("diff: --out keeps the table of two models; leave the others out")
    if out is None and not others and process_count() > 1:
        raise ConfigError("diff: several processes divide the work in the folder of --out; give --out DIR")
    if vectors is not None and activations is None:
        raise ConfigError("diff: --vectors is for --activations FILES, from which they are")
    for option, file in (("--html", html), ("--vectors", vectors)):
        if file is not None and not environment_number("RANK", 0):
            check_file(file, overwrite=overwrite, inputs=[a, b, *others], option=option)
    with progress("reading") as report:
        if others:
            descent = lineage(a, [b, *others], progress=report)
        else:
            difference = run(a, b, rows, spectra, directions, out=out, overwrite=overwrite, progress=report)
    if others:
        show(descent.to_json(), json, lambda: print_lineage(descent))
        if html:
            from lapis.weights.diff.page import lineage_page

            write_page(lineage_page(descent), html, overwrite=overwrite)
        return
    difference.check_related(a, b)
    if environment_number("RANK", 0):  # of several processes the first one shows what all have found
        return
    activity = _activity(a, b, activations, options, runtime) if activations else None
    result = difference.to_json()
    if activity is not None:
        result["activations"] = activity.to_json()
        if vectors is not None:
            activity.vectors.save(vectors, overwrite=overwrite)
            result["activations"]["vectors"] = str(vectors)

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
                f"the {format_count(len(moved), 'row')} that moved most",
                ["token", "id", "what", "|b-a|/|a|", "cosine", "z"],
                [
                    [repr(row["token"]), row["id"], row["kind"], row["relative_norm"], row["cosine"], row["z"]]
                    for row in moved
                ],
            )
        if difference.new_rows:
            table(
                f"tokens that only b has: {format_count(len(difference.new_rows), 'row')}",
                ["token", "id", "what", "norm", "nearest", "cosine"],
                [
                    [repr(row["token"]), row["id"], row["kind"], row["norm"], repr(row["nearest"]),
                     row["nearest_cosine"]]
                    for row in difference.new_rows[:top]
                ],
            )  # fmt: skip
        if directions:
            _print_directions(difference.directions)
        if activity is not None:
            line(activity)
        line(difference.finding())
        notes([*filter(None, [difference.floor_finding()]), *difference.notes])

    show(result, json, render)
    if html:
        from lapis.weights.diff.page import diff_page

        page = diff_page(difference, a, b)
        if activity is not None:
            from lapis.inside.compared.page import add_difference

            add_difference(page, activity)
        write_page(page, html, overwrite=overwrite)


def _activity(
    a: str, b: str, files: list[Path], options: DifferenceOptions, runtime: Runtime
) -> "ActivationDifference":  # fmt: skip
    """The mean difference of activations over the first places of texts."""
    from lapis.generation.ready import choose_common_dtype, choose_device
    from lapis.inside.compared.difference import activation_difference
    from lapis.model.threads import settle_threads

    device = choose_device(runtime.device)
    settle_threads(device)
    dtype, remarks = choose_common_dtype([a, b], runtime.dtype, device)
    notes(remarks)
    with progress("running the texts", "tokens") as report:
        return activation_difference(a, b, files, options, device=device, dtype=dtype, progress=report)


def _print_directions(rows: list[dict[str, Any]]) -> None:
    """The direction of each matrix that holds most of its change."""
    table(
        "the first directions of the change",
        ["layer", "component", "share", "one end", "the other end"],
        [
            [row["layer"], f"{row['component']} {row['side']}", f"{row['share']:.1%}",
             *(" ".join(repr(entry["token"]) for entry in row[end][:4]) for end in ("one_end", "other_end"))]
            for row in rows if row["number"] == 0
        ],
    )  # fmt: skip


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
