"""What a model of the tour can do, by held-out text, chats and questions of both languages; and which scale to take.

Held-out material is halved: one half chooses the scale of the graft, the other reports. It is bounded, so that
measuring takes a small part of a tour, and every prompt is replied to once. Leaves out the page.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from lapis.evaluation.chats import answer, prompt_of, score_chats
from lapis.evaluation.text import score_text
from lapis.generation.generate import Reply
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import ChatRecord, chats
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.tour.material import ENGLISH, Material, ReportShare, evenly
from lapis.tour.world import Question, score
from lapis.weights.graft.graft import graft

CHARACTERS = 40_000  # of held-out text of one language in each half
CHATS = 64  # of one language in each half
QUESTIONS = 150  # of one language and split in each half
LEAST = 12  # of each of these, however short a story is
SWEEP_PROMPTS = 100  # of one language, for each scale
REPLY_TOKENS = 48
AT_ONCE = 75  # prompts that are replied to between two signs of life
BUDGET = 0.04  # bits per byte by which the graft may make text of the target language worse, on the half that chooses

Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class HeldOutPrompt:
    """Messages, the reply that was given to them, and where it is the only right one the question and its split."""

    messages: Sequence[Mapping[str, Any]]
    answer: str
    question: Question | None = None
    split: str = ""

    @property
    def text(self) -> str:
        """What the user says last."""
        return str(self.messages[-1]["content"])

    def right(self, reply: Reply | None) -> bool:
        """Whether a reply ended by itself and is exactly right."""
        if reply is None or reply.stop_reason != "end":
            return False
        return score(reply.text, self.question) if self.question else reply.text.strip() == self.answer.strip()


@dataclass(frozen=True)
class HeldOutMaterial:
    """Held-out material, by language. prompts: questions where the material has them, else the chats' last turns."""

    texts: Mapping[str, Sequence[str]]
    chats: Mapping[str, Sequence[ChatRecord]]
    prompts: Mapping[str, Sequence[HeldOutPrompt]]

    def likelihoods(self, model: Transformer, tokenizer: Tokenizer, language: str) -> dict[str, float]:
        """{bits_per_byte, response_nll}."""
        talks = self.chats[language]
        none: list[Reply | None] = [None] * len(talks)
        return {
            "bits_per_byte": score_text(model, tokenizer, self.texts[language])["bits_per_byte"],
            "response_nll": float(score_chats(model, tokenizer, talks, replies=none)["response_nll"]),
        }

    def score_model(
        self, model: Transformer, tokenizer: Tokenizer, report: ReportShare, most: int | None = None
    ) -> tuple[Scores, dict[str, list[Reply | None]]]:
        """Scores and replies, each by language.

        Scores: {bits_per_byte, response_nll, stop_rate, answers, by_task}; answers = share of questions answered
        exactly, None without questions; by_task = {right, asked} by split and task. most: of prompts of each language.
        """
        scores: Scores = {}
        replies: dict[str, list[Reply | None]] = {}
        whole, done = sum(_parts(len(prompts[:most])) for prompts in self.prompts.values()), 0
        for language, prompts in self.prompts.items():
            prompts, given = prompts[:most], list[Reply | None]()
            scores[language] = dict(self.likelihoods(model, tokenizer, language))
            report((done := done + 1) / whole)
            for first in range(0, len(prompts), AT_ONCE):
                part = prompts[first : first + AT_ONCE]
                turns = [[*prompt.messages, {"role": "assistant", "content": prompt.answer}] for prompt in part]
                given += answer(model, tokenizer, turns, max_tokens=REPLY_TOKENS, batch_size=AT_ONCE)
                report((done := done + 1) / whole)
            ends = [reply.stop_reason == "end" for reply in given if reply is not None]
            scores[language] |= {"stop_rate": sum(ends) / len(ends) if ends else None, **_marks(prompts, given)}
            replies[language] = given
        return scores, replies


def _parts(prompts: int) -> int:
    """Signs of life of one language."""
    return 1 + -(-prompts // AT_ONCE)


def _marks(prompts: Sequence[HeldOutPrompt], given: Sequence[Reply | None]) -> dict[str, Any]:
    groups: dict[str, list[bool]] = {}
    for prompt, reply in zip(prompts, given, strict=True):
        if prompt.question is not None:
            groups.setdefault(f"{prompt.split}: {prompt.question.task}", []).append(prompt.right(reply))
    marks = [right for group in groups.values() for right in group]
    by_task = {name: {"right": sum(group), "asked": len(group)} for name, group in sorted(groups.items())}
    return {"answers": sum(marks) / len(marks) if marks else None, "by_task": by_task}


def held_out_halves(
    material: Material, share: float = 1.0, least: int = LEAST
) -> tuple[HeldOutMaterial, HeldOutMaterial]:
    """The half that chooses and the half that reports.

    share: of the full amount, for a story that is shorter. least: chats, and questions, of one language in each half.
    """
    questions, talks = (max(least, round(most * share)) for most in (QUESTIONS, CHATS))
    texts = {name: material.held_out_texts(name, round(CHARACTERS * share)) for name in material.languages}
    records = {name: evenly(list(chats(material.chats(name, held_out=True))), 2 * talks) for name in material.languages}
    prompts = {name: _prompts(material.questions(name), records[name]) for name in material.languages}
    first, second = (
        HeldOutMaterial(
            {language: pieces[half] for language, pieces in texts.items()},
            {language: group[half::2] for language, group in records.items()},
            {language: _half(groups, half, questions) for language, groups in prompts.items()},
        )
        for half in (0, 1)
    )
    return first, second


def gap_closed(adapted: float, grafted: float, tuned: float) -> float | None:
    """How much of the way from `adapted` to `tuned` the graft went, by response NLL; None where there is no way."""
    return (adapted - grafted) / (adapted - tuned) if adapted > tuned else None


def sweep(
    models: Mapping[str, Path],
    held_out: HeldOutMaterial,
    tokenizer: Tokenizer,
    scales: Sequence[float],
    halvings: int,
    note: Callable[[str], None],
    report: ReportShare,
) -> list[dict[str, float]]:
    """Grafts at every scale, and at some between: a row for each, on the half that chooses.

    halvings: of the step between the best scale and the next above it, each of which is one more graft.

    Row: scale, gap_closed (English), nll per language, bits_per_byte of the target language, bits (how much worse that
    is than adapted's), cost (the same as a share), and where there are questions the share answered right per language.
    """
    target = next(language for language in held_out.texts if language != ENGLISH)
    marked = any(prompt.question for prompts in held_out.prompts.values() for prompt in prompts)
    prompts_of_scale = SWEEP_PROMPTS if marked else 0  # without right answers no figure of a row is of replies
    parent, most = models["adapted"].parent, len(scales) + halvings + 1
    onto = load(models["adapted"], torch.float32)
    adapted = held_out.likelihoods(onto, tokenizer, ENGLISH)["response_nll"]
    bare = held_out.likelihoods(onto, tokenizer, target)["bits_per_byte"]
    del onto
    tuned = held_out.likelihoods(load(models["tuned"], torch.float32), tokenizer, ENGLISH)["response_nll"]
    report(1 / most)
    rows: list[dict[str, float]] = []
    for left in parent.glob(".sweep-*"):  # of a tour that was killed here
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".sweep-", dir=parent) as folder:

        def attempt(scale: float) -> None:
            out = Path(folder) / f"{scale:g}"
            graft(models["base"], models["chat"], models["adapted"], out, scale)
            part = (1 + len(rows), most)
            scores, _ = held_out.score_model(
                load(out, torch.float32), tokenizer, lambda share: report((part[0] + share) / part[1]), prompts_of_scale
            )
            shutil.rmtree(out)
            bits = scores[target]["bits_per_byte"] - bare
            row = {"scale": scale, "bits_per_byte": scores[target]["bits_per_byte"]}
            row |= {f"nll_{code}": part["response_nll"] for code, part in scores.items()}
            row |= {f"answers_{code}": part["answers"] for code, part in scores.items() if part["answers"] is not None}
            gap = gap_closed(adapted, row[f"nll_{ENGLISH}"], tuned)
            row |= {"gap_closed": gap or 0.0, "bits": bits, "cost": bits / bare}
            rows.append(row)
            right = "".join(
                f", {row[f'answers_{code}']:.0%} right in {code}" for code in scores if f"answers_{code}" in row
            )
            note(f"  scale {scale:g}: {row['gap_closed']:.0%} of the gap for {row['cost']:+.1%} bits per byte{right}")

        for scale in scales:
            attempt(scale)
        for _ in range(halvings):
            best = choose(rows)
            above = [row["scale"] for row in rows if row["scale"] > best]
            if above:
                attempt((best + min(above)) / 2)
    return sorted(rows, key=lambda row: row["scale"])


def choose(rows: Sequence[Mapping[str, float]], budget: float = BUDGET) -> float:
    """The best scale. Where there are questions: that with most right answers, over both languages.

    Else that which closes most of English's gap within `budget` bits per byte; the cheapest where all cost more. The
    budget is in bits and not a share, since text that is nearly certain costs few bits and any change many percent.
    """
    marks = [key for key in rows[0] if key.startswith("answers_")]
    if any(row[key] for row in rows for key in marks):
        return max(rows, key=lambda row: (sum(row[key] for key in marks), -row["bits"]))["scale"]
    fair = [row for row in rows if row["bits"] <= budget]
    if not fair:
        return min(rows, key=lambda row: row["bits"])["scale"]
    return max(fair, key=lambda row: row["gap_closed"])["scale"]


def _prompts(path: Path | None, talks: Sequence[ChatRecord]) -> list[list[HeldOutPrompt]]:
    """The questions of a file, by split; else the last turns of the chats."""
    if path is None:
        turns = [(chat, prompt_of(chat.messages)) for chat in talks]
        return [[HeldOutPrompt(before, str(chat.messages[len(before)]["content"])) for chat, before in turns]]
    splits: dict[str, list[HeldOutPrompt]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        split = record.pop("split")
        question = Question(**record)
        splits.setdefault(split, []).append(HeldOutPrompt(question.messages, question.answer, question, split))
    return list(splits.values())


def _half(groups: Sequence[Sequence[HeldOutPrompt]], half: int, most: int) -> list[HeldOutPrompt]:
    """Every other prompt of each group, up to `most`, the groups in turn, so that the first few are of all of them."""
    halves = [group[half::2][:most] for group in groups]
    return [prompt for turn in zip_longest(*halves) for prompt in turn if prompt is not None]
