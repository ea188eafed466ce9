"""What a model of the tour can do, by held-out text, chats and questions of both languages; and which scale to take.

Held-out material is halved: one half chooses the scale of the graft, the other reports. Leaves out the page.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapis.evaluation.chats import answer, score_chats
from lapis.evaluation.text import bits_per_byte
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Chat, chats
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.tour.material import ENGLISH, Material
from lapis.tour.world import Question, score
from lapis.weights.graft.graft import graft

CHARACTERS = 60_000  # of held-out text of one language in each half
CHATS = 100  # of one language in each half
REPLY_TOKENS = 48
SWEEP_QUESTIONS = 80  # of one language, for each scale
HALVINGS = 2  # of the step between the best scale and the next above it
BUDGET = 0.04  # bits per byte by which the graft may make text of the target language worse, on the half that chooses

Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Exam:
    """Held-out material, by language."""

    texts: Mapping[str, Sequence[str]]
    chats: Mapping[str, Sequence[Chat]]
    questions: Mapping[str, Sequence[tuple[str, Question]]]
    """(split, question): "held_out" = no training chat tells their facts, "local" = the target language alone does."""

    def response_nll(self, model: Transformer, tokenizer: Tokenizer, language: str) -> float:
        replies: list[None] = [None] * len(self.chats[language])
        return float(score_chats(model, tokenizer, self.chats[language], replies=replies)["response_nll"])

    def take(self, model: Transformer, tokenizer: Tokenizer) -> Scores:
        """language -> {bits_per_byte, response_nll, stop_rate, answers, by_task}; answers is None without questions."""
        scores: Scores = {}
        for language, texts in self.texts.items():
            found = score_chats(model, tokenizer, self.chats[language], max_tokens=REPLY_TOKENS)
            scores[language] = {
                "bits_per_byte": bits_per_byte(model, tokenizer, texts),
                "response_nll": found["response_nll"],
                "stop_rate": found["stop_rate"],
                **self.answers(model, tokenizer, language),
            }
        return scores

    def answers(
        self, model: Transformer, tokenizer: Tokenizer, language: str, most: int | None = None
    ) -> dict[str, Any]:
        """{answers, by_task}: the share of questions answered exactly, and {right, asked} by split and task."""
        asked = self.questions.get(language, ())[:most]
        if not asked:
            return {"answers": None, "by_task": {}}
        replies = answer(model, tokenizer, [_as_chat(question) for _, question in asked], max_tokens=REPLY_TOKENS)
        groups: dict[str, list[bool]] = {}
        for (split, question), reply in zip(asked, replies, strict=True):
            right = reply is not None and reply.stop_reason == "end" and score(reply.text, question)
            groups.setdefault(f"{split}: {question.task}", []).append(right)
        marks = [right for group in groups.values() for right in group]
        by_task = {name: {"right": sum(group), "asked": len(group)} for name, group in sorted(groups.items())}
        return {"answers": sum(marks) / len(marks), "by_task": by_task}


def exams(material: Material) -> tuple[Exam, Exam]:
    """The half that chooses and the half that reports."""
    texts = {language: material.held_out_texts(language, CHARACTERS) for language in material.languages}
    talks = {name: list(chats(material.chats(name, held_out=True)))[: 2 * CHATS] for name in material.languages}
    asked = {language: _questions(material.questions(language)) for language in material.languages}
    first, second = (
        Exam(
            {language: pieces[half] for language, pieces in texts.items()},
            {language: found[half::2] for language, found in talks.items()},
            {language: found[half::2] for language, found in asked.items()},
        )
        for half in (0, 1)
    )
    return first, second


def gap_closed(adapted: float, grafted: float, tuned: float) -> float | None:
    """How much of the way from `adapted` to `tuned` the graft went, by response NLL; None where there is no way."""
    return (adapted - grafted) / (adapted - tuned) if adapted > tuned else None


def sweep(
    models: Mapping[str, Path], exam: Exam, tokenizer: Tokenizer, scales: Sequence[float], say: Callable[[str], None]
) -> list[dict[str, float]]:
    """Grafts at every scale, and at some between the best and the next: a row for each, on the half that chooses.

    Row: scale, gap_closed (English), nll per language, bits_per_byte of the target language, bits (how much worse that
    is than adapted's), cost (the same as a share), and where there are questions the share answered right per language.
    """
    target = next(language for language in exam.texts if language != ENGLISH)

    def figures(model: Transformer) -> dict[str, float]:
        nll = {f"nll_{language}": exam.response_nll(model, tokenizer, language) for language in exam.chats}
        return {**nll, "bits_per_byte": bits_per_byte(model, tokenizer, exam.texts[target])}

    def answers(model: Transformer) -> dict[str, float]:
        found = {code: exam.answers(model, tokenizer, code, SWEEP_QUESTIONS)["answers"] for code in exam.chats}
        return {f"answers_{code}": share for code, share in found.items() if share is not None}

    adapted, tuned = (figures(load(models[name])) for name in ("adapted", "tuned"))
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix=".sweep-", dir=models["base"].parent) as folder:

        def attempt(scale: float) -> None:
            out = Path(folder) / f"{scale:g}"
            graft(models["base"], models["chat"], models["adapted"], out, scale)
            model = load(out)
            row = {"scale": scale, **figures(model), **answers(model)}
            gap = gap_closed(adapted[f"nll_{ENGLISH}"], row[f"nll_{ENGLISH}"], tuned[f"nll_{ENGLISH}"])
            bits = row["bits_per_byte"] - adapted["bits_per_byte"]
            row |= {"gap_closed": gap or 0.0, "bits": bits, "cost": bits / adapted["bits_per_byte"]}
            rows.append(row)
            say(f"scale {scale:g}: gap closed {row['gap_closed']:.2f} for {row['cost']:+.1%} bits per byte of {target}")

        for scale in scales:
            attempt(scale)
        for _ in range(HALVINGS):
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


def _as_chat(question: Question) -> list[dict[str, str]]:
    return [*question.messages, {"role": "assistant", "content": question.answer}]


def _questions(path: Path | None) -> list[tuple[str, Question]]:
    if path is None:
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found.append((record.pop("split"), Question(**record)))
    return found
