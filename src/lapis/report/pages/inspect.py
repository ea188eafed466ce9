"""The pages of `lapis inspect`: what a model is made of, what it costs in memory and work, and what grows with length.

Takes the object that `lapis inspect --json` prints. Nothing here is measured; all is counted from the shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lapis.report import plots
from lapis.report.figures.scores import short as in_short
from lapis.report.markup import Column
from lapis.report.page import Page
from lapis.report.pages.sections import short
from lapis.report.theme import Row
from lapis.wording import format_count


def inspect_page(result: Mapping[str, Any], lengths: Sequence[Row] = ()) -> Page:
    """The page of one model.

    Args:
        result: What --json prints.
        lengths: Rows of `plots.growth`: memory and FLOPs at several lengths; none where the family is not known.
    """
    parameters, layers = result["parameters"], result["layers"]
    memory, flops = result.get("memory") or {}, result.get("flops") or {}
    page = Page(f"What {short(result['model'])} is made of", "Counted from its shape; no weight was read.")
    context = result.get("context")
    many = f"{parameters['total']:,} in {format_count(len(layers), 'layer')}"
    figures = [("parameters", in_short(parameters["total"]), many)]
    if memory:
        dtype = memory.get("dtype", "")
        figures.append(("weights", _bytes(memory["weights_bytes"]), f"in {dtype}" if dtype else ""))
        figures.append(("KV cache", _bytes(memory["kv_cache_bytes"]), f"at {context:,} tokens, bfloat16"))
    if flops:
        figures.append(("FLOPs per token", in_short(flops["per_token"]), f"forward, at {context:,} tokens"))
    page.stats(figures)
    page.section("Parameters", "Area is the number of parameters.")
    outside = [(None, component, count) for component, count in parameters["components"].items()]
    inside = [(row["layer"], component, n) for row in layers for component, n in row["components"].items()]
    rows = [{"layer": layer, "component": part, "parameters": n} for layer, part, n in [*outside, *inside] if n]
    largest = max(("the layers", sum(n for _, _, n in inside)), *((p, n) for _, p, n in outside), key=lambda x: x[1])
    title = f"{largest[0]} hold{'s' if largest[0] != 'the layers' else ''} {largest[1] / parameters['total']:.0%} of"
    title = f"{title[0].upper()}{title[1:]} {parameters['total']:,} parameters"
    page.figure(plots.parameter_treemap(rows, title))
    components = partial(page.table, _components(parameters, layers), [
        "component", Column("all", "in all", ","), Column("share", format=".1%"), Column("each", format=","),
        Column("times", format=","),
    ], "By component")  # fmt: skip
    if memory and flops:
        at = f"at {context:,} tokens"
        page.beside(
            components,
            lambda: (
                page.table(_memory(memory), ["what", Column("size", format=_bytes)], f"Memory, {at}"),
                page.table(_work(flops), ["what", Column("flops", "FLOPs", in_short)], f"Work, {at}"),
            ),
        )
    else:
        components()
    if lengths:
        page.section("What grows with length", "Both axes are logarithmic: a straight line is a power of the length.")
        page.figure(plots.growth(lengths, _growth_finding(lengths)), rows=lengths, columns=[
            Column("context", "tokens", ","), Column("weights", format=_bytes), Column("cache", "KV cache", _bytes),
            Column("flops", "FLOPs per token", in_short), Column("attention", "of them attention", in_short),
        ])  # fmt: skip
    if "folder_bytes" in memory:
        page.text(f'What it does with a text: `lapis explain {result["model"]} "TEXT" --html FILE`.')
    return page


def mixers_page(tokens: int, features: int, rows: Sequence[Row]) -> Page:
    """The page that compares ways to mix an input. Row: mixer, parameters, flops, mixes."""
    times = rows[0]["parameters"] / rows[-1]["parameters"]
    title = f"Attention mixes everything with {times:,.0f} times fewer parameters than a fully connected layer"
    page = Page(f"Mixing {tokens} tokens of {features} features", "What three layers with the same input cost.")
    return page.figure(plots.mixers(rows, title), "FLOPs of one forward pass.", rows=rows)


def _components(parameters: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each component with its size, over all layers; the largest first."""
    sizes: dict[str, list[int]] = {}
    for row in layers:
        for component, count in row["components"].items():
            sizes.setdefault(component, []).append(count)
    for component, count in parameters["components"].items():
        sizes.setdefault(component, []).append(count)
    rows = [
        {"component": component, "each": counts[0] if len(set(counts)) == 1 else None, "times": len(counts),
         "all": sum(counts), "share": sum(counts) / parameters["total"]}
        for component, counts in sizes.items() if sum(counts)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["all"])


def _memory(memory: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [{"what": f"weights in {name}", "size": n} for name, n in memory.get("weights_bytes_by_dtype", {}).items()]
    rows.append({"what": "KV cache, bfloat16", "size": memory["kv_cache_bytes"]})
    rows.append({"what": "activations of a training step, one row", "size": memory.get("activation_bytes")})
    return rows


def _work(flops: Mapping[str, Any]) -> list[dict[str, Any]]:
    known = (
        ("a token, forward", "per_token"), ("of it attention", "attention_per_token"),
        ("a token, training", "per_token_training"), ("the whole sequence, forward", "per_sequence"),
    )  # fmt: skip
    return [{"what": what, "flops": flops.get(key)} for what, key in known]


def _growth_finding(lengths: Sequence[Row]) -> str:
    """From which length on the cache outweighs the weights, or that it does not."""
    beyond = next((row["context"] for row in lengths if row["cache"] > row["weights"]), None)
    last = lengths[-1]
    if beyond is not None:
        return f"From about {beyond:,} tokens on the KV cache takes more memory than the weights"
    return (
        f"At {last['context']:,} tokens the KV cache takes {last['cache'] / last['weights']:.0%} of the weights' memory"
    )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
