"""lapis tour: the whole story, and its table."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lapis.errors import ConfigError


def tour(
    *,
    minutes: float | None = None,
    language: str = "ms",
    data: Path | None = None,
    real: Annotated[bool, Parameter(negative="")] = False,
    model: str | None = None,
    chat: str | None = None,
    tokens: int | None = None,
    out: Path | None = None,
    seed: int = 0,
    precision: Literal["auto", "float32", "bf16"] = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Build a language model, teach it to chat, move it to another language, graft, measure, show.

    A tour learns a fixed number of tokens, so it ends alike on every machine; how long it takes is shown at its start.
    The same command again goes on where a tour was stopped, and shows the table of one that is done.
    With --real a public model is tuned, moved, grafted and measured in place of one that is built here.

    Parameters
    ----------
    minutes: the size of the story: about what it takes on two cores with bfloat16 instructions, 5 by default; more on
        others.
    language: the language to move to: ms, ko, uk or zh; with real text, any that the folder holds.
    data: a folder of real text (corpus/LANGUAGE/*.jsonl, instruct/LANGUAGE.jsonl) in place of the built-in world.
    real: tell the story about --model, on real text: that of --data, or of the folder that LAPIS_DATA names.
    model: with --real: the model that it begins with, a folder or a hub id.
    chat: with --real: its chat version; by default it is tuned on the English chats.
    tokens: with --real: to learn, 30,000 by default, about ten minutes of two cores for 135 million parameters.
    out: where models and report go, runs/tour by default, with --real runs/real.
    seed: of the world, the weights and the order of the data.
    precision: of training; auto takes bf16 where the processor has instructions for it, else float32.
    json: print one JSON object.
    """
    from lapis.cli.output import line, show, table
    from lapis.tour.page import LABELS, MEANS, advice, sentence
    from lapis.tour.real.run import RealTour, real_tour
    from lapis.tour.run import Tour
    from lapis.tour.run import tour as run

    built, public = {"minutes": minutes}, {"model": model, "chat": chat, "tokens": tokens}
    if name := next((name for name, value in (built if real else public).items() if value is not None), None):
        why = "sizes the story that is built here; give --tokens" if real else "belongs to a tour about a model: --real"
        raise ConfigError(f"tour: --{name} {why}")
    shared = {"language": language, "data": data, "out": out, "seed": seed, "precision": precision}
    given: dict[str, Any] = {name: value for name, value in {**shared, **built, **public}.items() if value is not None}
    try:
        findings = real_tour(RealTour(**given)) if real else run(Tour(**given))
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
