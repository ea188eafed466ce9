"""`lapis lens`: what every layer would say next, from the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from lapis.generation.options import Runtime
from lapis.inside.lens.options import LensOptions

if TYPE_CHECKING:
    from lapis.inside.compared.patching import Patching
    from lapis.inside.lens.side_by_side import Opened
    from lapis.inside.lens.table import LensTrace
    from lapis.inside.lens.tuned import TunedLens


def lens(
    model: str,
    prompt: str,
    /,
    *,
    track: str = "",
    against: str | None = None,
    head: Literal["own", "swapped"] = "own",
    patch: bool = False,
    chat: bool = False,
    options: Annotated[LensOptions, Parameter(name="*")] = LensOptions(),  # noqa: B008
    tuned: Path | None = None,
    tune: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    html: Path | None = None,
    overwrite: bool = False,
    runtime: Annotated[Runtime, Parameter(name="*")] = Runtime(),  # noqa: B008
    json: bool = False,
) -> None:
    """Show what each layer would say next, and how tracked words rank on the way.

    Args:
        model: A model folder.
        prompt: The text to look into; what spells a special token is plain text.
        track: Words, parted by commas; without it, the words that are best in any layer.
        against: A second model on the same prompt, side by side.
        head: With --against: whether each model is read by its own head or by the other's.
        patch: With --against: put each state of the second model into the first, one at a time, and show what that does
            to the probability of the tracked words. A pass for each layer and token.
        chat: Put the prompt into the model's chat template, as a user's turn.
        tuned: A tuned lens: a folder with one map per layer. With --tune it is made there first.
        tune: Text files from which to make the tuned lens, in about a minute.
        html: Write a page with the pictures to this file; its grid has the last 24 tokens.
        overwrite: Replace an existing page or tuned lens.
        json: Print one JSON object.
    """
    from lapis.checkpoint.commit import check_file, check_output
    from lapis.cli.output import line, progress, show
    from lapis.errors import ConfigError
    from lapis.generation.ready import choose_common_dtype, choose_device
    from lapis.inside.lens.logit_lens import lens as run
    from lapis.inside.lens.side_by_side import open_models, side_by_side
    from lapis.model.threads import settle_threads
    from lapis.model.transformer import Transformer

    if head == "swapped" and against is None:
        raise ConfigError("lens: --head swapped is for --against MODEL2; there is no other head")
    if patch and against is None:
        raise ConfigError("lens: --patch is for --against MODEL2, from which the states are")
    if against is not None and tuned is not None:
        raise ConfigError("lens: a tuned lens belongs to one model; leave out --tuned or --against")
    if tune and tuned is None:
        raise ConfigError("lens: --tune makes a tuned lens; say with --tuned DIR where it is to lie")
    sources = [model, *([against] if against else [])]
    if html is not None:
        check_file(html, overwrite=overwrite, inputs=sources, option="--html")
    if tune and tuned is not None:
        check_output(tuned, overwrite=overwrite, inputs=sources, option="--tuned")
    turns: Any = [{"role": "user", "content": prompt}] if chat else prompt
    if html is not None:
        options = options.for_page()
    device = choose_device(runtime.device)
    settle_threads(device)
    dtype, remarks = choose_common_dtype(sources, runtime.dtype, device)
    for remark in remarks:
        line(f"note: {remark}", "dim", error=True)
    with progress("reading " + " and ".join(sources)):
        opened = open_models(sources, turns, track, device=device, dtype=dtype)
    for remark in dict.fromkeys(
        note for each in opened if not isinstance(each.model, Transformer) for note in each.model.notes
    ):
        line(f"note: {remark}", "dim", error=True)
    maps = _tuned_lens(opened[0], tuned, tune, overwrite)
    with progress("running the prompt"):
        if against is None:
            first = opened[0]
            traces = [run(first.model, first.tokenizer, turns, track, options, tuned=maps, name=model)]
        else:
            one, other = opened
            traces = list(side_by_side(one, other, turns, track, options=options, swapped=head == "swapped"))
    result = traces[0].to_json()
    if against is not None:
        result["against"] = traces[1].to_json()
    patching = _patching(opened, turns, track, options.positions) if patch else None
    if patching is not None:
        result["patch"] = patching.to_json()

    def render() -> None:
        for trace in traces:
            line(f"{trace.model}\n{trace}\n")
            _print_contributions(trace)
        if patching is not None:
            line(patching)

    if html is not None:
        with progress("drawing"):
            _write_page(opened[0], traces, patching, html, overwrite)
    show(result, json, render)


def _tuned_lens(opened: "Opened", folder: Path | None, files: list[Path] | None, overwrite: bool) -> "TunedLens | None":
    """The tuned lens of a folder, made first where there are files to make it from."""
    from lapis.cli.output import progress
    from lapis.inside.lens.tuned import TunedLens, tune

    if folder is None:
        return None
    if files:
        with progress("tuning the lens", "tokens") as report:
            lens = tune(opened.model, opened.tokenizer, files, name=opened.name, progress=report)
        lens.save(folder, overwrite=overwrite)
    return TunedLens.open(folder)


def _print_contributions(trace: "LensTrace") -> None:
    """The parts that did most for the word that leads, or against it."""
    from lapis.cli.output import line, table

    words = trace.leading(1)
    rows = sorted(trace.contribution_rows(words[0]), key=lambda row: -abs(row["logit"]))[:8] if words else []
    if rows:
        line(trace.contributions_finding(words))
        table("", ["part", "added to the logit"], [[row["label"], f"{row['logit']:+.3f}"] for row in rows])


def _patching(opened: "list[Opened]", prompt: Any, track: str, places: int | None) -> "Patching":
    """What one state of the second model, put into the first, does to the words."""
    from lapis.cli.output import progress
    from lapis.inside.compared.patching import patch
    from lapis.inside.lens.options import GRID

    one, other = opened
    with progress("exchanging states", "passes") as report:
        return patch(
            one.model, other.model, one.tokenizer, prompt, track, places=places or GRID,
            other_tokenizer=other.tokenizer, names=(one.name, other.name), progress=report,
        )  # fmt: skip


def _write_page(
    opened: "Opened", traces: "list[LensTrace]", patching: "Patching | None", path: Path, overwrite: bool
) -> None:  # fmt: skip
    from lapis.cli.output import write_page
    from lapis.inside.attention_map import maps_of
    from lapis.inside.compared.page import add_patching
    from lapis.inside.page import make_page, strongest_heads
    from lapis.inside.trace import anatomy

    heads = strongest_heads(traces[0])
    maps = maps_of(anatomy(opened.model, opened.name), traces[0].ids, traces[0].tokens, heads) if heads else []
    page = make_page(traces, maps)
    if patching is not None:
        add_patching(page, patching)
    write_page(page, path, overwrite=overwrite)
