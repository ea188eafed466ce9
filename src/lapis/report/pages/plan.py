"""The page of a plan: the choice in the stack, beside random ones, and what each piece does.

Takes the object that `lapis plan --json` prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lapis.report import plots
from lapis.report.markup import Column
from lapis.report.page import Page
from lapis.report.pages.sections import short

Row = Mapping[str, Any]

GOALS = {
    "style": "to change how the model answers, and leave what it knows",
    "knowledge": "to teach it something, and leave how it answers",
}
NAMES = {
    "home": "nothing added",
    "chosen": "the choice",
    "control": "random, same size",
    "full": "the whole difference",
    "scaled": "learned scales, for a graft",
}


def plan_page(plan: Row) -> Page:
    """The page of one plan."""
    page = Page(
        "Which layers to tune or merge",
        f"From `{short(plan['base'])}` to `{short(plan['chat'])}`, {GOALS[plan['goal']]}, with "
        f"{plan['budget']:.0%} of the blocks' parameters.",
    )
    return add_plan(page, plan)


def add_plan(page: Page, plan: Row, of: str = "") -> Page:
    """Adds the sections of a plan.

    Args:
        page: Grows.
        plan: What `lapis plan --json` prints.
        of: What stands behind the titles, where a page has several plans.
    """
    page.section(f"The choice{of}", f"**{plan['finding'].rstrip('.')}.**")
    measured = plan["measured"]
    if measured:
        page.stats(_stats(measured, plan.get("controls") or ()))
    page.beside(
        lambda: page.figure(
            plots.plan_stack(plan["pieces"], "The choice in the stack"), "Hover for what a piece does."
        ),
        lambda: page.text(_spelled("Chosen", plan["tune"]) + "\n\n" + _spelled("Random", plan["control"])),
    )
    if measured:
        page.table(
            _measured(measured), _measured_columns(measured), "The choice beside a random one", mark=["the choice"]
        )
    if plan["template"]:
        tokens = ", ".join(f"`{token}`" for token in plan["template"])
        page.text(f"With either the rows of {tokens} are trained too: they frame the turns of a chat.")
        _add_template_rows(page, plan.get("template_rows") or ())
    scored = [row for row in plan["pieces"] if row.get("style") is not None]
    if any(row.get("knowledge") is not None for row in scored):
        page.section(
            f"Every piece by what it does{of}",
            "Upwards: the share of what chat gained on replies that a piece's difference brings, the mean of putting "
            "it into the one model and of taking it out of the other. To the right: how much harder text becomes.",
        )
        inside = [row for row in scored if row["layer"] not in ("embed", "head")]  # which no choice may hold
        page.figure(plots.plan_scatter(inside, "Pieces that carry replies, and pieces that cost text"))
        layers = [row for row in plan["scores"] if row.get("knowledge") is not None]
        if all(row["chosen"] for row in layers):  # something of each: the marks would say nothing
            layers = [{**row, "chosen": False, "control": False} for row in layers]
        page.figure(plots.plan_scatter(layers, "The same by whole layers"))
    page.section(f"Every signal{of}", "From the tensors, from gradients, and measured.")
    scores = [{**row, "layer": str(row["layer"])} for row in plan["scores"]]
    page.table(scores, _columns(scores), "By layer", sortable=True)
    page.table(list(plan["pieces"]), _columns(plan["pieces"]), sortable=True, folded="By piece, in numbers")
    for note in plan["notes"]:
        page.text(f"Note: {note}")
    return page


def _stats(measured: Row, controls: Sequence[Row]) -> list[tuple[str, str, str]]:
    """The gain on replies and the harm to text: of the choice, and of the random ones with their range."""
    chosen = measured["chosen"]
    stats = [("the choice: share of the replies' gain", f"{chosen['style']:.0%}", _harm([chosen]))]
    random = list(controls) or [measured["control"]]
    gains = [row["style"] for row in random]
    label = f"{len(random)} random choices of the same size" if len(random) > 1 else "random, same size"
    mean = f"{sum(gains) / len(gains):.0%}"
    spread = f"from {min(gains):.0%} to {max(gains):.0%}; " if len(gains) > 1 else ""
    return [*stats, (label, mean, spread + _harm(random))]


def _harm(rows: Sequence[Row]) -> str:
    """How plain text changes, in words; the mean of several rows."""
    harms = [row["knowledge"] for row in rows if row.get("knowledge") is not None]
    if not harms:
        return ""
    mean = sum(harms) / len(harms)
    return f"plain text gets {abs(mean):.1%} {'harder' if mean >= 0 else 'easier'}"


def _add_template_rows(page: Page, rows: Sequence[Row]) -> None:
    """What the embeddings say of the template's tokens, where they were compared."""
    if any(row.get("moved") is not None for row in rows):
        page.table(rows, [
            Column("token"), Column("in_base", "in base"), Column("moved", "moved by chat", ".1%"),
            Column("moved_median", "other rows, median", ".1%"), Column("norm", "norm, of the median row's", ".2f"),
        ], "Rows of the template's tokens")  # fmt: skip


def _measured(measured: Row) -> list[dict[str, Any]]:
    return [{"set": NAMES[name], **measured[name]} for name in NAMES if name in measured]


def _measured_columns(measured: Row) -> list[str | Column]:
    known = (
        Column("style", "gain on replies", ".1%", group="put in"),
        Column("knowledge", "text harder by", "+.2%", group="put in"),
        Column("style_out", "gain on replies", ".1%", group="lost where taken out"),
        Column("knowledge_out", "text harder by", "+.2%", group="lost where taken out"),
        Column("response_nll", "response NLL", ".3f", unit="nats"),
        Column("bits_per_byte", "bits per byte", ".4f"),
        Column("accuracy", "right choices", ".1%"),
        Column("stop_rate", "replies that end", ".0%"),
    )
    return [Column("set", ""), *_filled(known, measured.values())]


def _columns(rows: Sequence[Row]) -> list[str | Column]:
    known = (
        Column("style", "replies", ".1%", group="measured"),
        Column("knowledge", "text", "+.2%", group="measured"),
        Column("kl_chats_in", "KL, replies", ".3f", group="measured"),
        Column("kl_text_in", "KL, text", ".3f", group="measured"),
        Column("stop_in", "end token", ".2f", group="measured"),
        Column("accuracy_in", "right choices", ".1%", group="measured"),
        Column("gradient_chats", "replies", "+.3f", group="gradient x difference"),
        Column("gradient_text", "text", "+.3f", group="gradient x difference"),
        Column("relative_norm", "magnitude", ".3f", group="tensors"),
        Column("cosine", "cosine", ".5f", group="tensors"),
        Column("energy", "energy", ".1%", group="tensors"),
        Column("stable_rank", "stable rank", ".1f", group="tensors"),
        Column("snr", "SNR", ".2f", group="tensors"),
        Column("weight_snr", "base's SNR", ".2f", group="tensors"),
        Column("scale", "scale", ".2f"),
        Column("parameters", "parameters", ","),
    )
    return [Column("layer"), Column("chosen", group="in"), Column("control", group="in"), *_filled(known, rows)]


def _filled(columns: Iterable[Column], rows: Iterable[Row]) -> list[Column]:
    """The columns in which some row has a value."""
    keys = {key for row in rows for key, value in row.items() if value is not None}
    return [column for column in columns if column.key in keys]


def _spelled(what: str, entries: Sequence[Row]) -> str:
    groups: dict[str, list[int]] = {}
    for entry in entries:
        groups.setdefault(entry["component"], []).append(entry["layer"])
    parts = [
        f"`{component}` of layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
        for component, layers in groups.items()
    ]
    return f"{what}: {'; '.join(parts)}."
