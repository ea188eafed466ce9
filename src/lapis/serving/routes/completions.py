"""POST /v1/completions: a text goes on."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from lapis.serving.engine.order import Order, ReplyStream, TokenScore
from lapis.serving.engine.served import ServedModel
from lapis.serving.errors import ApiError
from lapis.serving.routes.bodies import CheckedRoute
from lapis.serving.routes.orders import (
    SHORT,
    encoded,
    engine_of,
    prompts_of,
    sampling_of,
    shaping_of,
    writer_of,
)
from lapis.serving.routes.replies import (
    DONE,
    FINISH,
    EventStream,
    cancel_all,
    counted,
    event,
    failure,
    gather,
    logprob_objects,
    merged,
    while_connected,
    written,
)
from lapis.serving.schema import MOST_REPLIES, CompletionRequest

router = APIRouter(route_class=CheckedRoute, tags=["completions"])


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continuations of texts or ids, whole or as events."""
    served = writer_of(request, body.model)
    orders, echoes = await run_in_threadpool(prepare, body, served)
    streams = engine_of(request).submit(orders)
    head = {"id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": served.name}
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(
            _events(served, streams, echoes, head, with_usage), served.hides, lambda: cancel_all(streams)
        )
    replies = await while_connected(request, streams, gather(streams))
    choices = []
    for i, reply in enumerate(replies):
        logprobs = None
        if body.logprobs is not None:
            logprobs = logprob_lists(served, reply.scores, len(echoes[i]))
        text = echoes[i] + reply.text
        choices.append({"index": i, "text": text, "logprobs": logprobs, "finish_reason": FINISH[reply.reason]})
    counts = counted(streams, sum(reply.tokens for reply in replies))
    return JSONResponse({**head, "choices": choices, "usage": counts})


def prepare(body: CompletionRequest, served: ServedModel) -> tuple[list[Order], list[str]]:
    """An order for each prompt, and what stands before each reply. Raises ApiError for what cannot be done."""
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "logprobs with echo: those of a prompt are not computed; leave one out", param="echo")
    prompts, replies = prompts_of(body.prompt), body.n or 1
    if len(prompts) * replies > MOST_REPLIES:
        raise ApiError(
            400, f"{len(prompts)} prompts times n {replies}; {MOST_REPLIES} replies are the most", param="prompt"
        )
    new = body.max_tokens or SHORT
    sampling, shaping = sampling_of(body, served, new), shaping_of(body, served, "")
    orders = [
        Order(served.name, encoded(served, prompt), sampling, replies, shaping, body.logprobs) for prompt in prompts
    ]
    texts = [(prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)) if body.echo else ""
             for prompt in prompts]  # fmt: skip
    return orders, [text for text in texts for _ in range(replies)]


def logprob_lists(served: ServedModel, scores: Sequence[TokenScore], offset: int) -> dict[str, Any]:
    """Log-probabilities as completions have them; `content`, as chats have them, is beyond that.

    offset: characters before the first token.
    """
    texts, offsets = [], []
    for score in scores:
        texts.append(served.tokenizer.decode([score.id]))
        offsets.append(offset)
        offset += len(texts[-1])
    tops = [{served.tokenizer.decode([token]): written(value) for token, value in score.top} for score in scores]
    return {
        "tokens": texts,
        "token_logprobs": [written(score.logprob) for score in scores],
        "top_logprobs": tops,
        "text_offset": offsets,
        "content": logprob_objects(served, scores),
    }


async def _events(
    served: ServedModel,
    streams: Sequence[ReplyStream],
    echoes: Sequence[str],
    head: Mapping[str, Any],
    with_usage: bool,
) -> AsyncIterator[str]:
    """The events of replies as they come."""
    tail = {"usage": None} if with_usage else {}
    tokens, lengths = [0] * len(echoes), [len(echo) for echo in echoes]

    def part(reply: int, text: str, logprobs: Any = None, finish: str | None = None) -> str:
        choice = {"index": reply, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return event({**head, "choices": [choice], **tail})

    for i, echo in enumerate(echoes):
        if echo:
            yield part(i, echo)
    async for i, chunk in merged(streams):
        if chunk.reason == "failed":
            yield failure(chunk)
            break
        logprobs = logprob_lists(served, chunk.scores, lengths[i]) if chunk.scores else None
        tokens[i] = chunk.tokens
        lengths[i] += len(chunk.text)
        yield part(i, chunk.text, logprobs, FINISH.get(chunk.reason))
    if with_usage:
        yield event({**head, "choices": [], "usage": counted(streams, sum(tokens))})
    yield DONE
