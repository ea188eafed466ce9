"""Multiple choice by log-probability: the choice that the model finds likeliest is its answer.

A record (of jsonl, JSON or parquet) has `prompt` (text) or `messages` (a chat), `choices` (texts) and `answer` (an
index from 0). Records of Belebele, of INCLUDE and of MMLU's kind are read as they are, and asked in the words of
lm-evaluation-harness. A choice's score is the summed log-probability of its tokens after the prompt (as in
lm-evaluation-harness: acc), and the same divided by its bytes (acc_norm), which does not favor short choices. Leaves
out: few-shot prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapis.errors import DataError
from lapis.model.reading.readable import ReadableModel
from lapis.model.scoring import Precision, Progress, ScoredSequence, nll
from lapis.parsing import quoted
from lapis.text.chat.chat import encode_prompt
from lapis.text.corpus.file_stream import RECORDS, at
from lapis.text.corpus.files import files
from lapis.text.corpus.records import records
from lapis.text.tokenizer.tokenizer import Tokenizer

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Choice:
    """A question. prompt: text that the choice is written after, or the messages of a chat. answer: index, from 0."""

    prompt: str | Sequence[Mapping[str, Any]]
    choices: tuple[str, ...]
    answer: int


def score_choices(
    model: ReadableModel,
    tokenizer: Tokenizer,
    questions: Iterable[Choice],
    *,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """{accuracy, accuracy_per_byte, n, chance}. A tie counts for the first of the likeliest.

    Raises DataError where there is no question, or one is longer than the model's context.
    """
    listed = list(questions)
    marks = mark_choices(model, tokenizer, listed, precision=precision, progress=progress)
    return {
        "accuracy": sum(right for right, _ in marks) / len(listed),
        "accuracy_per_byte": sum(right for _, right in marks) / len(listed),
        "n": len(listed),
        "chance": sum(1 / len(question.choices) for question in listed) / len(listed),
    }


def mark_choices(
    model: ReadableModel,
    tokenizer: Tokenizer,
    questions: Sequence[Choice],
    *,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> list[tuple[bool, bool]]:
    """Of each question whether the likeliest choice is right, and whether that which is likeliest per byte is.

    Raises DataError where there is no question, or one is longer than the model's context.
    """
    if not questions:
        raise DataError("eval: there is no question to score")
    sequences = [s for question in questions for s in scored_choices(tokenizer, question, model.config.context)]
    nats = iter(nll(model, sequences, precision=precision, progress=progress))
    marks = []
    for question in questions:
        costs = [next(nats) for _ in question.choices]
        per_byte = [cost / len(text.encode()) for cost, text in zip(costs, question.choices, strict=True)]
        marks.append((costs.index(min(costs)) == question.answer, per_byte.index(min(per_byte)) == question.answer))
    return marks


def read_choices(path: Path | str) -> list[Choice]:
    """The questions of a file of records (.jsonl, .json, .parquet; .gz and .zst of the former), or of all in a folder.

    Raises DataError naming record and field.
    """
    listed = files(path, RECORDS, "questions are read from")
    return [_question(record, at(file, number)) for file in listed for number, record in records(file)]


def _question(record: Any, where: str) -> Choice:
    if not isinstance(record, dict):
        raise DataError(f"{where}: is not an object; expected prompt, choices and answer")
    if "question" in record and "prompt" not in record and "messages" not in record:
        record = _benchmark_record(record, where)
    if ("prompt" in record) == ("messages" in record):
        raise DataError(f"{where}: expected one of prompt (text) and messages (a chat)")
    prompt: Any = record["prompt" if "prompt" in record else "messages"]
    choices, answer = record.get("choices"), record.get("answer")
    chat = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)
    if not (isinstance(prompt, str) and prompt) and not chat:
        raise DataError(f"{where}: {'prompt' if 'prompt' in record else 'messages'} is empty or of a wrong type")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise DataError(f"{where}: choices must be two or more texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer is {quoted(answer)}; expected an index from 0 to {len(choices) - 1}")
    return Choice(prompt, tuple(choices), answer)


def _benchmark_record(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A record of a benchmark as prompt, choices and answer, in the words of lm-evaluation-harness' task."""
    belebele = "flores_passage" in record
    if belebele:
        options = [record.get(f"mc_answer{n}") for n in range(1, 5)]
        answer, first, mark = record.get("correct_answer_num"), 1, ":"
    else:
        options = record.get("choices") or [record.get(f"option_{letter}") for letter in "abcd"]
        answer, first, mark = record.get("answer"), 0, "."
    given = [record["question"], *(options if isinstance(options, list) else [None])]
    if not all(isinstance(text, str) and text for text in given) or not 2 <= len(given) - 1 <= len(LETTERS):
        fields = "flores_passage, question, mc_answer1 to mc_answer4" if belebele else "question, option_a to option_d"
        raise DataError(f"{where}: expected {fields} as texts")
    if isinstance(answer, str) and answer in LETTERS[: len(options)]:
        answer = LETTERS.index(answer) + first
    if isinstance(answer, str) and answer.isdecimal():
        answer = int(answer)
    lines = [f"{letter}{mark} {text}" for letter, text in zip(LETTERS, options, strict=False)]
    question = record["question"].strip()
    head = [f"P: {record['flores_passage']}", f"Q: {question}"] if belebele else [question]
    return {
        "prompt": "\n".join([*head, *lines, "Answer:"]),
        "choices": [f" {letter}" for letter in LETTERS[: len(options)]],
        "answer": answer - first if isinstance(answer, int) and not isinstance(answer, bool) else answer,
    }


def scored_choices(tokenizer: Tokenizer, question: Choice, context: int) -> list[ScoredSequence]:
    """Each choice after its prompt, as ids of which the choice's are scored. DataError where one is too long."""
    return [_scored(tokenizer, question, text, context) for text in question.choices]


def _scored(tokenizer: Tokenizer, question: Choice, text: str, context: int) -> ScoredSequence:
    if isinstance(question.prompt, str):
        before = tokenizer.encode(question.prompt, add_special_tokens=True)
        ids = tokenizer.encode(question.prompt + text, add_special_tokens=True)
        # a token that spans the border belongs to the choice, as in lm-evaluation-harness
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))
        )
        if shared == 0 and tokenizer.document_lead is not None:
            ids, shared = [tokenizer.document_lead, *ids], 1
    else:
        before = encode_prompt(tokenizer, question.prompt)
        ids, shared = before + tokenizer.encode(text), len(before)
    if len(ids) > context + 1:
        raise DataError(f"eval: a question has {len(ids)} tokens; the model's context is {context}")
    return ScoredSequence(ids, [place >= shared for place in range(len(ids))])
