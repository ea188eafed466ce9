"""`lapis inspect`: parameters, memory and FLOPs of a model, or what ways of mixing an input cost. Reads no weight."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapis.checkpoint.commit import check_file
from lapis.cli.output import line, number, show, size, table, write_page
from lapis.errors import ConfigError
from lapis.wording import format_count

if TYPE_CHECKING:
    from lapis.model.size import Size


def inspect(
    model: str | None = None,
    /,
    *,
    context: int | None = None,
    mixers: str | None = None,
    html: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Count parameters, memory and FLOPs, by component and layer; no weight is read.

    Args:
        model: A model folder, or the name of a published size (gpt2, bert-base-uncased, qwen2.5-0.5b, llama-3-8b ...).
        context: Tokens in the sequence; default: what the model was made for.
        mixers: TOKENSxFEATURES, as 512x768: compare a fully connected layer, a per-token layer and attention there.
        html: Write a page with the picture to this file.
        overwrite: Replace an existing page.
        json: Print one JSON object.
    """
    if html is not None:
        check_file(html, overwrite=overwrite, option="--html")
    if mixers is not None:
        compare_mixers(mixers, html, json, overwrite=overwrite)
        return
    if model is None:
        raise ConfigError("inspect: give a model folder, the name of a published size, or --mixers 512x768")
    if context is not None and context < 1:
        raise ConfigError(f"inspect: context is {context}; expected 1 or more")
    result, measured, notes = measure_source(model, context)
    show({"model": model, **result, "notes": notes}, json, lambda: render(model, result, measured))
    for note in notes:
        line(f"note: {note}", error=True)
    if html is not None:
        from lapis.model.size import lengths
        from lapis.report.pages.inspect import inspect_page

        page = inspect_page({"model": model, **result}, lengths(measured.config, measured.context) if measured else ())
        write_page(page, html, overwrite=overwrite)


def measure_source(model: str, context: int | None) -> "tuple[dict[str, Any], Size | None, list[str]]":
    """The JSON object, the size (None for an unknown family), and what there is to tell."""
    from lapis.families import PRESETS, find
    from lapis.model.size import measure, measure_headers

    if model.lower() in PRESETS and not Path(model).exists():
        preset = PRESETS[model.lower()]
        family = find(preset)
        assert family is not None
        measured = measure(family.read_config(preset), context)
        return measured.to_json(), measured, beyond_positions(measured)
    from lapis.checkpoint import open_checkpoint
    from lapis.model.check import plan_load

    if not Path(model).exists() and "/" not in model:
        from lapis.config import nearest

        raise ConfigError(f'inspect: "{model}" is no folder and no published size; {nearest(model, PRESETS)}')
    checkpoint = open_checkpoint(model)
    if checkpoint.runs is None:
        kind = str(checkpoint.config.get("model_type"))
        notes = [*checkpoint.notes, f"model_type {kind:.40} is not known here: counted from names, without FLOPs"]
        return measure_headers(checkpoint.index, checkpoint.part), None, notes
    plan = plan_load(checkpoint, to_run=False)
    measured = measure(plan.config, context)
    result = measured.to_json(plan.dtype)
    result["memory"]["folder_bytes"] = checkpoint.nbytes
    return result, measured, [*checkpoint.notes, *plan.notes, *beyond_positions(measured)]


def beyond_positions(measured: "Size") -> list[str]:
    """A note where the sequence is longer than what the model was made for."""
    config, context = measured.config, measured.context
    if context <= config.context:
        return []
    if config.positions == "learned":
        return [
            f"context {context:,} is beyond the {config.context:,} learned positions of the model, which cannot run it"
        ]
    return [f"context {context:,} is beyond the {config.context:,} positions that the model was trained for"]


def render(model: str, result: dict[str, Any], measured: "Size | None") -> None:
    parameters = result["parameters"]
    layers = result["layers"]
    line(f"{model}: {parameters['total']:,} parameters, {format_count(len(layers), 'layer')}\n", "bold")
    blocks = Counter(item for layer in layers for item in layer["components"].items())
    rows = [(name, n, times, n * times) for (name, n), times in blocks.items()]
    rows += [(name, n, 1, n) for name, n in parameters["components"].items()]
    shares = [(*row, f"{100 * row[3] / parameters['total']:.1f} %") for row in rows]
    sizes = Counter(layer["parameters"] for layer in layers)
    shares += [("one block", n, times, n * times, "") for n, times in sizes.items()]
    table("Parameters", ("component", "each", "times", "in all", "share"), shares)
    if measured is None:
        return
    for name, total in parameters["with_head"].items():
        line(f"with the {name} head: {total:,}")
    memory, flops = result["memory"], result["flops"]
    line()
    cost = [(f"weights in {name}", size(n)) for name, n in memory["weights_bytes_by_dtype"].items()]
    cost += [
        (f"KV cache at {measured.context:,} tokens, bfloat16", size(memory["kv_cache_bytes"])),
        (f"activations of a training step, one row of {measured.context:,} tokens", size(memory["activation_bytes"])),
        ("FLOPs per token, forward", number(flops["per_token"])),
        ("  of which attention", number(flops["attention_per_token"])),
        ("FLOPs per token, training", number(flops["per_token_training"])),
        (f"FLOPs for {measured.context:,} tokens, forward", f"{flops['per_sequence']:.3g}"),
    ]
    table("Memory and work", ("", ""), cost)
    from lapis.model.size import GROWTH

    line()
    table("What grows with the context", ("", ""), GROWTH)


def compare_mixers(spelled: str, html: Path | None, json: bool, *, overwrite: bool = False) -> None:
    from lapis.model.size import mixers

    try:
        tokens, features = (int(part) for part in spelled.lower().split("x"))
        if not (0 < tokens < 10**9 and 0 < features < 10**9):
            raise ValueError
    except ValueError:
        raise ConfigError(f'inspect: --mixers is "{spelled}"; expected TOKENSxFEATURES, as 512x768') from None
    rows = mixers(tokens, features)
    result = {"tokens": tokens, "features": features, "mixers": [vars(row) for row in rows]}
    heads = ("layer", "parameters", "FLOPs", "mixes")
    body = [(row.name, number(row.parameters), number(row.flops), row.mixes) for row in rows]
    show(result, json, lambda: table(f"{tokens} tokens x {features} features", heads, body))
    if html is not None:
        from lapis.report.pages.inspect import mixers_page

        drawn = [{"mixer": row.name, "parameters": row.parameters, "flops": row.flops} for row in rows]
        write_page(mixers_page(tokens, features, drawn), html, overwrite=overwrite)
