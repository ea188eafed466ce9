"""lapis tour: the whole story, and its table."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def tour(
    *,
    minutes: float = 5.0,
    language: str = "ms",
    data: Path | None = None,
    out: Path = Path("runs/tour"),
    seed: int = 0,
    precision: Literal["auto", "float32", "bf16"] = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Build a language model, teach it to chat, move it to another language, graft, measure, show.

    A tour learns a fixed number of tokens, so it ends alike on every machine; how long it takes is shown at its start.
    The same command again goes on where a tour was stopped, and shows the table of one that is done.

    Parameters
    ----------
    minutes: the size of the story: about what it takes on two cores with bfloat16 instructions; more on others.
    language: the language to move to: ms, ko, uk or zh; with --data, any that the folder holds.
    data: a folder of real text (corpus/LANGUAGE/*.jsonl, instruct/LANGUAGE.jsonl) in place of the built-in world.
    out: where models and report go.
    seed: of the world, the weights and the order of the data.
    precision: of training; auto takes bf16 where the processor has instructions for it, else float32.
    json: print one JSON object.
    """
    from lapis.cli.output import line, show, table
    from lapis.tour.page import LABELS, MEANS, advice, sentence
    from lapis.tour.run import Tour
    from lapis.tour.run import tour as run

    try:
        findings = run(Tour(minutes, language, data, out, seed, precision))
    except KeyboardInterrupt:
        line("What is done is kept. The same command again goes on.", error=True)
        raise

    def render() -> None:
        line(sentence(findings))
        if advice(findings):
            line(f"\n{advice(findings)}")
        line()
        for code in reversed(findings["languages"]):
            rows = [[model, *(part[code][key] for key in LABELS)] for model, part in findings["scores"].items()]
            table(findings["names"][code], ["model", *LABELS.values()], rows)
            line()
        for key, label in LABELS.items():
            line(f"{label:<13}{MEANS[key]}", "dim")
        line(f"\nreport   {findings['report']}")
        line(f"models   {', '.join(findings['models'].values())}")
        line(f"\nnext     lapis chat {findings['models']['grafted']}")
        line(f"         lapis diff {findings['models']['base']} {findings['models']['chat']}")

    show(findings, json, render)
