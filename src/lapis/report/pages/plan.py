"""The page of a plan: the scatter, the choice, the control, and the sentence that sums them up.

Takes the object that `lapis plan --json` prints. Leaves out: how anything was measured (plan/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lapis.report import plots
from lapis.report.markup import Column
from lapis.report.page import Page

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


def plan_page(found: Row) -> Page:
    """The page of one plan."""
    page = Page(
        "Which layers to tune or merge",
        f"From {found['base']} to {found['chat']}, {GOALS[found['goal']]}, with {found['budget']:.0%} of the blocks' "
        f"parameters.",
    )
    return add_plan(page, found)


def add_plan(page: Page, found: Row, of: str = "") -> Page:
    """Adds the sections of a plan. of: what stands behind their titles, where a page has several plans."""
    page.section(f"The choice{of}", f"**{found['finding']}.**")
    measured = found["measured"]
    if measured:
        page.stats(_stats(measured))
        page.table(
            _measured(measured), _measured_columns(measured), "The choice beside a random one", mark=["the choice"]
        )
    page.text(_spelled("Chosen", found["tune"]) + "\n\n" + _spelled("Random", found["control"]))
    if found["template"]:
        rows = ", ".join(f"`{token}`" for token in found["template"])
        page.text(
            f"With either the rows of {rows} are trained, which base never learned and replies cannot end without."
        )
    scored = [row for row in found["pieces"] if row.get("style") is not None]
    if any(row.get("knowledge") is not None for row in scored):
        page.section(
            "Every piece by what it does",
            "Upwards: the share of what chat gained on replies that a piece's difference brings, the mean of putting "
            "it into the one model and of taking it out of the other. To the right: how much harder text becomes.",
        )
        inside = [row for row in scored if row["layer"] not in ("embed", "head")]  # which no choice may hold
        page.figure(plots.plan_scatter(inside, "Pieces that carry replies, and pieces that cost text"))
        layers = [row for row in found["scores"] if row.get("knowledge") is not None]
        if all(row["chosen"] for row in layers):  # something of each: the marks would say nothing
            layers = [{**row, "chosen": False, "control": False} for row in layers]
        page.figure(plots.plan_scatter(layers, "The same by whole layers"))
    page.section("Every signal", "From the tensors, from gradients, and measured.")
    page.table(list(found["pieces"]), _columns(found["pieces"]), "By piece", sortable=True)
    scores = [{**row, "layer": str(row["layer"])} for row in found["scores"]]
    page.table(scores, _columns(scores), "By layer", sortable=True)
    for note in found["notes"]:
        page.text(f"Note: {note}")
    return page


def _stats(measured: Row) -> list[tuple[str, str, str]]:
    stats = []
    for name in ("chosen", "control"):
        row = measured[name]
        harm = "" if row.get("knowledge") is None else f"plain text {row['knowledge']:+.1%} harder"
        stats.append((f"{NAMES[name]}: share of the replies' gain", f"{row['style']:.0%}", harm))
    return stats


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
    return [Column("set", ""), *(column for column in known if any(column.key in row for row in measured.values()))]


def _columns(rows: Sequence[Row]) -> list[str | Column]:
    known = (
        Column("parameters", "parameters", ","),
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
        Column("chosen"),
        Column("control"),
    )
    return [Column("layer"), *(column for column in known if any(row.get(column.key) is not None for row in rows))]


def _spelled(what: str, entries: Sequence[Row]) -> str:
    groups: dict[str, list[int]] = {}
    for entry in entries:
        groups.setdefault(entry["component"], []).append(entry["layer"])
    parts = [f"`{component}` of {', '.join(map(str, layers))}" for component, layers in groups.items()]
    return f"{what}: {'; '.join(parts)}."
