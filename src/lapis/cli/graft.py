"""`lapis graft`: the chat vector from the command line."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lapis.cli.output import line, notes, progress, show, size
from lapis.cli.system_errors import system_error
from lapis.errors import CheckpointError, LapisError
from lapis.weights.options import GraftOptions
from lapis.wording import format_count

if TYPE_CHECKING:
    from lapis.weights.engine.job import MergeResult

LOSS = 0.05  # share of a difference, lost to rounding, that is worth a hint


def graft(
    *,
    base: str,
    chat: Annotated[list[str], Parameter(negative="")],
    onto: str,
    out: str,
    scale: Annotated[list[str] | None, Parameter(negative="")] = None,
    options: Annotated[GraftOptions, Parameter(name="*")] = GraftOptions(),  # noqa: B008
    smoke: bool = True,
    json: bool = False,
) -> None:
    """Write onto + scale * (chat - base): a model's ability to chat, added to another by arithmetic on weights.

    Args:
        base: The model that chat was tuned from.
        chat: Its chat version. Given several times, their differences are stacked.
        onto: The continuation of base that is to chat.
        out: A new folder.
        scale: 1.0, or 0-7=0.5,8-23=1, or attn=1,mlp=0.5, or a YAML file; one for all chats, or one for each.
        smoke: Before the result is put in place, load it, onto and chat, and compare their predictions on a few prompts
            (fewer for larger models: it computes for about two seconds); --no-smoke leaves it out.
        json: Print one JSON object.
    """
    from lapis.weights.graft.graft import graft as run

    make = partial(run, base, chat, onto, out, scale or ["1.0"])
    make_and_show(make, out, {"onto": onto, "chat": chat[0]}, "grafting", options, smoke=smoke, json=json)


def make_and_show(
    make: Callable[..., "MergeResult"], out: str, parents: Mapping[str, str], what: str, options: GraftOptions, *,
    smoke: bool, json: bool,
) -> None:  # fmt: skip
    """Makes a graft under a progress bar, tries it out before it is put in place, and prints what was done.

    Args:
        make: Called with the options, `check` and `progress`.
        out: The new folder.
        parents: What its predictions are compared with, by role.
        what: Names the bar.
        options: How it is made.
        smoke: Whether it is tried out.
        json: Print one JSON object.
    """
    agreed: dict[str, Any] = {}
    with ExitStack() as bars:

        def check(folder: Path) -> None:
            bars.close()  # the bar of what is written
            agreed.update(_tried_out(folder, out, parents))

        report = bars.enter_context(bar(what))
        result = make(**asdict(options), check=check if smoke else None, progress=report)
    result.smoke = agreed or None
    show(result.to_json(), json, lambda: print_result(result))


def _tried_out(folder: Path, out: str, parents: Mapping[str, str]) -> dict[str, Any]:
    """How far the predictions of what is being committed are from its parents', or why that is not known.

    Raises CheckpointError where they are no numbers: such a model is not committed.
    """
    import torch

    from lapis.evaluation.agree import agreement
    from lapis.model.threads import settle_threads

    settle_threads(torch.device("cpu"))
    with progress("trying the result out") as report:
        try:
            agreed = agreement(folder, parents, name=os.path.basename(out), progress=report)
        except (LapisError, OSError, MemoryError) as error:
            agreed = {"skipped": system_error(error) or str(error)}
    if agreed.get("finite") is False:
        raise CheckpointError(
            f"{out}: its predictions would be no numbers, so nothing was written; try a smaller --scale, or look at "
            "the inputs with lapis diff; --no-smoke writes it all the same"
        )
    return {key: value.replace(str(folder), out) if key == "skipped" else value for key, value in agreed.items()}


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for jobs that count bytes of output; yields progress(done, total)."""
    with progress(what, "bytes") as report:
        try:
            yield report
        except KeyboardInterrupt:
            line("what is finished is kept: the same command goes on from there", error=True)
            raise


def print_result(result: "MergeResult") -> None:
    """What a graft, a merge or a fuse did, in a few lines."""
    counts = ", ".join(f"{format_count(number, 'tensor')} {action}" for action, number in result.tensors.items())
    if result.dry_run:
        needs = result.needs
        line(f"would write {result.out}: {counts}")
        line(f"needs {size(needs['disk_bytes'])} of disk and {size(needs['memory_bytes'])} of buffers")
        for part in result.division or ():
            if part["parts"] and part["processes"] <= result.division[0]["parts"]:  # type: ignore[index]
                each = "the busiest of them " if part["processes"] > 1 else ""
                moved = f"reads {size(part['read_bytes'])} and writes {size(part['written_bytes'])}"
                line(
                    f"{format_count(part['processes'], 'process', 'processes')}: {each}{moved}, in "
                    f"{format_count(part['parts'], 'part')}"
                )
    else:
        line(f"{result.out}: {counts}" + (" (why: lapis-merge.json)" if result.tensors.get("skipped") else ""))
        resumed = f" ({size(result.bytes_resumed)} were there from before)" if result.bytes_resumed else ""
        line(
            f"read {size(result.bytes_read)}, wrote {size(result.bytes_written)}{resumed} in {result.seconds:.1f} s; "
            f"peak memory {size(result.peak_memory_bytes)}"
        )
    if result.lost_to_rounding is not None:
        hint = "; --dtype float32 keeps it" if result.lost_to_rounding > LOSS else ""
        line(f"rounding took {result.lost_to_rounding:.2%} of the difference (by norm){hint}")
    if result.nonfinite:
        line(f"{result.nonfinite:,} NaN or Inf were kept")
    if result.smoke:
        line(format_smoke(result.smoke))
    notes(result.notes)


def format_smoke(seen: Mapping[str, Any]) -> str:
    """What a trial of a result saw, as one line."""
    if "skipped" in seen:
        return f"not tried out: {seen['skipped']}"
    distances = [
        f"{kl:.3g} nats from {name}" if kl is not None else f"{name} reads the prompts as other tokens"
        for name, kl in seen["kl_from"].items()
    ]
    material = f"{seen['tokens']} tokens of {seen['prompts']} prompts"
    apart = (
        f"; {' and '.join(names)}: on a server, and not downloaded for this" if (names := seen["on_servers"]) else ""
    )
    predictions = f"{', '.join(distances)} (KL per token)" if distances else "numbers"
    return f"tried out on {material}: its predictions are {predictions}{apart}"
