"""`lapis delta`: chat vectors as files from the command line."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lapis.cli.graft import bar, format_smoke, make_and_show
from lapis.cli.output import line, notes, progress, show, size, table
from lapis.cli.system_errors import system_error
from lapis.errors import LapisError
from lapis.weights.options import ExtractOptions, GraftOptions
from lapis.wording import format_count

if TYPE_CHECKING:
    from lapis.weights.delta.extract import DeltaResult
    from lapis.weights.delta.file import DeltaFile

WORST = 8  # tensors whose error is shown
CHATS = 64  # whose replies are read


def extract(
    *,
    base: str,
    chat: str,
    out: str,
    options: Annotated[ExtractOptions, Parameter(name="*")] = ExtractOptions(),  # noqa: B008
    smoke: bool = True,
    chats: list[Path] | None = None,
    json: bool = False,
) -> None:
    """Write chat - base as a folder that `lapis delta apply` adds to a model: a chat vector as a file.

    Args:
        base: The model that chat was tuned from.
        chat: Its chat version.
        out: A new folder.
        smoke: At the end compare the predictions of base + delta with those of base + (chat - base) on a few prompts
            (fewer for larger models); --no-smoke leaves it out.
        chats: jsonl of held-out chats: also say how likely both find the replies (the first 64 chats).
        json: Print one JSON object.
    """
    from lapis.weights.delta.extract import delta_extract

    with bar("extracting") as report:
        result = delta_extract(base, chat, out, **asdict(options), progress=report)
    if smoke and not options.dry_run:
        result.check = _compared(base, chat, out, chats)
    show(result.to_json(), json, lambda: _print_extracted(result))


def apply(
    *deltas: str,
    onto: str,
    out: str,
    scale: Annotated[list[str] | None, Parameter(negative="")] = None,
    options: Annotated[GraftOptions, Parameter(name="*")] = GraftOptions(),  # noqa: B008
    smoke: bool = True,
    json: bool = False,
) -> None:
    """Write onto + scale * delta: what `lapis graft` does, with the chat vector from a file.

    Args:
        deltas: Folders of `lapis delta extract`. Several are added up.
        onto: The base of the deltas, or a continuation of it.
        out: A new folder.
        scale: 1.0, or 0-7=0.5,8-23=1, or attn=1,mlp=0.5, or a YAML file; one for all deltas, or one for each.
        smoke: At the end load the result and onto, and compare their predictions on a few prompts; --no-smoke leaves it
            out.
        json: Print one JSON object.
    """
    from lapis.errors import ConfigError
    from lapis.weights.delta.apply import delta_apply

    if not deltas:
        raise ConfigError("delta apply: needs a delta; lapis delta extract makes one")
    make = partial(delta_apply, list(deltas), onto, out, scale or ["1.0"])
    make_and_show(make, out, {"onto": onto}, "applying", options, smoke=smoke, json=json)


def show_delta(delta: str, /, *, json: bool = False) -> None:
    """Say what a delta holds: of which models, in how many bits, and what was lost.

    Args:
        delta: A folder of `lapis delta extract`.
        json: Print one JSON object.
    """
    from lapis.weights.delta.file import open_delta

    file = open_delta(delta)
    show(file.to_json(), json, lambda: _print_file(file))


def _compared(base: str, chat: str, out: str, chats: list[Path] | None) -> dict[str, Any]:
    """How far the predictions of base + delta are from the exact graft's, or why that is not known."""
    import torch

    from lapis.evaluation.agree import agreement, reply_nll
    from lapis.model.threads import settle_threads
    from lapis.text.corpus import corpus
    from lapis.weights.delta.trial import trial_models

    settle_threads(torch.device("cpu"))
    with progress("trying the delta out") as report:
        try:
            stored, exact = trial_models(base, chat, out)
            seen = agreement(stored, {"the exact graft": exact}, name="base + delta", progress=report)
            if chats is not None:
                report.stage("reading replies")
                models = {"base + delta": stored, "the exact graft": exact}
                seen["response_nll"] = reply_nll(models, islice(corpus.chats(chats), CHATS))
            return seen
        except (LapisError, OSError, MemoryError) as error:  # the delta is there all the same
            return {"skipped": system_error(error) or str(error)}


def _print_extracted(result: "DeltaResult") -> None:
    counts = result.tensors
    what = f"{format_count(counts['stored'], 'tensor')}, {counts['tokens']:,} with rows of tokens"
    if result.dry_run:
        line(f"would write {result.out}: {what}; {size(result.needs['disk_bytes'])} of disk at most")
    else:
        share = f"{result.bytes / result.model_bytes:.1%} of the model"
        line(f"{result.out}: {what}; {size(result.bytes)}, {share}, in {result.seconds:.1f} s")
        line(f"base {result.base['source']} ({result.base['weights_sha256'][:16]})")
        _print_errors(result.relative_error, result.errors)
    if result.check:
        line(format_smoke(result.check))
        if "response_nll" in result.check:
            likely = [f"{nll:.4f} {name}" for name, nll in result.check["response_nll"].items()]
            line(f"response NLL, in nats per token: {', '.join(likely)}")
    notes(result.notes)


def _print_file(file: "DeltaFile") -> None:
    seen = file.to_json()
    line(f"{file.source}: {file.bits}, {size(seen['bytes'])}, made by lapis {seen['lapis']}")
    line(f"base: {seen['base']['source']} (weights {file.base_sha256[:16]})")
    line(f"chat: {seen['chat']['source']}")
    line(f"license: {seen['license'] or 'not said'}")
    line(f"template tokens: {', '.join(file.template) or 'none'}")
    line(f"end tokens: {', '.join(map(str, seen['end_tokens'])) or 'none'}")
    _print_errors(None, [each for each in seen["errors"] if each["code"]])


def _print_errors(total: float | None, errors: Sequence[Mapping[str, Any]]) -> None:
    """By kind of storage, and the tensors that lose most."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for each in errors:
        kinds[each["code"]].append(each["relative_error"])
    rows = [(code, len(values), sorted(values)[len(values) // 2], max(values)) for code, values in kinds.items()]
    title = "what is lost of the difference" + ("" if total is None else f": {total:.2%} in all (by norm)")
    table(title, ("stored as", "tensors", "median error", "largest error"), rows)
    worst = sorted((each for each in errors if each["relative_error"]), key=lambda each: -each["relative_error"])
    if worst:
        table(
            "the largest errors", ("tensor", "error", "difference / base"),
            [(each["name"], each["relative_error"], each["relative_norm"]) for each in worst[:WORST]],
        )  # fmt: skip
