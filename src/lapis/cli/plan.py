"""`lapis plan`: which layers to tune or merge, from the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lapis.planning.options import PlanOptions, SearchOptions

if TYPE_CHECKING:
    from lapis.planning.result import PlanResult

OF_A_PIECE = ("style", "knowledge", "gradient_chats", "gradient_text", "relative_norm", "scale")
OF_A_SET = ("style", "style_out", "knowledge", "response_nll", "bits_per_byte", "accuracy", "stop_rate")


def plan(
    *,
    base: str | None = None,
    chat: str | None = None,
    merge: Path | None = None,
    chats: list[Path] | None = None,
    text: list[Path] | None = None,
    choices: Path | None = None,
    onto: str | None = None,
    options: Annotated[SearchOptions, Parameter(name="*")] = SearchOptions(),  # noqa: B008
    out: Path | None = None,
    html: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Which layers to tune or merge, or which scales of a recipe, beside random choices.

    Puts the difference chat - base of one piece after another into base, and takes it out of chat, and measures what
    that does to replies and to plain text. Says first what that costs. With --out, a plan that was stopped or killed
    goes on where it was when the same command is given again. With --merge it searches the plain numbers of weight,
    lambda, t and scale in a recipe, on half of the chats and texts, and compares on the other half.

    Args:
        base: The model that chat was tuned from.
        chat: Its chat version.
        merge: A recipe of lapis merge, in place of base and chat; --out is the recipe with the scales that were found.
        chats: jsonl of chats to measure with; without them the choice rests on the tensors alone.
        text: Files of plain text that the model should not lose.
        choices: jsonl, JSON or parquet of questions of fact that it should not lose.
        onto: The model of a coming graft: measure there, and learn a scale for each piece.
        out: Write the plan here, for `lapis train` (plan: FILE) and `lapis graft --scale FILE`.
        html: Write a page with the scatter, the choice and the control.
        overwrite: Replace an existing plan or page.
        json: Print one JSON object.
    """
    from dataclasses import fields

    import torch

    from lapis.checkpoint.commit import check_file
    from lapis.cli.output import line, progress, show, write_page
    from lapis.errors import ConfigError
    from lapis.model.threads import settle_threads
    from lapis.planning.plan import plan as run
    from lapis.report.pages.plan import plan_page

    if out is not None:
        check_file(out, overwrite=overwrite)
    if html is not None:
        check_file(html, overwrite=overwrite, option="--html")
    if chats is not None:
        settle_threads(torch.device("cpu"))
    journal = None if out is None else out.parent / f".{out.name}.journal"
    if merge is not None:
        if base is not None or chat is not None or onto is not None or choices is not None:
            raise ConfigError("plan: a recipe names its models; leave --base, --chat, --onto and --choices out")
        _search(merge, chats, text, options, out, html, journal, overwrite=overwrite, json=json)
        return
    if base is None or chat is None:
        raise ConfigError("plan: give --base and --chat, or --merge RECIPE")
    how = {field.name: getattr(options, field.name) for field in fields(PlanOptions)}
    try:
        with progress("reading") as report:
            result = run(
                base, chat, chats=chats, text=text, choices=choices, onto=onto, **how,
                progress=lambda what, done, total: report(done, total, what),
                report=lambda words: line(f"plan: {words}", error=True), journal=journal,
            )  # fmt: skip
    except KeyboardInterrupt:
        if journal is None:
            line("plan: nothing is kept; with --out FILE a plan that was stopped goes on", error=True)
        elif journal.exists():
            line("plan: what was measured is kept; the same command goes on from there", error=True)
        raise
    if out is not None:
        result.save(out, overwrite=overwrite)
    if html is not None:
        write_page(plan_page(result.to_json()), html, overwrite=overwrite)
    show(result.to_json(), json, lambda: _print(result))


def _search(
    recipe: Path, chats: list[Path] | None, text: list[Path] | None, options: SearchOptions, out: Path | None,
    html: Path | None, journal: Path | None, *, overwrite: bool, json: bool,
) -> None:  # fmt: skip
    """A recipe's scales, searched, shown and written."""
    from lapis.cli.output import line, notes, progress, show, table, write_page
    from lapis.errors import ConfigError
    from lapis.planning.recipe_search import search_recipe
    from lapis.report.pages.recipe_search import search_page

    if chats is None:
        raise ConfigError("plan: a recipe is measured with chats; give --chats, and --text")
    with progress("reading") as report:
        result = search_recipe(
            recipe, chats, text, evaluations=options.evaluations, limit=options.limit, context=options.context,
            seed=options.seed, allow_unrelated=options.allow_unrelated,
            progress=lambda what, done, total: report(done, total, what), journal=journal,
        )  # fmt: skip
    if out is not None:
        result.save(out, overwrite=overwrite)
    if html is not None:
        write_page(search_page(result.to_json()), html, overwrite=overwrite)

    def render() -> None:
        names = [knob["name"] for knob in result.knobs]
        figures = [kind for kind in ("response_nll", "bits_per_byte") if kind in result.tried[0]]
        rows = [[way, *row["values"], *(row[kind] for kind in figures)] for way, row in result.confirmed.items()]
        headings = ["best of", *names, *(kind.replace("_", " ") for kind in figures)]
        table(f"on what was not searched on, after {result.evaluations} evaluations", headings, rows)
        line(result.finding())
        notes(result.notes)

    show(result.to_json(), json, render)


def _print(result: "PlanResult") -> None:
    """Every piece, the choice beside the control, and what was found, for people."""
    from lapis.cli.output import line, notes, number, table

    keys = [key for key in OF_A_PIECE if any(row.get(key) is not None for row in result.pieces)]
    table(
        "by piece",
        ["piece", "parameters", *(key.replace("_", " ") for key in keys), ""],
        [
            [
                row["layer"],
                row["parameters"],
                *(number(row.get(key)) for key in keys),
                " ".join(name for name in ("chosen", "control") if row[name]),
            ]
            for row in result.pieces
        ],
    )
    keys = [key for key in OF_A_SET if any(key in row for row in result.measured.values())]
    if keys:
        rows = [[name, *(row.get(key) for key in keys)] for name, row in result.measured.items()]
        table("measured", ["", *(key.replace("_", " ") for key in keys)], rows)
    line(result.finding())
    notes([*result.template_findings(), *result.notes])
