"""`lapis plan`: which layers to tune or merge, from the command line."""

from pathlib import Path
from typing import Literal


def plan(
    *,
    base: str,
    chat: str,
    goal: Literal["style", "knowledge"] = "style",
    budget: float = 0.25,
    chats: list[Path] | None = None,
    text: list[Path] | None = None,
    choices: Path | None = None,
    onto: str | None = None,
    cost: float = 0.03,
    embeddings: Literal["keep", "add"] = "add",
    pieces: Literal["layers", "halves", "components"] = "halves",
    sweeps: Literal["both", "in", "out"] = "both",
    spectra: bool = False,
    gradients: bool = True,
    replies: bool = True,
    limit: int = 64,
    context: int = 256,
    seed: int = 0,
    out: Path | None = None,
    html: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Which layers to tune or merge, for a goal and a budget, beside a random choice of the same size.

    Puts the difference chat - base of one piece after another into base, and takes it out of chat, and measures what
    that does to replies and to plain text.

    Args:
        base: The model that chat was tuned from.
        chat: Its chat version.
        goal: style changes how the model answers and leaves what it knows; knowledge the other way round.
        budget: Share of the blocks' parameters that may be chosen.
        chats: jsonl of chats to measure with; without them the choice rests on the tensors alone.
        text: Files of plain text that the model should not lose.
        choices: jsonl of questions of fact that it should not lose.
        onto: The model of a coming graft: measure there, and learn a scale for each piece.
        cost: By how much such a graft may make the text harder, as a share of its bits.
        embeddings: add: such a graft also has a scale for the token tables. keep: they stay.
        pieces: What is taken or left: whole layers, their halves (attn, mlp), or single components.
        sweeps: Put differences in, take them out, or both.
        spectra: Also ranks and signal-to-noise ratios of the differences. Slow.
        gradients: Also gradient x difference.
        replies: Also generate replies to see whether they end.
        limit: So many chats, and 128 tokens of text for each.
        context: Tokens of a chat or a window of text.
        seed: Of the random choice.
        out: Write the plan here, for `lapis train` (plan: FILE) and `lapis graft --scale FILE`.
        html: Write a page with the scatter, the choice and the control.
        overwrite: Replace an existing plan.
        json: Print one JSON object.
    """
    from lapis.checkpoint.commit import check_output
    from lapis.cli.output import line, notes, number, progress, show, table
    from lapis.planning.plan import plan as run

    if out is not None:
        check_output(out, overwrite=overwrite)
    with progress("reading") as report:
        found = run(
            base, chat, goal, budget, chats=chats, text=text, choices=choices, onto=onto, cost=cost,
            embeddings=embeddings, pieces=pieces, sweeps=sweeps, spectra=spectra, gradients=gradients,
            replies=replies, limit=limit, context=context,
            seed=seed, progress=lambda what, done, total: report(done, total, what),
        )  # fmt: skip
    if out is not None:
        found.save(out, overwrite=overwrite)
    if html is not None:
        found.to_html(html)

    def render() -> None:
        keys = ("style", "knowledge", "gradient_chats", "gradient_text", "relative_norm", "scale")
        kept = [key for key in keys if any(row.get(key) is not None for row in found.pieces)]
        table(
            "by piece",
            ["piece", "parameters", *(key.replace("_", " ") for key in kept), ""],
            [
                [
                    row["layer"],
                    row["parameters"],
                    *(number(row.get(key)) for key in kept),
                    " ".join(name for name in ("chosen", "control") if row[name]),
                ]
                for row in found.pieces
            ],
        )
        figures = ("style", "style_out", "knowledge", "response_nll", "bits_per_byte", "accuracy", "stop_rate")
        kept = [key for key in figures if any(key in row for row in found.measured.values())]
        if kept:
            rows = [[name, *(row.get(key) for key in kept)] for name, row in found.measured.items()]
            table("measured", ["", *(key.replace("_", " ") for key in kept)], rows)
        line(found.finding())
        notes(found.notes)

    show(found.to_json(), json, render)
