"""The page of a tour: curves, scores, what changed between base and chat, the sweep, and replies side by side.

Plain findings in, one string of HTML out. Leaves out: taking the scores (measure.py) and writing the file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lapis.report import Column, Page, plots
from lapis.tour.telling.verdict import LABELS, MEANS, advice, sentence

Found = Mapping[str, Any]

WHAT = {
    "base": "pre-trained on English, with some text of the target language",
    "chat": "base, tuned on English chats",
    "adapted": "base, continued on the target language",
    "grafted": "adapted + scale × (chat − base): no training step",
    "tuned": "adapted, tuned on the English chats",
    "yardstick": "adapted, tuned on chats of the target language",
}
ORDER = tuple(WHAT)


def page(found: Found) -> str:
    """The report of a tour as HTML. found: what recipe.Story.tell returned, with its names, seconds and folder."""
    names = found["names"]
    english, target = found["languages"]
    gaps, scores = found["gap_closed"], found["scores"]
    lead = (
        f"A language model built from raw text, taught to chat in English, moved to {names[target]}, and given its "
        f"chat ability back by adding `{found['scale']:g} × (chat − base)` to its weights, with no training step. "
        f"\n\n**{sentence(found)}**"
    )
    footer = f"Made by `lapis tour` in {found['seconds'] / 60:.1f} minutes. The models lie in `{found['folder']}`."
    report = Page(f"Chat ability, grafted onto {names[target]}", lead, footer=footer)
    report.stats(_stats(found, names))
    if advice(found):
        report.text(advice(found))
    report.section("Six models" if "yardstick" in scores else "Five models", _explained(scores))
    report.table(_score_rows(found, names), _score_columns(found), caption=SCORES_SAY, mark=("grafted",))
    _answers(report, found, names)
    budget = found["budget"]
    rule = (
        f"for the largest gap closed at no more than {budget:g} bits per byte" if budget else "for most right answers"
    )
    report.section(
        "The graft", f"The scale was chosen {rule} on one half of the held-out texts; scores are of the other."
    )
    report.figure(
        plots.scale_sweep(
            found["sweep"],
            f"At scale {found['scale']:g} the graft closes {gaps[english] or 0:.0%} of English's gap",
            chosen=found["scale"],
            budget=budget and budget / scores["adapted"][target]["bits_per_byte"],
        ),
        f"Each point is a graft. Cost: how much worse it makes the bits per byte of {names[target]} text.",
        rows=found["sweep"],
    )
    _difference(report, found)
    report.section("What they say", "Greedy replies to the same held-out prompts.")
    report.replies(found["replies"])
    if found["fluent"]:
        report.samples(found["fluent"], "Ten story beginnings, continued by base")
    report.section("How they learned")
    for phase, runs, what in (
        ("pre-training", ("base", "adapted"), "bits_per_byte"),
        ("chat tuning", ("chat", "tuned", "yardstick"), "loss"),
    ):
        rows = [row for row in found["curves"] if row["run"] in runs]
        report.figure(plots.learning_curves(rows, f"Learning curves: {phase}", y=what), WHAT_RUNS[phase])
    return report.render()


SHOWN = {
    "answers": (".0%", "max"),
    "response_nll": (".2f", "min"),
    "stop_rate": (".0%", ""),
    "bits_per_byte": (".3f", "min"),
}
SCORES_SAY = (
    "Of held-out questions, chats and text. " + "; ".join(f"**{LABELS[key]}**: {MEANS[key]}" for key in LABELS) + "."
)
WHAT_RUNS = {
    "pre-training": "adapted goes on from base, in another language; the step at its start is the change of text.",
    "chat tuning": "Loss on the assistant's tokens only.",
}


def _stats(found: Found, names: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Key figures, those of the target language first: they are what a tour claims."""
    english, target = found["languages"]
    stats = []
    for code in (target, english):
        right = {name: part[code]["answers"] for name, part in found["scores"].items()}
        if right["grafted"] is not None:
            beside = f"of held-out questions; adapted {_percent(right['adapted'])}, tuned {_percent(right['tuned'])}"
            stats.append((f"right, {names[code]}", _percent(right["grafted"]), beside))
    way = found["gap_closed_to_yardstick"]
    if way is not None:
        stats.append((f"gap closed, {names[target]}", _percent(way), "from adapted to yardstick, by response NLL"))
    for code in (target, english) if way is None else (english,):
        gap = found["gap_closed"][code]
        stats.append((f"gap closed, {names[code]}", _percent(gap), "from adapted to tuned, by response NLL"))
    stats.append((f"cost, {names[target]}", f"{found['cost']:+.1%}", "bits per byte, grafted against adapted"))
    return stats


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _explained(scores: Mapping[str, Any]) -> str:
    return "\n\n".join(f"**{name}**: {WHAT[name]}." for name in ORDER if name in scores)


def _score_rows(found: Found, names: Mapping[str, str]) -> list[dict[str, Any]]:
    rows = []
    for name in ORDER:
        if name in found["scores"]:
            flat = {
                f"{code}.{key}": value for code, part in found["scores"][name].items() for key, value in part.items()
            }
            rows.append({"model": name, **flat})
    return rows


def _score_columns(found: Found) -> list[Column | str]:
    columns: list[Column | str] = ["model"]
    for code in reversed(found["languages"]):
        for key, label in LABELS.items():
            shown, best = SHOWN[key]
            if any(part[code][key] is not None for part in found["scores"].values()):
                columns.append(Column(f"{code}.{key}", label, shown, best=best, group=found["names"][code]))  # type: ignore[arg-type]
    return columns


def _answers(report: Page, found: Found, names: Mapping[str, str]) -> None:
    """A folded table: right answers by kind of question, for each model."""
    for code in reversed(found["languages"]):
        kinds = list(found["scores"]["grafted"][code]["by_task"])
        if kinds:
            rows = [
                {"question": kind, "asked": found["scores"]["grafted"][code]["by_task"][kind]["asked"]}
                | {
                    name: part[code]["by_task"][kind]["right"] / part[code]["by_task"][kind]["asked"]
                    for name, part in found["scores"].items()
                }
                for kind in kinds
            ]
            models = [Column(name, format=".0%") for name in ORDER if name in found["scores"]]
            report.table(
                rows, ["question", "asked", *models], folded=f"Right answers by kind of question, {names[code]}"
            )


def _difference(report: Page, found: Found) -> None:
    table: Sequence[Found] = found["difference"]["tensors"]
    rows = found["difference"]["rows"]
    moved = sorted(rows, key=lambda row: -row["relative_norm"])[:3]
    report.section("What chat tuning changed", "The difference between base and chat, tensor by tensor.")
    largest = max((row for row in table if row["layer"] is not None), key=lambda row: row["relative_norm"])
    report.figure(
        plots.layer_heatmap(table, f"Most of the change is in {largest['component']} of layer {largest['layer']}"),
        "Direction: how far a tensor turned. Magnitude: length of the difference over the length of base's tensor.",
    )
    names = ", ".join(f"`{row['token'].strip()}`" for row in moved)
    title = "The template's tokens moved most" if all(row["special"] for row in moved[:2]) else f"{names} moved most"
    report.figure(plots.embedding_rows(rows, title), "The rows of the embedding, each a token.")
