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
        config: A YAML file: objective, out, data, model (or new), tokenizer, steps (or minutes, epochs), lr, ...
        settings: key=value, each in place of what the file says.
        overwrite: Replace the output if it exists.
        fresh: Forget an interrupted run, and start anew.
        json: Print one JSON object.
    """
    from lapis.cli.output import console, show
    from lapis.config import build, load_yaml, override
    from lapis.train.run import RunConfig, run

    built = build(RunConfig, override(load_yaml(config), settings), str(config))
    result = run(built, overwrite=overwrite, fresh=fresh)
    figures = {name: value for name, value in vars(result).items() if name not in ("out", "log")}

    def render() -> None:
        said = f"{result.out}: {result.steps:,} steps, loss {result.loss:.3f}"
        if result.bits_per_byte is not None:
            said += f", {result.bits_per_byte:.3f} bits per byte"
        console.print(f"{said}, {result.tokens_per_second:,.0f} tokens/s, {result.seconds:,.0f} s", markup=False)
        console.print(f'next: lapis generate {result.out} "..."', style="dim", markup=False)

    show({"out": str(result.out), **figures}, json, render)
