"""Text from a model: one prompt, a stream of pieces, or many prompts at once, with a key-value cache.

    generate(model, tokenizer, "Apa khabar?")                      -> text
    stream(model, tokenizer, [{"role": "user", ...}])              -> pieces of text as they are certain
    generate_batch(model, tokenizer, prompts, Sampling(seed=1))    -> a Reply for each prompt

A prompt is text, a chat (a list of messages, rendered with the model's own template), or token ids. Special tokens in a
user's text are plain text. Leaves out the server, speculative decoding and beam search.

Shapes: B rows, T new tokens, S tokens in the cache, V vocabulary.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor

from lapis.errors import ConfigError, DataError
from lapis.generation.options import Sampling
from lapis.generation.sampling import choose, generators
from lapis.generation.text import Pieces
from lapis.model.reading.readable import ReadableModel, TokenCache
from lapis.text.chat.chat import encode_prompt
from lapis.text.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


@dataclass(frozen=True)
class Reply:
    """A model's reply to one prompt.

    ids: the new tokens, with the end token where there is one. stop_reason: "end" (the model's end token), "stop" (a
    stop text, cut from the text) or "length" (max_tokens, or the context is full). logprobs: of each new token under
    the model itself, before temperature and filters; empty unless requested. prompt_tokens: length of the prompt.
    """

    text: str
    ids: tuple[int, ...]
    stop_reason: str
    logprobs: tuple[float, ...]
    prompt_tokens: int


def generate(model: ReadableModel, tokenizer: Tokenizer, prompt: Prompt, sampling: Sampling = Sampling()) -> str:  # noqa: B008
    """The model's continuation of a prompt, or its reply to a chat.

    Args:
        model: In evaluating mode.
        tokenizer: Of the model.
        prompt: Text, ids, or messages (then the chat template is used).
        sampling: How tokens are chosen, and when to stop.

    Raises:
        DataError: For a prompt that is empty or does not fit into the model's context.
    """
    return "".join(stream(model, tokenizer, prompt, sampling))


def stream(
    model: ReadableModel,
    tokenizer: Tokenizer,
    prompt: Prompt,
    sampling: Sampling = Sampling(),  # noqa: B008
    *,
    memory: "Memory | None" = None,
) -> "Generator[str, None, Reply]":
    """The text of `generate` in pieces, each as soon as it is certain: no character is split, no stop text half shown.

    Args:
        model: In evaluating mode.
        tokenizer: Of the model.
        prompt: Text, ids, or messages.
        sampling: How tokens are chosen, and when to stop.
        memory: What earlier turns of the same chat have read; only what is new is read, and the memory goes on from
            here.

    Returns:
        The generator's own value (`reply = yield from stream(...)`) is the Reply.
    """
    memory = memory or Memory()
    row = ReplyRow(tokenizer, encode(model, tokenizer, prompt), sampling, model.config.reach)
    decoding = Decoding(model, [row.prompt], sampling, cache=memory.recall(row.prompt))
    while not row.stop_reason:
        memory.forget()  # a step that is interrupted leaves a cache in which nothing is certain
        (token,) = decoding.step()
        memory.keep(decoding.cache, row.prompt + row.ids)
        if piece := row.add(token):
            yield piece
    return row.reply()


def generate_batch(
    model: ReadableModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling = Sampling(),  # noqa: B008
    *,
    batch_size: int = 64,
    logprobs: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """A Reply for each prompt, in their order. Prompts may differ in length; a row's reply depends on no other row.

    Args:
        model: In evaluating mode.
        tokenizer: Of the model.
        prompts: Texts, ids, or messages.
        sampling: How tokens are chosen, and when to stop; row i draws from seed + i.
        batch_size: Rows decoded at once; those of like length share a batch.
        logprobs: Fill in Reply.logprobs.
        progress: Called with how many replies are complete, and of how many.
    """
    rows = [ReplyRow(tokenizer, encode(model, tokenizer, p), sampling, model.config.reach) for p in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        live = [rows[i] for i in numbers]
        decoding = Decoding(model, [row.prompt for row in live], sampling, numbers)
        while live:
            tokens = decoding.step()
            chances = decoding.logprobs() if logprobs else None
            for place, (row, token) in enumerate(zip(live, tokens, strict=True)):
                if not row.stop_reason:
                    row.add(token)
                    if chances:
                        row.logprobs.append(chances[place])
            if progress:
                progress(sum(bool(row.stop_reason) for row in rows), len(rows))
            going = [place for place, row in enumerate(live) if not row.stop_reason]
            # Rows that are done are carried along until a quarter of the batch is: dropping them copies the cache
            if len(going) <= len(live) * 3 // 4:
                live = [live[place] for place in going]
                if live:
                    decoding.keep(going)
    return [row.reply() for row in rows]


def encode(model: ReadableModel, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Ids of a prompt. Raises DataError where it is empty or leaves no room, ConfigError for a model without text."""
    config = model.config
    if config.head != "lm" or not config.causal:
        raise ConfigError(f"generate: a {config.family} model with the head {config.head} does not continue text")
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, add_special_tokens=True)
        if not ids and tokenizer.document_lead is not None:  # an empty text begins as training documents do
            ids = [tokenizer.document_lead]
    elif prompt and isinstance(prompt[0], Mapping):
        ids = encode_prompt(tokenizer, cast(Sequence[Mapping[str, Any]], prompt))
    else:
        ids = list(cast(Sequence[int], prompt))
        if ids and not 0 <= min(ids) <= max(ids) < config.vocab:
            raise DataError(
                f"generate: the prompt's ids go from {min(ids)} to {max(ids)}; the vocabulary has {config.vocab:,}"
            )
    if not ids:
        raise DataError("generate: the prompt is empty; give a text, a chat or token ids")
    if len(ids) >= (most := model.config.reach):
        raise DataError(
            f"generate: the prompt has {len(ids):,} tokens and the model's context is {most:,}; "
            f"shorten it to {most - 1:,} or fewer"
        )
    return ids


class Decoding:
    """Rows that are decoded together: the first step reads the prompts, and each step gives one token per row.

    Shorter prompts are padded on the left, so that all rows write to the same place of the cache. The cache remembers
    what is padding, and each row's positions count from its own first token.
    """

    def __init__(
        self,
        model: ReadableModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        rows: Sequence[int] = (0,),
        *,
        cache: TokenCache | None = None,
    ) -> None:
        """rows: the number of each row, from which its draws follow. cache: of these rows, with all that they begin
        with but at least the last place."""
        self._model = model
        self._sampling = sampling
        self._draws = generators(sampling, rows)
        self._ids_BT, self._mask_BT, self._seen_BV = self._begin(prompts)
        if cache is None:
            room = self._ids_BT.shape[1] + min(sampling.max_tokens, 256)  # it grows where a reply is longer
            cache = model.new_cache(len(prompts), room)
        self.cache = cache
        self._ids_BT = self._ids_BT[:, cache.length :]
        self._mask_BT = None if self._mask_BT is None else self._mask_BT[:, cache.length :]

    def _begin(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Ids padded on the left, what of them is real, and which tokens each row has seen (where that matters)."""
        device = self._model.device
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        ids_BT = torch.tensor(padded, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        real_BT = torch.arange(longest, device=device) >= longest - lengths[:, None]
        mask_BT = None if all(len(prompt) == longest for prompt in prompts) else real_BT
        if self._sampling.repetition_penalty == 1:
            return ids_BT, mask_BT, None
        vocab = self._model.config.vocab
        seen_BV = torch.zeros(len(prompts), vocab + 1, dtype=torch.bool, device=device)  # the last takes the padding
        return ids_BT, mask_BT, seen_BV.scatter_(1, ids_BT.where(real_BT, vocab), True)[:, :vocab]

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The next token of each row. Raises LapisError where the model's logits are not numbers."""
        hidden_BTD = self._model.hidden(self._ids_BT, self._mask_BT, cache=self.cache)
        self._logits_BV = self._model.head(hidden_BTD[:, -1])
        ids_B = choose(self._logits_BV, self._sampling, self._draws, self._seen_BV)
        self._ids_BT, self._mask_BT = ids_B[:, None], None
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, self._ids_BT, True)
        tokens: list[int] = ids_B.tolist()
        return tokens

    @torch.inference_mode()
    def logprobs(self, temperature: float = 1.0) -> list[float]:
        """Log-probability of each row's last token under the model itself, without filters."""
        logits_BV = self._logits_BV.float() / temperature
        chosen_B = logits_BV.gather(1, self._ids_BT)[:, 0]
        logprobs: list[float] = (chosen_B - logits_BV.logsumexp(-1)).tolist()
        return logprobs

    @torch.inference_mode()
    def keep(self, places: Sequence[int]) -> None:
        """Goes on with these rows only."""
        index = torch.tensor(places, device=self._ids_BT.device)
        self._draws = [self._draws[place] for place in places]
        self._ids_BT = self._ids_BT[index]
        self._seen_BV = None if self._seen_BV is None else self._seen_BV[index]
        self.cache.select(index)


class Memory:
    """What a model has read of a chat, so that the next turn reads only what was added to it."""

    def __init__(self) -> None:
        self.cache: TokenCache | None = None
        self.ids: list[int] = []  # what the cache holds

    def recall(self, ids: Sequence[int]) -> TokenCache | None:
        """The cache, cut to what `ids` begins with, and short of its last token, which has to be read; or None."""
        cache, self.cache = self.cache, None
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids[:-1], strict=False)))
        if cache is None or not shared:
            return None
        try:
            cache.truncate(shared)
        except ValueError:  # a sliding window has moved on
            return None
        return cache

    def keep(self, cache: TokenCache, ids: list[int]) -> None:
        self.cache, self.ids = cache, ids

    def forget(self) -> None:
        self.cache = None


class ReplyRow:
    """One prompt and the reply to it so far; context: tokens that both may have together."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling, context: int) -> None:
        self.prompt = prompt
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.stop_reason = ""
        self.pieces = Pieces(tokenizer, prompt, sampling.stop)
        self._ends = frozenset(tokenizer.end_ids)
        self._most = min(sampling.max_tokens, context - len(prompt))

    def add(self, token: int) -> str:
        """Takes in a token; the text that is now certain. Sets stop_reason where it was the last."""
        self.ids.append(token)
        if token in self._ends:
            self.stop_reason = "end"
            return self.pieces.end()
        piece = self.pieces.add(token)
        if self.pieces.stopped:
            self.stop_reason = "stop"
        elif len(self.ids) >= self._most:
            self.stop_reason = "length"
            piece += self.pieces.end()
        return piece

    def reply(self) -> Reply:
        return Reply(self.pieces.text, tuple(self.ids), self.stop_reason, tuple(self.logprobs), len(self.prompt))
