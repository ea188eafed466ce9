"""What the engine is asked for and what it gives back: an order of token ids in, a stream of chunks out.

Orders are made where requests are read; streams are read there too, in the server's own event loop, while the engine's
thread fills them.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from lapis.generation.options import Sampling


@dataclass(frozen=True)
class Shaping:
    """What changes the logits of one reply, beyond Sampling. A grammar is one that grammar.py made; "" is none."""

    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str = ""

    @property
    def plain(self) -> bool:
        """Whether nothing is changed."""
        return not (self.frequency_penalty or self.presence_penalty or self.logit_bias or self.grammar)


@dataclass(frozen=True)
class Order:
    """Replies to one prompt. Reply i draws from the seed plus i. top_logprobs: alternatives; None asks for none."""

    model: str
    prompt: list[int]
    sampling: Sampling
    replies: int = 1
    shaping: Shaping = field(default_factory=Shaping)
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenScore:
    """A token with its log-probability under the model itself, and the likeliest tokens in its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Chunk:
    """A part of a reply. reason: "" while it goes on, else "end", "stop", "length" or "failed" (`text` says why).

    tokens: of the reply so far.
    """

    reply: int
    text: str
    scores: tuple[TokenScore, ...] = ()
    reason: str = ""
    tokens: int = 0


class ReplyStream:
    """Chunks of all replies to one order, as they come. `cancel` frees their places; nothing comes after it."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.cancelled = False
        self.cached_tokens = 0  # of the prompt, that an earlier one had read
        self._chunks: asyncio.Queue[Chunk] = asyncio.Queue()
        self._open = order.replies

    def put(self, chunk: Chunk) -> None:
        """Called in the event loop, for each chunk that the engine made."""
        self._chunks.put_nowait(chunk)

    def cancel(self) -> None:
        """The reader has left. May be called from any thread, and more than once."""
        self.cancelled = True

    def __aiter__(self) -> "ReplyStream":
        return self

    async def __anext__(self) -> Chunk:
        if not self._open:
            raise StopAsyncIteration
        chunk = await self._chunks.get()
        self._open -= bool(chunk.reason)
        return chunk
