"""`lapis explain`: what a model does with a text, on one page."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from lapis.generation.options import Runtime
from lapis.inside.explain.options import ExplainOptions


def explain(
    model: str,
    text: str,
    /,
    *,
    against: str | None = None,
    track: str = "",
    chat: bool = False,
    options: Annotated[ExplainOptions, Parameter(name="*")] = ExplainOptions(),  # noqa: B008
    html: Path | None = None,
    overwrite: bool = False,
    runtime: Annotated[Runtime, Parameter(name="*")] = Runtime(),  # noqa: B008
    json: bool = False,
) -> None:
    """Explain what a model does with a text: the way of a token, attention, blocks, sampling and cost, on one page.

    Args:
        model: A model folder.
        text: The text; what spells a special token in it is plain text.
        against: A second model on the same text: where the two part.
        track: Words, parted by commas, whose ranks are followed; without it, the words that lead in any layer.
        chat: Put the text into the model's chat template, as a user's turn.
        html: Write the page to this file.
        overwrite: Replace an existing page.
        json: Print one JSON object.
    """
    from lapis.checkpoint.commit import check_file
    from lapis.cli.output import line, progress, show, write_page
    from lapis.generation.ready import choose_common_dtype, choose_device
    from lapis.inside.explain.explain import explain as run
    from lapis.inside.lens.side_by_side import open_models
    from lapis.model.threads import settle_threads

    sources = [model, *([against] if against else [])]
    if html is not None:
        check_file(html, overwrite=overwrite, inputs=sources, option="--html")
    turns: Any = [{"role": "user", "content": text}] if chat else text
    device = choose_device(runtime.device)
    settle_threads(device)
    dtype, remarks = choose_common_dtype(sources, runtime.dtype, device)
    for remark in remarks:
        line(f"note: {remark}", "dim", error=True)
    with progress("reading " + " and ".join(sources)) as report:
        opened = open_models(sources, turns, track, device=device, dtype=dtype)
        for remark in dict.fromkeys(note for each in opened for note in each.model.notes):
            line(f"note: {remark}", "dim", error=True)
        first, other = opened[0], opened[-1]
        result = run(
            first.model, first.tokenizer, turns, track, options, names=(model, against or ""), report=report.stage,
            against=(other.model, other.tokenizer) if against else None,
        )  # fmt: skip

    def render() -> None:
        line(str(result))
        if html is None:
            line("for the page: --html FILE", "dim")

    if html is not None:
        write_page(result.page(), html, overwrite=overwrite)
    show(result.to_json(), json, render)
