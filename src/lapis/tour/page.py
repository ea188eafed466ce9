"""The page of a tour, and its result in words for somebody who sees its figures for the first time.

Plain findings in; one string of HTML out (curves, scores, what changed between base and chat, the sweep, replies side
by side), and sentences, for the terminal and the page alike. Leaves out: taking the scores (measure.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapis.report import Column, Page, plots

Findings = Mapping[str, Any]

FEW = 0.5  # of the questions: below, most answers are wrong
FEW_IN_TARGET = 0.15  # of the questions in the target language, in which no chat was trained
HALF = 0.5  # of what tuning on the same chats gives
SHORT_WAY = 0.1  # nats per token between adapted and tuned: below, the share of the way that a graft goes says little

LABELS = {"answers": "right", "response_nll": "response NLL", "stop_rate": "stops", "bits_per_byte": "bits/byte"}
"""Scores in the order in which they are shown, and their short names."""

MEANS = {
    "answers": "share of held-out questions answered exactly right, word for word",
    "response_nll": "how surprising it finds the right replies, in nats per token; less is better, 0 = certain",
    "stop_rate": "share of its replies that end by themselves",
    "bits_per_byte": "bits that it needs for a byte of held-out text; less is better",
}
"""What each score is."""

WHAT = {
    "base": "pre-trained on English, with some text of the target language",
    "chat": "base, tuned on English chats",
    "adapted": "base, continued on the target language",
    "grafted": "adapted + scale × (chat − base): no training step",
    "tuned": "adapted, tuned on the English chats",
    "yardstick": "adapted, tuned on chats of the target language",
}
ORDER = tuple(WHAT)


def page(findings: Findings) -> str:
    """The report of a tour as HTML. findings: what recipe.Story.tell returned, with its names, minutes and folder."""
    names = findings["names"]
    english, target = findings["languages"]
    gaps, scores = findings["gap_closed"], findings["scores"]
    lead = (
        f"{_beginning(findings)}, moved to {names[target]}, and given its chat ability back by adding "
        f"`{findings['scale']:g} × (chat − base)` to its weights, with no training step. \n\n**{sentence(findings)}**"
    )
    footer = f"Made by `{command(findings)}`. The models lie in `{findings['folder']}`."
    report = Page(f"Chat ability, grafted onto {names[target]}", lead, footer=footer)
    report.stats(_stats(findings, names))
    if advice(findings):
        report.text(advice(findings))
    report.section("Six models" if "yardstick" in scores else "Five models", _explained(findings))
    marked = scores["grafted"][english]["answers"] is not None
    meanings = "; ".join(f"**{LABELS[key]}**: {MEANS[key]}" for key in LABELS if marked or key != "answers")
    caption = f"Of held-out {'questions, ' if marked else ''}chats and text. {meanings}."
    report.table(_score_rows(findings, names), _score_columns(findings), caption=caption, mark=("grafted",))
    _answers(report, findings, names)
    budget = findings["budget"]
    rule = (
        f"for the largest gap closed at no more than {budget:g} bits per byte" if budget else "for most right answers"
    )
    report.section(
        "The graft", f"The scale was chosen {rule} on one half of the held-out texts; scores are of the other."
    )
    report.figure(
        plots.scale_sweep(
            findings["sweep"],
            f"At scale {findings['scale']:g} the graft closes {gaps[english] or 0:.0%} of English's gap",
            chosen=findings["scale"],
            budget=budget and budget / scores["adapted"][target]["bits_per_byte"],
        ),
        f"Each point is a graft. Cost: how much worse it makes the bits per byte of {names[target]} text.",
        rows=findings["sweep"],
    )
    _difference(report, findings)
    report.section("What they say", "Greedy replies to the same held-out prompts.")
    report.replies(findings["replies"])
    if findings["fluent"]:
        report.samples(findings["fluent"], "Ten story beginnings, continued by base")
    report.section("How they learned")
    for phase, runs, what in (
        ("pre-training", ("base", "adapted"), "bits_per_byte"),
        ("chat tuning", ("chat", "tuned", "yardstick"), "loss"),
    ):
        rows = [row for row in findings["curves"] if row["run"] in runs]
        report.figure(plots.learning_curves(rows, f"Learning curves: {phase}", y=what), WHAT_RUNS[phase])
    return report.render()


def command(findings: Findings) -> str:
    """What makes a tour like this one."""
    if "model" not in findings:
        return f"lapis tour --minutes {findings['minutes']:g}"
    chat = f" --chat {findings['chat']}" if findings["chat"] else ""
    return f"lapis tour --real --model {findings['model']}{chat} --tokens {findings['trained_tokens']}"


def _beginning(findings: Findings) -> str:
    """What the story begins with."""
    if "model" not in findings:
        return "A language model built from raw text, taught to chat in English"
    model = f"The language model `{Path(findings['model']).name}`"
    if findings["chat"]:
        return f"{model} and its chat version `{Path(findings['chat']).name}`"
    return f"{model}, tuned on English chats"


SHOWN = {
    "answers": (".0%", "max"),
    "response_nll": (".2f", "min"),
    "stop_rate": (".0%", ""),
    "bits_per_byte": (".3f", "min"),
}
WHAT_RUNS = {
    "pre-training": "adapted goes on from base, in another language; the step at its start is the change of text.",
    "chat tuning": "Loss on the assistant's tokens only.",
}


def _stats(findings: Findings, names: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Key figures, those of the target language first: they are what a tour shows."""
    english, target = findings["languages"]
    stats = []
    for code in (target, english):
        right = {name: part[code]["answers"] for name, part in findings["scores"].items()}
        if right["grafted"] is not None:
            beside = f"of held-out questions; adapted {_percent(right['adapted'])}, tuned {_percent(right['tuned'])}"
            stats.append((f"right, {names[code]}", _percent(right["grafted"]), beside))
    way = findings["gap_closed_to_yardstick"]
    if way is not None:
        stats.append((f"gap closed, {names[target]}", _percent(way), "from adapted to yardstick, by response NLL"))
    for code in (target, english) if way is None else (english,):
        gap = findings["gap_closed"][code]
        stats.append((f"gap closed, {names[code]}", _percent(gap), "from adapted to tuned, by response NLL"))
    stats.append((f"cost, {names[target]}", f"{findings['cost']:+.1%}", "bits per byte, grafted against adapted"))
    return stats


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _explained(findings: Findings) -> str:
    what = dict(WHAT)
    if "model" in findings:
        what["base"] = f"`{findings['model']}`, as it came"
    if findings.get("chat"):
        what["chat"] = f"`{findings['chat']}`, as it came"
    return "\n\n".join(f"**{name}**: {what[name]}." for name in ORDER if name in findings["scores"])


def _score_rows(findings: Findings, names: Mapping[str, str]) -> list[dict[str, Any]]:
    rows = []
    for name in ORDER:
        if name in findings["scores"]:
            flat = {
                f"{code}.{key}": value for code, part in findings["scores"][name].items() for key, value in part.items()
            }
            rows.append({"model": name, **flat})
    return rows


def _score_columns(findings: Findings) -> list[Column | str]:
    columns: list[Column | str] = ["model"]
    for code in reversed(findings["languages"]):
        for key, label in LABELS.items():
            shown, best = SHOWN[key]
            if any(part[code][key] is not None for part in findings["scores"].values()):
                columns.append(Column(f"{code}.{key}", label, shown, best=best, group=findings["names"][code]))  # type: ignore[arg-type]
    return columns


def _answers(report: Page, findings: Findings, names: Mapping[str, str]) -> None:
    """A folded table: right answers by kind of question, for each model."""
    for code in reversed(findings["languages"]):
        kinds = list(findings["scores"]["grafted"][code]["by_task"])
        if kinds:
            rows = [
                {"question": kind, "asked": findings["scores"]["grafted"][code]["by_task"][kind]["asked"]}
                | {
                    name: part[code]["by_task"][kind]["right"] / part[code]["by_task"][kind]["asked"]
                    for name, part in findings["scores"].items()
                }
                for kind in kinds
            ]
            models = [Column(name, format=".0%") for name in ORDER if name in findings["scores"]]
            report.table(
                rows, ["question", "asked", *models], folded=f"Right answers by kind of question, {names[code]}"
            )


def _difference(report: Page, findings: Findings) -> None:
    table: Sequence[Findings] = findings["difference"]["tensors"]
    rows = findings["difference"]["rows"]
    moved = sorted(rows, key=lambda row: -row["relative_norm"])[:3]
    report.section("What chat tuning changed", "The difference between base and chat, tensor by tensor.")
    largest = max((row for row in table if row["layer"] is not None), key=lambda row: row["relative_norm"])
    report.figure(
        plots.layer_heatmap(table, f"Most of the change is in {largest['component']} of layer {largest['layer']}"),
        "Direction: how far a tensor turned. Magnitude: length of the difference over the length of base's tensor.",
    )
    if not moved:
        report.text("No row of the embedding moved: it was left as it is.")
        return
    names = ", ".join(f"`{row['token'].strip()}`" for row in moved)
    title = "The template's tokens moved most" if all(row["special"] for row in moved[:2]) else f"{names} moved most"
    report.figure(plots.embedding_rows(rows, title), "The rows of the embedding, each a token.")


def sentence(findings: Findings) -> str:
    """The result in a sentence or two."""
    english, target = findings["languages"]
    scores, names = findings["scores"], findings["names"]

    def of(model: str, code: str) -> str:
        return f"{100 * scores[model][code]['answers']:.0f}"

    if scores["grafted"][english]["answers"] is None:
        return _by_likelihood(findings)
    most = f", {of('yardstick', target)} when tuned on {names[target]} chats" if "yardstick" in scores else ""
    return (
        f"Asked in {names[target]}, in which it never saw a chat, the grafted model answers {of('grafted', target)} of "
        f"100 questions exactly right: {of('adapted', target)} before the graft, {of('tuned', target)} when tuned on "
        f"the {names[english]} chats instead{most}. Asked in {names[english]}, it answers {of('grafted', english)} of "
        f"100; the chat model that its ability comes from answers {of('chat', english)}."
    )


def _by_likelihood(findings: Findings) -> str:
    english, target = findings["languages"]
    names, gaps = findings["names"], findings["gap_closed"]
    ways = [f"{gaps[code]:.0%} in {names[code]}" for code in (target, english) if gaps[code] is not None]
    went = f"went {' and '.join(ways)} of the way" if ways else "had no way to go"
    return (
        f"Without a training step the graft {went} from the model that was moved to {names[target]} to the same tuned "
        f"on the chats, by how likely each finds the right replies; {names[target]} text became "
        f"{abs(findings['cost']):.1%} {'harder' if findings['cost'] > 0 else 'easier'} to predict."
    )


def advice(findings: Findings) -> str:
    """Why answers are few, and what to do; nothing where they are not."""
    english, target = findings["languages"]
    scores, names = findings["scores"], findings["names"]
    right = {(name, code): part[code]["answers"] for name, part in scores.items() for code in (english, target)}
    if right["chat", english] is None:
        return _advice_by_likelihood(findings)
    more = f"lapis tour --minutes {max(5.0, 2 * findings['minutes']):g} --out another/folder"
    if right["chat", english] < FEW:
        return (
            f"Answers are few because the models learned from {sum(findings['tokens'].values()) / 1e6:.1f} million "
            f"tokens: chat itself answers {100 * right['chat', english]:.0f} of 100 in {names[english]}. A larger "
            f"story answers more: {more}"
        )
    if right["grafted", english] < HALF * right["tuned", english]:
        return (
            f"The graft brought less than half of what tuning gives, {100 * right['tuned', english]:.0f} of 100. Other "
            "layers may bring more: the report shows what each scale gave, and lapis plan --goal style chooses layers"
        )
    if right.get(("yardstick", target), FEW) < FEW:
        return (
            f"Even tuned on {names[target]} chats the model answers {100 * right['yardstick', target]:.0f} of 100: "
            f"what is missing is {names[target]}, and more text brings it: {more}"
        )
    if right["grafted", target] < FEW_IN_TARGET:
        tuned = right.get(("yardstick", target))
        with_them = "" if tuned is None else f": with them it is {100 * tuned:.0f}"
        return (
            f"What English chats teach reaches {names[target]} little: chat itself, asked in {names[target]}, answers "
            f"{100 * right['chat', target]:.0f} of 100. Chats of the language bring it{with_them}; tune the grafted "
            "model on some with lapis train"
        )
    return ""


def _advice_by_likelihood(findings: Findings) -> str:
    """Where tuning itself changed little, what that means for the share of the way; nothing where it changed much."""
    target = findings["languages"][1]
    adapted, tuned = (findings["scores"][name][target]["response_nll"] for name in ("adapted", "tuned"))
    if adapted - tuned >= SHORT_WAY:
        return ""
    more = "--tokens" if "model" in findings else "--minutes"
    return (
        f"Tuning on the chats changed little ({adapted:.2f} to {tuned:.2f} nats per token of replies in "
        f"{findings['names'][target]}), so the share of that way says little. More is learned with a larger {more}."
    )
