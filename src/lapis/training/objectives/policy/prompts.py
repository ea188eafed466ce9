"""Prompts that a policy replies to, and its replies with their rewards: read_prompts(data, tokenizer, room), Replier.

A line of jsonl has `prompt` (text, or a list of messages), or `messages` (a chat; the assistant's last turn is left
off), or `question`; everything else in it is the reward's business. Text is a user's message where the tokenizer has a
chat template, and is continued as it is where not.

Shapes: B replies (those to one prompt are neighbors), R tokens of a reply.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lapis.config import nearest
from lapis.errors import DataError
from lapis.model.scoring import Progress, evaluating
from lapis.model.transformer import Transformer
from lapis.text.chat.chat import encode_prompt
from lapis.text.corpus.corpus import check_message, checked_text, files, records
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.objectives.policy.experience import joined_rollouts
from lapis.training.objectives.policy.rollouts import Rollouts, sample_rollouts
from lapis.training.rewards import Case, Judge, Scores

FIELDS = ("prompt", "messages", "question")
_ROWS = 512  # replies decoded at once
Data = str | Path | Iterable[str | Path | Mapping[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: What the model reads.
        text: Text or messages, as a reward gets it.
        record: The whole line.
        where: File and line, for messages.
    """

    ids: tuple[int, ...]
    text: str | list[dict[str, Any]]
    record: dict[str, Any]
    where: str

    @property
    def shown(self) -> str:
        """The last message, for people."""
        return self.text if isinstance(self.text, str) else str(self.text[-1].get("content", ""))


@dataclass(frozen=True)
class Prompts:
    """Prompts that fit, and how many were dropped because they do not."""

    rows: list[Prompt]
    dropped: int

    def digest(self) -> str:
        """sha256 over ids and records."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.ids, row.record], sort_keys=True, default=str).encode())
        return digest.hexdigest()


def read_prompts(
    data: Data, tokenizer: Tokenizer, room: int, *, plain: bool = False, too_long: Literal["refuse", "drop"] = "refuse"
) -> Prompts:
    """Every prompt of jsonl files, or of records given as mappings. room: tokens that a prompt may have.

    plain: text is continued even where there is a chat template. Raises DataError, naming file, line and field, for a
    record without a prompt, an empty one, or (with too_long "refuse") one of more than `room` tokens.
    """
    rows, dropped = [], 0
    for where, record in _records(data):
        prompt = _prompt_of(record, where)
        ids = _encoded(prompt, tokenizer, plain)
        if not ids:
            raise DataError(f"{where}: the prompt is empty; a policy needs something to reply to")
        if len(ids) > room:
            if too_long == "refuse":
                raise DataError(
                    f"{where}: the prompt has {len(ids):,} tokens, and the context leaves room for {max(0, room):,} "
                    "beside max_tokens; shorten it, raise context, or give too_long: drop"
                )
            dropped += 1
            continue
        rows.append(Prompt(tuple(ids), prompt, record, where))
    if not rows:
        raise DataError(f"no prompt is left: {dropped:,} were too long" if dropped else "there are no prompts")
    return Prompts(rows, dropped)


def _records(data: Data) -> Iterator[tuple[str, dict[str, Any]]]:
    items = [data] if isinstance(data, (str, Path)) else list(data)
    paths = [item for item in items if not isinstance(item, Mapping)]
    for path in files(paths) if paths else ():
        if ".jsonl" not in path.suffixes:
            raise DataError(f"{path}: prompts are read from .jsonl")
        for number, record in records(path):
            if not isinstance(record, dict):
                raise DataError(f"{path} line {number}: is no object; expected one with prompt")
            yield f"{path} line {number}", record
    for number, item in enumerate((item for item in items if isinstance(item, Mapping)), 1):
        yield f"record {number}", dict(item)


def _prompt_of(record: Mapping[str, Any], where: str) -> str | list[dict[str, Any]]:
    name = next((name for name in FIELDS if name in record), None)
    if name is None:
        raise DataError(f"{where}: the field prompt is missing; {nearest('prompt', record)}")
    value, at = record[name], Path(where.rsplit(" line ", 1)[0])
    number = int(where.rsplit(" ", 1)[1])
    if isinstance(value, str) and name != "messages":
        text = checked_text(value, name, at, number)
        if not text.strip():
            raise DataError(f"{where}: {name} is empty; a policy needs something to reply to")
        return text
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {name} is neither text nor a list of messages")
    for i, message in enumerate(value):
        check_message(message, f"{name}[{i}]", at, number)
    turns = value[:-1] if value[-1]["role"] == "assistant" else value
    if not turns:
        raise DataError(f"{where}: {name} holds an assistant's turn and nothing before it")
    return turns


def _encoded(prompt: str | list[dict[str, Any]], tokenizer: Tokenizer, plain: bool) -> list[int]:
    if isinstance(prompt, str):
        if plain or tokenizer.chat_template is None:
            return tokenizer.encode(prompt, add_special_tokens=True)
        prompt = [{"role": "user", "content": prompt}]
    return encode_prompt(tokenizer, prompt)


@dataclass(frozen=True)
class Replier:
    """Samples replies and has them scored. max_tokens: of a reply."""

    tokenizer: Tokenizer
    judge: Judge
    max_tokens: int

    def reply(
        self,
        model: Transformer,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        *,
        group: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Rollouts:
        """`group` replies to each prompt; see `sample_rollouts`. progress: called with tokens of each reply."""
        pieces, size = [], max(1, _ROWS // group)
        with evaluating(model):
            for first in range(0, len(prompts), size):
                some = prompts[first : first + size]
                earlier, rounds = first // size * self.max_tokens, -(-len(prompts) // size) * self.max_tokens

                def show(done: int, earlier: int = earlier, rounds: int = rounds) -> None:
                    if progress is not None:
                        progress(earlier + done, rounds)

                rollouts = sample_rollouts(
                    model, [row.ids for row in some], numbers[first : first + size], self.tokenizer.end_ids,
                    group=group, max_tokens=self.max_tokens, temperature=temperature, seed=seed, progress=show,
                )  # fmt: skip
                pieces.append(rollouts)
        # copies, since tensors of inference mode cannot be part of a loss
        return Rollouts(**{name: tensor.clone() for name, tensor in joined_rollouts(pieces).tensors().items()})

    def score(self, prompts: Sequence[Prompt], rollouts: Rollouts) -> Scores:
        """The rewards of the replies, in their order."""
        group = len(rollouts.ended_B) // len(prompts)
        lengths, ended = rollouts.mask_BR.sum(1).tolist(), rollouts.ended_B.tolist()
        cases = []
        for i, ids in enumerate(rollouts.reply_BR.tolist()):
            row = prompts[i // group]
            text = self.tokenizer.decode(ids[: lengths[i] - ended[i]], skip_special=True)
            cases.append(Case(row.text, text, row.record, row.where, ended[i], lengths[i]))
        return self.judge.score(cases)

    def likeliest(
        self, model: Transformer, prompts: Sequence[Prompt], progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """Prompt, likeliest reply and reward, for people; a reward that failed is None."""
        rollouts = self.reply(model, prompts, range(len(prompts)), progress=progress)
        scores = self.score(prompts, rollouts)
        return [
            {"prompt": row.shown, "reply": self.tokenizer.decode(ids[mask].tolist(), True),
             "reward": None if math.isnan(total) else total}
            for row, ids, mask, total in zip(prompts, rollouts.reply_BR, rollouts.mask_BR, scores.total, strict=True)
        ]  # fmt: skip
