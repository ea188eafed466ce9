"""lapis tour: the whole story, and its table."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def tour(
    *,
    minutes: float = 5.0,
    language: str = "ms",
    data: Path | None = None,
    out: Path = Path("runs/tour"),
    seed: int = 0,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Build a language model, teach it to chat, move it to another language, graft, measure, show.

    The same command again goes on where a tour was stopped, and shows the table of one that is done.

    Parameters
    ----------
    minutes: of training; the whole takes about half as long again.
    language: the language to move to: ms, ko, uk or zh; with --data, any that the folder holds.
    data: a folder of real text (corpus/LANGUAGE/*.jsonl, instruct/LANGUAGE.jsonl) in place of the built-in world.
    out: where models and report go.
    seed: of the world, the weights and the order of the data.
    json: print one JSON object.
    """
    from lapis.cli.output import console, show, stderr, table
    from lapis.tour.recipe import Tour
    from lapis.tour.recipe import tour as run

    found = run(Tour(minutes, language, data, out, seed), lambda text: stderr.print(f"[bold]{text}[/bold]"))

    def render() -> None:
        for code, name in found["names"].items():
            rows = [
                [
                    model,
                    part[code]["bits_per_byte"],
                    part[code]["response_nll"],
                    part[code]["stop_rate"],
                    part[code]["answers"],
                ]
                for model, part in found["scores"].items()
            ]
            table(name, ["model", "bits/byte", "response NLL", "stops", "right"], rows)
            console.print()
        for code, gap in found["gap_closed"].items():
            said = "has no gap to close" if gap is None else f"closed {gap:.0%} of the gap from adapted to tuned"
            console.print(f"{found['names'][code]}: the graft at scale {found['scale']:g} {said}")
        target = found["names"][found["languages"][1]]
        console.print(f"{target} text became {found['cost']:+.1%} more costly to predict")
        console.print(f"\nreport   {found['report']}")
        console.print(f"models   {', '.join(found['models'].values())}")
        console.print(f"\nnext     lapis chat {found['models']['grafted']}")
        console.print(f"         lapis diff {found['models']['base']} {found['models']['chat']}")

    show(found, json, render)
