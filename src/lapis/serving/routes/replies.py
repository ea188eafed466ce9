"""Replies on their way to a client: gathered whole, or as server-sent events; a client that leaves frees its places."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from lapis.errors import LapisError
from lapis.serving.engine.order import Chunk, ReplyStream, TokenScore
from lapis.serving.engine.served import ServedModel
from lapis.serving.errors import ApiError, body_of

Result = TypeVar("Result")
FINISH = {"end": "stop", "stop": "stop", "length": "length"}  # what OpenAI calls the ways in which a reply ends
LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}  # that JSON leaves as they are
DONE = "data: [DONE]\n\n"
GONE = 499  # the status of a request whose client has left; nobody sees it but the metrics


@dataclass
class Gathered:
    """A whole reply."""

    text: str = ""
    reason: str = ""
    tokens: int = 0
    scores: list[TokenScore] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        """Takes in its next chunk."""
        self.text += chunk.text
        self.reason, self.tokens = chunk.reason, chunk.tokens
        self.scores += chunk.scores


async def gather(streams: Sequence[ReplyStream]) -> list[Gathered]:
    """All replies of some orders, in their order. Raises ApiError 500 where the model failed."""
    gathered: list[Gathered] = []
    for stream in streams:
        replies = [Gathered() for _ in range(stream.order.replies)]
        async for chunk in stream:
            if chunk.reason == "failed":
                raise ApiError(500, chunk.text)
            replies[chunk.reply].add(chunk)
        gathered += replies
    return gathered


async def merged(streams: Sequence[ReplyStream]) -> AsyncIterator[tuple[int, Chunk]]:
    """Chunks of several streams as they come, each with the number of its reply among all."""
    first, pending = 0, {}
    for stream in streams:
        pending[asyncio.ensure_future(anext(stream))] = stream, first
        first += stream.order.replies
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream, offset = pending.pop(task)
                if isinstance(task.exception(), StopAsyncIteration):
                    continue
                chunk = task.result()
                yield offset + chunk.reply, chunk
                pending[asyncio.ensure_future(anext(stream))] = stream, offset
    finally:
        for task in pending:
            task.cancel()


async def while_connected(
    request: Request, streams: Sequence[ReplyStream], work: Coroutine[Any, Any, Result]
) -> Result:
    """The result of some work; where the client leaves before, or the work fails, the streams are cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(GONE, "the client has left")
        return task.result()
    finally:
        cancel_all(streams)
        for other in (task, gone):
            other.cancel()
            with suppress(BaseException):
                await other


def cancel_all(streams: Sequence[ReplyStream]) -> None:
    """Frees the places of all replies."""
    for stream in streams:
        stream.cancel()


class EventStream(Response):
    """Server-sent events; what is refused midway is the last of them.

    hides: what may not be told of this machine. close: called when the last is sent, and as soon as the client leaves.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], hides: Callable[[str], str], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._hides, self._close = events, hides, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until all is sent or the client has left."""
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            self._close()
            for task in (pump, gone):
                task.cancel()
                with suppress(BaseException):
                    await task

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._lines():
            await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[str]:
        try:
            async for line in self._events:
                yield line
        except LapisError as error:
            yield event(body_of(500, self._hides(str(error))))


def event(value: Mapping[str, Any], name: str = "") -> str:
    """One server-sent event. Clients that split lines as Unicode does must find none within it."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(LINE_ENDS)
    line = f"data: {data}\n\n"
    return f"event: {name}\n{line}" if name else line


def failure(chunk: Chunk) -> str:
    """The event that tells of a reply that failed."""
    return event(body_of(500, chunk.text))


def counted(streams: Sequence[ReplyStream], reply: int) -> dict[str, Any]:
    """The usage of some orders, as OpenAI has it. reply: tokens of all replies."""
    prompt = sum(len(stream.order.prompt) for stream in streams)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": reply,
        "total_tokens": prompt + reply,
        "prompt_tokens_details": {"cached_tokens": sum(stream.cached_tokens for stream in streams)},
    }


def written(logprob: float) -> float:
    """A log-probability as JSON can hold it; OpenAI writes such a number for a token that cannot come."""
    return max(logprob, -9999.0)


def logprob_objects(served: ServedModel, scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
    """Log-probabilities as chat completions have them; the ids are beyond that."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {**served.token(token), "logprob": written(logprob)}

    return [
        {**one(score.id, score.logprob), "top_logprobs": [one(token, value) for token, value in score.top]}
        for score in scores
    ]


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
