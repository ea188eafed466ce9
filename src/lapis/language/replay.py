"""What a model is not to lose: bits per byte of held-out text before it is trained, and text that it draws itself.

Text of a model's own is replay where there is no other: samples from it keep nearly all that it knew (Marek et al.,
"Forgetting in Language Models", arXiv:2605.26097). A base continues nothing; a chat model also writes what its user
might say, after what its template writes before a user's turn (Xu et al., "Magpie", arXiv:2406.08464), and replies.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from lapis.errors import DataError
from lapis.generation.generate import Reply, generate_batch
from lapis.generation.options import DecodingRuntime, Sampling
from lapis.generation.ready import open_ready
from lapis.model.load import load
from lapis.model.reading.readable import ReadableModel
from lapis.model.threads import settle_threads
from lapis.text.chat.chat import encode_prompt, render
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.objectives.supervised.next_token import Causal

SELF = "self"  # in the place of files: the model draws them
MOST = 200_000  # tokens that are drawn; more are read again
LENGTH = 256  # tokens of a text, of a user's turn and of a reply, each at most
BATCH = 64  # texts that are drawn at once
REPLY = 48  # tokens of a reply to a prompt
EMPTY = 4  # batches without a text, after which a model is taken to write nothing

Report = Callable[[float, float | None, str], None]


@dataclass(frozen=True)
class Drawn:
    """A text that a model drew. text: As it is read again, special tokens and all, behind what a document begins with.
    plain: Without what the template writes. tokens: How many were drawn."""

    text: str
    plain: str
    tokens: int


def bits_per_byte(
    model: str | Path, texts: Mapping[str, Path], context: int, progress: Report = lambda done, total, label: None
) -> dict[str, float]:
    """NAME/bits_per_byte of a model on held-out texts, counted as a training counts it on the way.

    Args:
        model: A folder, or a model of the hub.
        texts: Name -> file.
        context: Tokens of a row.
        progress: Called with batches done, how many there are, and what it is.
    """
    objective = Causal(Tokenizer.open(model), list(texts.values()), context=context, valid=dict(texts))
    objective.heard = lambda done, total: progress(done, total, "measuring the base")
    loaded = load(model, torch.float32)
    settle_threads(next(loaded.parameters()).device)
    return objective.evaluate(loaded)


def draw_texts(
    source: str | Path, tokens: int, seed: int, progress: Report = lambda done, total, label: None
) -> list[Drawn]:
    """Texts that a model writes by itself, at temperature 1.

    Args:
        source: The model.
        tokens: How many are drawn, at least; MOST at most.
        seed: Of the draws.
        progress: Called with tokens drawn, how many there will be, and what it is.

    Raises:
        DataError: Where the model writes nothing.
    """
    model, tokenizer = open_ready(str(source), DecodingRuntime())
    settle_threads(next(model.parameters()).device)
    goal, total, empty = min(tokens, MOST), 0, 0
    texts: list[Drawn] = []
    write = _chats if tokenizer.chat_template else _documents
    for batch in write(model, tokenizer, seed):
        written = [drawn for drawn in batch if drawn.plain.strip()]
        empty = 0 if written else empty + 1
        if empty == EMPTY:
            raise DataError(f"adapt: replay is self, and {source} writes nothing by itself; give text as replay")
        texts += written
        total += sum(drawn.tokens for drawn in written)
        progress(min(total, goal), goal, "drawing replay text")
        if total >= goal:
            return texts
    return texts


def draw_replies(source: str | Path, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Chats of one turn: what a chat model says, most likely, to what somebody writes.

    Args:
        source: The model.
        prompts: What a user writes.

    Raises:
        DataError: Where the model says nothing to any of them.
    """
    model, tokenizer = open_ready(str(source), DecodingRuntime())
    settle_threads(next(model.parameters()).device)
    room = model.config.context * 3 // 4
    turns = [turn for prompt in prompts if (turn := _fitting(tokenizer, prompt, room))]
    replies = generate_batch(model, tokenizer, [[turn] for turn in turns], Sampling(max_tokens=REPLY))
    chats = [
        {"messages": [turn, {"role": "assistant", "content": text}]}
        for turn, reply in zip(turns, replies, strict=True)
        if (text := reply.text.replace("\0", "").strip())
    ]
    if not chats:
        raise DataError(f"adapt: scale is plan, and {source} replies nothing to text of the language; give a number")
    return chats


def _documents(model: ReadableModel, tokenizer: Tokenizer, seed: int) -> Iterator[list[Drawn]]:
    for replies in _batches(model, tokenizer, "", seed):
        texts = [reply.text.replace("\0", "") for reply in replies]  # no text holds a NUL
        yield [Drawn(text, text, len(reply.ids)) for text, reply in zip(texts, replies, strict=True)]


def _chats(model: ReadableModel, tokenizer: Tokenizer, seed: int) -> Iterator[list[Drawn]]:
    for number, openings in enumerate(_batches(model, tokenizer, opening(tokenizer), seed)):
        texts = [reply.text.replace("\0", "").strip() for reply in openings]
        room = model.config.context * 3 // 4
        turns = [[turn] for text in texts if (turn := _fitting(tokenizer, text, room))]
        sampling = _sampling(model, seed + 2**30 + number * BATCH)
        replies = generate_batch(model, tokenizer, turns, sampling) if turns else []
        yield [_exchange(tokenizer, turn, reply) for turn, reply in zip(turns, replies, strict=True)]


def _fitting(tokenizer: Tokenizer, text: str, room: int) -> dict[str, str] | None:
    """A user's turn of so many tokens at most, with what the template writes; None where nothing of it fits."""
    while text:
        turn = {"role": "user", "content": text}
        if len(encode_prompt(tokenizer, [turn])) <= room:
            return turn
        text = text[: len(text) // 2].strip()
    return None


def _exchange(tokenizer: Tokenizer, turn: list[dict[str, str]], reply: Reply) -> Drawn:
    answer = reply.text.replace("\0", "")
    text = render(tokenizer, [*turn, {"role": "assistant", "content": answer}])
    if tokenizer.document_lead is not None:  # whoever reads a document puts it there
        text = text.removeprefix(tokenizer.token(tokenizer.document_lead))
    return Drawn(text, f"{turn[0]['content']}\n\n{answer}", len(reply.ids) + reply.prompt_tokens)


def _batches(model: ReadableModel, tokenizer: Tokenizer, prompt: str | list[int], seed: int) -> Iterator[list[Reply]]:
    number = 0
    while True:
        yield generate_batch(model, tokenizer, [prompt] * BATCH, _sampling(model, seed * 1_000_003 + number * BATCH))
        number += 1


def _sampling(model: ReadableModel, seed: int) -> Sampling:
    return Sampling(temperature=1.0, max_tokens=min(LENGTH, max(1, model.config.context // 3)), seed=seed)


def opening(tokenizer: Tokenizer) -> list[int]:
    """The ids that a chat template writes before what the user says first."""
    one, other = (encode_prompt(tokenizer, [{"role": "user", "content": content}]) for content in ("Q", "7"))
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
