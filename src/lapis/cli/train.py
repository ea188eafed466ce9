"""`lapis train`: a YAML file and key=value."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lapis.errors import ConfigError
from lapis.training.forecast.options import ForecastOptions
from lapis.wording import format_count

if TYPE_CHECKING:
    from lapis.training.forecast.measured import Forecast
    from lapis.training.forecast.paper import PaperForecast
    from lapis.training.run import RunConfig


def train(
    config: Path,
    /,
    *settings: str,
    overwrite: bool = False,
    fresh: bool = False,
    allow_change: Annotated[list[str] | None, Parameter(negative="")] = None,
    html: Path | None = None,
    costs: Annotated[ForecastOptions, Parameter(name="*")] = ForecastOptions(),  # noqa: B008
    json: bool = False,
) -> None:
    """Train a model. A run that was interrupted goes on where it was saved, when the same command is given again.

    Args:
        config: A YAML file: objective, out, data, model (or new), tokenizer, steps (or minutes, epochs), lr, ... and
            the options of the objective.
        settings: key=value, each in place of what the file says.
        overwrite: Replace the output if it exists.
        fresh: Forget an interrupted run, and start anew.
        allow_change: A key in which this run may differ from the interrupted one that it goes on with, such as lr or
            data; once for each.
        html: Write a page with the curves to this file.
        json: Print one JSON object.
    """
    from lapis.checkpoint.commit import check_file
    from lapis.cli.output import line, show, size
    from lapis.config import load_yaml, override
    from lapis.training.distributed.parallel import join, leads
    from lapis.training.loop.progress import format_time
    from lapis.training.objectives import objective_class
    from lapis.training.run import read_settings, run

    def read() -> "tuple[RunConfig, bool]":
        if costs.plan_only:
            refuse_beside_plan({"--html": html, "--fresh": fresh, "--allow-change": " ".join(allow_change or ())})
        if html is not None:
            check_file(html, overwrite=overwrite, option="--html")
        given = override(load_yaml(config), settings)
        return read_settings(given, str(config)), "batch" not in given and "accumulate" not in given

    world = join()  # first of all, so that what is wrong for all of them is told once
    how, choose_batch = world.together(read)
    if costs.plan_only:
        command = ["lapis", "train", str(config), *settings]
        world.together(lambda: show_costs(how, command, costs, json, choose_batch=choose_batch))
        return
    result = run(how, overwrite=overwrite, fresh=fresh, allow_change=allow_change or ())
    head = objective_class(how.objective).head

    def format_cost(figures: Mapping[str, Any]) -> str:
        steps = f"{format_count(int(figures['steps']), 'step')}, " if "steps" in result.predicted else ""
        return f"{steps}{format_time(figures['seconds'])} and {size(figures['memory_bytes'])}"

    def render() -> None:
        text = f"{result.out}: {format_count(result.steps, 'step')}, loss {result.loss:.3f}"
        if result.bits_per_byte is not None:
            text += f", {result.bits_per_byte:.3f} bits per byte"
        for name, value in result.held_out.items():
            text += f", held-out {name.replace('_', ' ')} {value:.4g}"
        line(f"{text}, {result.tokens_per_second:,.0f} tokens/s, {result.seconds:,.0f} s")
        if result.predicted:
            after = format_count(int(result.predicted["after_steps"]), "step")
            expected, taken = format_cost(result.predicted), format_cost(vars(result))
            line(f"predicted after {after}: {expected}; it took {taken}", "dim")
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


def refuse_beside_plan(given: Mapping[str, Path | str | bool | None]) -> None:
    """Raises ConfigError for an option of a run, by its name, that has a value."""
    for option, value in given.items():
        if value:
            shown = option if value is True else f"{option} {value}"
            raise ConfigError(
                f"train: {shown} has no effect with --plan-only, which writes nothing and looks at no earlier run; "
                "leave it out"
            )


def show_costs(
    how: "RunConfig", command: list[str], costs: ForecastOptions, json: bool, *, choose_batch: bool
) -> None:  # fmt: skip
    """What the run will take: on paper for GPUs that are not here, measured on this machine else.

    command: What starts the run, without options.
    """
    from lapis.cli.output import show
    from lapis.training.forecast.budget import Budget
    from lapis.training.run import plan, plan_on_paper

    if costs.gpus is not None:
        paper = plan_on_paper(how, costs)
        show(paper.to_json(), json, lambda: render_paper(paper))
        return
    budget = None if costs.budget is None else Budget.parse(costs.budget)
    measured = plan(how, budget, choose_batch=choose_batch)
    show(measured.to_json(), json, lambda: render_measured(measured, command))


def render_measured(forecast: "Forecast", command: list[str]) -> None:
    from lapis.cli.output import line, size, table
    from lapis.training.loop.progress import format_time

    threads = format_count(forecast.threads, "thread")
    evaluation = f", {forecast.seconds_per_evaluation:.3g} s for an evaluation" * (forecast.seconds_per_evaluation > 0)
    pace = f"{forecast.seconds_per_step:.3g} s for a step{evaluation}; {threads}, {forecast.precision}"
    work = (
        f"{format_count(forecast.steps, 'step')}, {format_count(forecast.tokens, 'token')}, {forecast.flops:.3g} FLOPs"
    )
    line(f"{work}: about {format_time(forecast.seconds)} ({pace})", "bold")
    memory = forecast.memory
    rows = [(name, size(value)) for name, value in vars(memory).items() if value]
    table("Memory at its peak", ("of", "bytes"), [*rows, ("in all", size(memory.total))])
    line(f"a checkpoint: {size(forecast.checkpoint_bytes)} on disk, {forecast.seconds_per_checkpoint:.2g} s")
    if forecast.settings:
        others = [word for word in command[3:] if word.partition("=")[0] not in forecast.settings]
        line(f"within the budget: {shlex.join([*command[:3], *others, *forecast.assignments])}")


def render_paper(forecast: "PaperForecast") -> None:
    from lapis.cli.output import line, size, table
    from lapis.training.loop.progress import format_time

    bound = "computing" if forecast.computing >= forecast.communicating else "the network"
    reached = f"{forecast.tokens_per_second:,.0f} tokens a second on each, {forecast.mfu:.0%} of their FLOPs"
    line(
        f"{forecast.parameters / 1e9:,.2f} B parameters on {forecast.gpus:,} GPUs: {reached}, bound by {bound}", "bold"
    )
    parts = f"computing {forecast.computing:.3g}, communicating {forecast.communicating:.3g}"
    each = f"{forecast.seconds_per_step:.3g} s ({parts}: {size(forecast.bytes_per_step)} by each GPU)"
    line(f"a step of {forecast.tokens_per_step:,} tokens: {each}")
    if forecast.updating:
        line(f"of it {forecast.updating:.3g} s for Muon's updates, which each GPU gathers and makes orthogonal")
    if forecast.steps:
        line(f"{format_count(forecast.steps, 'step')}: about {format_time(forecast.seconds_per_step * forecast.steps)}")
    sent = [(name, size(value)) for name, value in forecast.bytes_by_part.items() if value]
    table("Sent by a GPU", ("of", "bytes"), [*sent, ("in all", size(forecast.bytes_per_step))])
    rows = [(name, size(value)) for name, value in forecast.memory_bytes.items()]
    table("Memory of a GPU", ("of", "bytes"), [*rows, ("in all", size(sum(forecast.memory_bytes.values())))])
    line(f"a checkpoint: {size(forecast.checkpoint_bytes)} on disk")
    if not forecast.fits:
        line(f"does not fit; give {forecast.levers}")
    line("counted as shard: full shares every weight out; no figure of a GPU stands behind it yet", "dim")
