"""What a model can do in each language, counted document by document: a folder, held-out material in, counts out.

Of every score it is kept what was counted in each document (or chat, or question), and what for, so that a figure, and
the difference of two models on the same documents, have bootstrap intervals (bootstrap.py). Bits and tokens are for a
byte of text, so that models with different tokenizers compare; so do replies, which may be as long in bytes as one
another.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lapis.checkpoint import open_checkpoint
from lapis.errors import DataError
from lapis.evaluation.chats import answer, encode_record, prompt_of
from lapis.evaluation.choices import Choice, mark_choices, scored_choices
from lapis.evaluation.text import windows_of
from lapis.generation.generate import generate_batch
from lapis.generation.options import DecodingRuntime, Sampling
from lapis.generation.ready import choose_device, open_ready
from lapis.language.card.bootstrap import Counts
from lapis.language.fertility import CONTEXT, tokens_per_second
from lapis.model.reading.readable import ReadableModel
from lapis.model.scoring import ScoredSequence, nll
from lapis.model.size import free_memory
from lapis.text.corpus.corpus import ChatRecord
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.wording import format_count

Report = Callable[[float, float | None, str], None]
PROMPTS = 10  # whose replies are shown
REPLY = 240  # bytes of a reply, by the model's tokens per byte of the language
TIMED = 4  # texts behind which generation is timed
ROUNDS = 3  # in each of which every model is timed behind each of them
WORDS = 8  # of a document, where it begins a continuation
BEGINNING = 80  # characters of it at most, for languages without spaces


@dataclass(frozen=True)
class HeldOutText:
    """What a language is measured on.

    Attributes:
        texts: Documents.
        chats: With the replies that were given.
        choices: Questions of multiple choice.
        tasks: Task files of lm-evaluation-harness, of multiple choice.
        code: Of the language, such as "ms"; "" where nobody said.
    """

    texts: Sequence[str]
    chats: Sequence[ChatRecord] = ()
    choices: Sequence[Choice] = ()
    tasks: Sequence[Path] = ()
    code: str = ""

    def prompts(self) -> list[str]:
        """What the models are given to reply to, or to go on with: the same for all of them."""
        if self.chats:
            return [str(prompt_of(chat.messages)[-1]["content"]) for chat in self.chats]
        return [" ".join(text.split()[:WORDS])[:BEGINNING] for text in self.texts[:PROMPTS]]

    def chance(self) -> float | None:
        """The accuracy of guessing, where that is known."""
        return sum(1 / len(one.choices) for one in self.choices) / len(self.choices) if self.choices else None


@dataclass
class Measured:
    """One model.

    Attributes:
        counts: Language -> score -> what was counted.
        replies: Language -> replies to its prompts; None to one that is longer than the context, or has no token.
        notes: What could not be measured, and why.
    """

    counts: dict[str, dict[str, Counts]] = field(default_factory=dict)
    replies: dict[str, list[str | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def score_model(
    folder: str | Path,
    languages: Mapping[str, HeldOutText],
    templates: Mapping[str, str] | None = None,
    progress: Report = lambda done, total, label: None,
) -> Measured:
    """Measures a model.

    Args:
        folder: The model.
        languages: Name -> what it is measured on.
        templates: Chat templates for a model that has none of its own.
        progress: Called with what is done, what there is to do, and what it is.

    Returns:
        Of each language the counts of `bits_per_byte` and `tokens_per_byte`; where there are chats and a template
        `response_nll` (per token), `response_bits_per_byte` and `stop_rate`; and `choices`, the share of right
        answers, where there are questions.
    """
    progress(0, None, f"reading {Path(folder).name}")
    model, tokenizer = open_ready(str(folder), DecodingRuntime())
    measured = Measured()
    if tokenizer.chat_template is None and templates:
        tokenizer.templates = dict(templates)
        measured.notes.append("has no chat template; it was given that of the last model that has one")
    for name, held in languages.items():
        of_model = _Measuring(model, tokenizer, held, name, progress)
        counts = measured.counts[name] = of_model.text()
        if held.chats and tokenizer.chat_template is not None:
            counts |= (given := of_model.likelihoods())
            if not given:
                measured.notes.append(f"no chat of {name} fits into its context of {model.config.context} tokens")
            elif left := len(held.chats) - given["response_nll"].n:
                measured.notes.append(_left_out(left, f"chat of {name} is", f"chats of {name} are"))
            replies = answer(
                model, tokenizer, held.chats, max_tokens=of_model.room(counts), progress=of_model.report("replies")
            )
            ended = [0.0 if reply is None else float(reply.stop_reason == "end") for reply in replies]
            counts["stop_rate"] = Counts(ended, [float(reply is not None) for reply in replies])
            measured.replies[name] = [None if reply is None else reply.text for reply in replies]
        elif not held.chats:
            measured.replies[name] = of_model.continuations(of_model.room(counts))
        if held.choices or held.tasks:
            counts["choices"] = of_model.questions()
            if left := int(len(counts["choices"].sizes) - sum(counts["choices"].sizes)):
                measured.notes.append(_left_out(left, f"question of {name} is", f"questions of {name} are"))
    return measured


def time_models(
    folders: Mapping[str, str | Path],
    languages: Mapping[str, HeldOutText],
    measured: Mapping[str, Measured],
    progress: Report = lambda done, total, label: None,
) -> None:
    """Adds `characters_per_second` of generation to what was counted of models.

    They are timed in turn, behind one text after another, in several rounds; of each text the median counts. So a
    machine that is busy for a while is busy for all of them, and models of one shape have one speed. All are open at
    once where half of the free memory holds them; elsewhere each is read again for its turn.

    Args:
        folders: Name -> model.
        languages: Name -> what they were measured on.
        measured: Model -> what `score_model` gave; it is added to.
        progress: Called with what is done, what there is to do, and what it is.
    """
    speeds: dict[tuple[str, str], list[list[float]]] = {}
    opened: dict[str, tuple[ReadableModel, Tokenizer]] = {}
    needed = 2 * sum(open_checkpoint(folder, adapters=True).nbytes for folder in folders.values())  # as float32
    keeps = choose_device(None).type == "cpu" and 2 * needed < (free_memory() or 0)
    for number in range(ROUNDS):
        for name, folder in folders.items():
            progress(number, ROUNDS, f"{name}: characters per second")
            model, tokenizer = opened.get(name) or open_ready(str(folder), DecodingRuntime())
            if keeps:
                opened[name] = model, tokenizer
            for language, held in languages.items():
                timed = _Measuring(model, tokenizer, held, language, progress).speeds(held.texts[:TIMED])
                speeds.setdefault((name, language), []).append(timed)
    for (name, language), rounds in speeds.items():
        medians = [statistics.median(behind) for behind in zip(*rounds, strict=True)]
        measured[name].counts[language]["characters_per_second"] = Counts(medians, [1.0] * len(medians))


@dataclass(frozen=True)
class _Measuring:
    """A model on one language."""

    model: ReadableModel
    tokenizer: Tokenizer
    held: HeldOutText
    name: str
    progress: Report

    def report(self, label: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(done, total, f"{label}, {self.name}")

    def room(self, counts: Mapping[str, Counts]) -> int:
        """Tokens of a reply of REPLY bytes; as many bytes for every tokenizer."""
        used = counts["tokens_per_byte"]
        return max(16, min(self.model.config.context // 2, math.ceil(REPLY * sum(used.numbers) / sum(used.sizes))))

    def text(self) -> dict[str, Counts]:
        tokenizer, texts = self.tokenizer, self.held.texts
        lead = tokenizer.document_lead
        windows: list[ScoredSequence] = []
        owner: list[int] = []
        tokens, sizes = [], [float(len(text.encode())) for text in texts]
        for number, ids in enumerate(tokenizer.encode_batch(texts)):
            tokens.append(float(len(ids)))
            document = windows_of([0 if lead is None else lead, *ids], min(CONTEXT, self.model.config.context))
            windows += document
            owner += [number] * len(document)
        bits = np.zeros(len(texts))
        np.add.at(bits, owner, np.array(nll(self.model, windows, progress=self.report("bits per byte"))) / math.log(2))
        return {"bits_per_byte": Counts(bits.tolist(), sizes), "tokens_per_byte": Counts(tokens, sizes)}

    def speeds(self, texts: Sequence[str]) -> list[float]:
        """Characters that are generated in a second behind each text."""
        tokens = sum(map(len, self.tokenizer.encode_batch(self.held.texts)))
        characters = sum(map(len, self.held.texts)) / tokens
        return [characters * tokens_per_second(self.model, self.tokenizer, text[:200]) for text in texts]

    def likelihoods(self) -> dict[str, Counts]:
        """Of the replies that were given; a chat that is longer than the context counts for nothing."""
        context = self.model.config.context
        records = [encode_record(self.tokenizer, chat) for chat in self.held.chats]
        fits = [float(len(ids) <= context + 1) for ids, _ in records]
        if not any(fits):
            return {}
        nats = nll(
            self.model,
            [ScoredSequence(ids[: context + 1], scored[: context + 1]) for ids, scored in records],
            progress=self.report("replies that were given"),
        )
        spent = [value * fit for value, fit in zip(nats, fits, strict=True)]
        tokens = [fit * sum(scored[1:]) for (_, scored), fit in zip(records, fits, strict=True)]
        sizes = [fit * _bytes_replied(chat) for chat, fit in zip(self.held.chats, fits, strict=True)]
        return {
            "response_nll": Counts(spent, tokens),
            "response_bits_per_byte": Counts([value / math.log(2) for value in spent], sizes),
        }

    def continuations(self, room: int) -> list[str | None]:
        """What follows each prompt; None where it has no token."""
        prompts = [self.tokenizer.encode(text, add_special_tokens=True) for text in self.held.prompts()]
        fitting = [ids[: max(1, self.model.config.context - room - 1)] for ids in prompts if ids]
        replies = iter(
            generate_batch(
                self.model, self.tokenizer, fitting, Sampling(max_tokens=room), progress=self.report("continuations")
            )
        )
        return [next(replies).text if ids else None for ids in prompts]

    def questions(self) -> Counts:
        fits = [self._fits(question) for question in self.held.choices]
        fitting = [question for question, fit in zip(self.held.choices, fits, strict=True) if fit]
        report = self.report("multiple choice")
        marks = iter(mark_choices(self.model, self.tokenizer, fitting, progress=report) if fitting else ())
        right = [float(next(marks)[0]) if fit else 0.0 for fit in fits]
        for task in self.held.tasks:
            from lapis.evaluation.harness import mark_tasks

            right += map(float, mark_tasks(self.model, self.tokenizer, task, progress=report))
        return Counts(right, [*map(float, fits), *[1.0] * (len(right) - len(fits))])

    def _fits(self, question: Choice) -> bool:
        try:
            scored_choices(self.tokenizer, question, self.model.config.context)
        except DataError:
            return False
        return True


def _left_out(count: int, one: str, many: str) -> str:
    return f"{format_count(count, one, many)} longer than its context and {'was' if count == 1 else 'were'} left out"


def _bytes_replied(chat: ChatRecord) -> int:
    turns = [turn for turn in chat.messages if turn["role"] == "assistant"]
    return sum(len(str(turn.get("content") or "").encode()) for turn in turns)
