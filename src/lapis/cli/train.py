"""`lapis train`: a YAML file and key=value."""

from pathlib import Path


def train(
    config: Path,
    /,
    *settings: str,
    overwrite: bool = False,
    fresh: bool = False,
    html: Path | None = None,
    json: bool = False,
) -> None:
    """Train a model. A run that was interrupted goes on where it was saved, when the same command is given again.

    Args:
        config: A YAML file: objective, out, data, model (or new), tokenizer, steps (or minutes, epochs), lr, ... and
            the options of the objective.
        settings: key=value, each in place of what the file says.
        overwrite: Replace the output if it exists.
        fresh: Forget an interrupted run, and start anew.
        html: Write a page with the curves to this file.
        json: Print one JSON object.
    """
    from lapis.checkpoint.commit import check_output
    from lapis.cli.output import line, show
    from lapis.config import load_yaml, override
    from lapis.training.distributed.parallel import leads
    from lapis.training.objectives import objective_class
    from lapis.training.run import read_settings, run

    if html is not None:
        check_output(html, overwrite=overwrite, option="--html")
    how = read_settings(override(load_yaml(config), settings), str(config))
    result = run(how, overwrite=overwrite, fresh=fresh)
    head = objective_class(how.objective).head

    def render() -> None:
        text = f"{result.out}: {result.steps:,} steps, loss {result.loss:.3f}"
        if result.bits_per_byte is not None:
            text += f", {result.bits_per_byte:.3f} bits per byte"
        for name, value in result.held_out.items():
            text += f", held-out {name.replace('_', ' ')} {value:.4g}"
        line(f"{text}, {result.tokens_per_second:,.0f} tokens/s, {result.seconds:,.0f} s")
        for sentence in (result.overfitting, result.ended):
            if sentence:
                line(sentence)
        if head == "language":
            talks = objective_class(how.objective).name == "chat"
            line(f"next: lapis chat {result.out}" if talks else f'next: lapis generate {result.out} "..."', "dim")

    if html is not None and leads():
        from lapis.cli.output import write_page
        from lapis.report.pages.training import run_page
        from lapis.report.pages.working_folder import run_of

        written = run_of(result.out)
        write_page(run_page(written.log, written.facts, written.name), html, overwrite=overwrite)
    if leads():
        show({"out": str(result.out), **result.figures()}, json, render)
