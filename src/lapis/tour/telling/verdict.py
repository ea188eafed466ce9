"""What a tour showed, in words for somebody who sees its figures for the first time.

Plain findings in, sentences out, for the terminal and the page alike. Leaves out: the page (page.py).
"""

from collections.abc import Mapping
from typing import Any

Findings = Mapping[str, Any]

FEW = 0.5  # of the questions: below, most answers are wrong
HALF = 0.5  # of what tuning on the same chats gives

LABELS = {"answers": "right", "response_nll": "response NLL", "stop_rate": "stops", "bits_per_byte": "bits/byte"}
"""Scores in the order in which they are shown, and their short names."""

MEANS = {
    "answers": "share of held-out questions answered exactly right, word for word",
    "response_nll": "how surprising it finds the right replies, in nats per token; less is better, 0 = certain",
    "stop_rate": "share of its replies that end by themselves",
    "bits_per_byte": "bits that it needs for a byte of held-out text; less is better",
}
"""What each score is."""


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
        f"Without a training step the graft {went} from a model that cannot chat to one that was tuned on the chats, "
        f"by how likely each finds the right replies; {names[target]} text became {findings['cost']:+.1%} harder to "
        "predict."
    )


def advice(findings: Findings) -> str:
    """Why answers are few, and what to do; nothing where they are not."""
    english, target = findings["languages"]
    scores, names = findings["scores"], findings["names"]
    right = {(name, code): part[code]["answers"] for name, part in scores.items() for code in (english, target)}
    if right["chat", english] is None:
        return ""
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
    return ""
