"""`lapis train`: a YAML file and key=value."""

from pathlib import Path


def train(
    config: Path,
    /,
    *settings: str,
    overwrite: bool = False,
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Train a model. A run that was interrupted goes on where it was saved, when the same command is given again.

    Args:
        config: A YAML file: objective, out, data, model (or new), tokenizer, steps (or minutes, epochs), lr, ... and
            the options of the objective.
        settings: key=value, each in place of what the file says.
        overwrite: Replace the output if it exists.
        fresh: Forget an interrupted run, and start anew.
        json: Print one JSON object.
    """
    from lapis.cli.output import console, show
    from lapis.config import load_yaml, override
    from lapis.train.run import read_settings, run

    result = run(read_settings(override(load_yaml(config), settings), str(config)), overwrite=overwrite, fresh=fresh)

    def render() -> None:
        said = f"{result.out}: {result.steps:,} steps, loss {result.loss:.3f}"
        if result.bits_per_byte is not None:
            said += f", {result.bits_per_byte:.3f} bits per byte"
        for name, value in result.held_out.items():
            said += f", held-out {name.replace('_', ' ')} {value:.4g}"
        console.print(f"{said}, {result.tokens_per_second:,.0f} tokens/s, {result.seconds:,.0f} s", markup=False)
        console.print(f'next: lapis generate {result.out} "..."', style="dim", markup=False)

    show({"out": str(result.out), **result.figures()}, json, render)
