"""`lapis plan`: which layers to tune or merge, from the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lapis.planning.options import PlanOptions

if TYPE_CHECKING:
    from lapis.planning.result import PlanResult

OF_A_PIECE = ("style", "knowledge", "gradient_chats", "gradient_text", "relative_norm", "scale")
OF_A_SET = ("style", "style_out", "knowledge", "response_nll", "bits_per_byte", "accuracy", "stop_rate")


def plan(
    *,
    base: str,
    chat: str,
    chats: list[Path] | None = None,
    text: list[Path] | None = None,
    choices: Path | None = None,
    onto: str | None = None,
    options: Annotated[PlanOptions, Parameter(name="*")] = PlanOptions(),  # noqa: B008
    out: Path | None = None,
    html: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Which layers to tune or merge, for a goal and a budget, beside random choices of the same size.

    Puts the difference chat - base of one piece after another into base, and takes it out of chat, and measures what
    that does to replies and to plain text. Says first what that costs. With --out, a plan that was stopped or killed
    goes on where it was when the same command is given again.

    Args:
        base: The model that chat was tuned from.
        chat: Its chat version.
        chats: jsonl of chats to measure with; without them the choice rests on the tensors alone.
        text: Files of plain text that the model should not lose.
        choices: jsonl of questions of fact that it should not lose.
        onto: The model of a coming graft: measure there, and learn a scale for each piece.
        out: Write the plan here, for `lapis train` (plan: FILE) and `lapis graft --scale FILE`.
        html: Write a page with the scatter, the choice and the control.
        overwrite: Replace an existing plan or page.
        json: Print one JSON object.
    """
    from dataclasses import asdict

    import torch

    from lapis.checkpoint.commit import check_output
    from lapis.cli.output import line, progress, show, write_page
    from lapis.model.threads import settle_threads
    from lapis.planning.plan import plan as run
    from lapis.report.pages.plan import plan_page

    if out is not None:
        check_output(out, overwrite=overwrite)
    if html is not None:
        check_output(html, overwrite=overwrite, option="--html")
    if chats is not None:
        settle_threads(torch.device("cpu"))
    journal = None if out is None else out.parent / f".{out.name}.journal"
    try:
        with progress("reading") as report:
            result = run(
                base, chat, chats=chats, text=text, choices=choices, onto=onto, **asdict(options),
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
