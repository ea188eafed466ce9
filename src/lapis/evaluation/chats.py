"""Chats: how likely the model finds the replies that were given, and whether its own replies end.

response NLL: nats per token over the assistant's tokens and end tokens. stop rate: the share of last turns to which
the model's greedy reply ends by an end token within a limit. Leaves out judging what the replies say.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lapis.errors import DataError
from lapis.generation.generate import Reply, generate_batch
from lapis.generation.options import Sampling
from lapis.model.reading.readable import ReadableModel
from lapis.model.scoring import Precision, Progress, ScoredSequence, nll
from lapis.text.chat.chat import encode_chat, encode_prompt, write_calls
from lapis.text.corpus.corpus import ChatRecord
from lapis.text.tokenizer.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


def score_chats(
    model: ReadableModel,
    tokenizer: Tokenizer,
    chats: Iterable[ChatRecord | Messages],
    *,
    context: int | None = None,
    max_tokens: int = 64,
    replies: Sequence[Reply | None] | None = None,
    precision: Precision | None = None,
    progress: Progress | None = None,
    replies_progress: Progress | None = None,
) -> dict[str, Any]:
    """{response_nll, stop_rate, tokens, chats, cut, unanswered}.

    context: a chat that is longer is cut at its end, and counted in `cut`. max_tokens: within which a reply has to end.
    replies: those of `answer`, where the caller has them already. Raises DataError where no token is the assistant's.
    """
    context = min(context or model.config.context, model.config.context)
    conversations = list(chats)
    if not conversations:
        raise DataError("eval: there is no chat to score")
    sequences, cut = [], 0
    for chat in conversations:
        ids, scored = encode_record(tokenizer, chat)
        cut += len(ids) > context + 1
        sequences.append(ScoredSequence(ids[: context + 1], scored[: context + 1]))
    tokens = sum(sum(sequence.scored[1:]) for sequence in sequences)
    if tokens == 0:
        raise DataError(f"eval: no assistant token lies within {context} tokens of any chat; give a larger context")
    nats = math.fsum(nll(model, sequences, precision=precision, progress=progress))
    if replies is None:
        replies = answer(model, tokenizer, conversations, max_tokens=max_tokens, progress=replies_progress)
    answered = [reply for reply in replies if reply is not None]
    return {
        "response_nll": nats / tokens,
        "stop_rate": sum(reply.stop_reason == "end" for reply in answered) / len(answered) if answered else None,
        "tokens": tokens,
        "chats": len(conversations),
        "cut": cut,
        "unanswered": len(replies) - len(answered),
    }


def answer(
    model: ReadableModel,
    tokenizer: Tokenizer,
    chats: Iterable[ChatRecord | Messages],
    *,
    max_tokens: int = 64,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[Reply | None]:
    """The greedy reply to each chat up to its last assistant turn; None where the prompt leaves no room for one."""
    prompts = [_encode_prompt(tokenizer, chat) for chat in chats]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) < model.config.context]
    replies = generate_batch(
        model,
        tokenizer,
        [prompts[i] for i in fits],
        Sampling(max_tokens=max_tokens),
        batch_size=batch_size,
        progress=progress,
    )
    result: list[Reply | None] = [None] * len(prompts)
    for i, reply in zip(fits, replies, strict=True):
        result[i] = reply
    return result


def prompt_of(messages: Messages) -> Messages:
    """The messages before the last assistant turn. Raises DataError where there is none."""
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns or turns[-1] == 0:
        raise DataError("eval: a chat has no assistant turn after another message; there is nothing to reply to")
    return messages[: turns[-1]]


def encode_record(tokenizer: Tokenizer, chat: ChatRecord | Messages) -> tuple[list[int], list[bool]]:
    """Ids and what is scored, with the tools, the variables and the calls that training would see."""
    messages, tools, variables = _parts(tokenizer, chat)
    return encode_chat(tokenizer, messages, tools=tools, variables=variables)


def _encode_prompt(tokenizer: Tokenizer, chat: ChatRecord | Messages) -> list[int]:
    messages, tools, variables = _parts(tokenizer, chat)
    return encode_prompt(tokenizer, prompt_of(messages), tools=tools, variables=variables)


def _parts(
    tokenizer: Tokenizer, chat: ChatRecord | Messages
) -> tuple[Messages, list[dict[str, Any]] | None, dict[str, Any] | None]:
    if not isinstance(chat, ChatRecord):
        return chat, None, None
    messages = write_calls(tokenizer, chat.messages, chat.tools, chat.variables)
    return messages, chat.tools, chat.variables
