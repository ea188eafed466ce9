"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from lapis.serving.engine.grammar import lark_grammar
from lapis.serving.engine.order import Order, ReplyStream
from lapis.serving.engine.served import ServedModel
from lapis.serving.errors import ApiError
from lapis.serving.routes.bodies import CheckedRoute
from lapis.serving.routes.orders import (
    checked_prompt,
    engine_of,
    format_grammar,
    sampling_of,
    shaping_of,
    writer_of,
)
from lapis.serving.routes.replies import (
    DONE,
    FINISH,
    EventStream,
    Gathered,
    counted,
    event,
    failure,
    gather,
    logprob_objects,
    while_connected,
)
from lapis.serving.schema import ChatMessage, ChatRequest, NamedTool
from lapis.serving.tools import CallReader, Toolbox, make_toolbox
from lapis.text.chat.chat import encode_prompt, write_calls

router = APIRouter(route_class=CheckedRoute, tags=["chat"])


@dataclass(frozen=True)
class ChatOrder:
    """What a chat asks the engine for, and how its replies are read."""

    order: Order
    toolbox: Toolbox | None


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Replies to a chat, whole or as events."""
    served = writer_of(request, body.model)
    made = await run_in_threadpool(prepare, request, body, served)
    (stream,) = engine_of(request).submit([made.order])
    head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": served.name}
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(_events(served, made, stream, head, with_usage), served.hides, stream.cancel)
    replies = await while_connected(request, [stream], gather([stream]))
    return JSONResponse(_whole(served, made, stream, replies, head))


def prepare(request: Request, body: ChatRequest, served: ServedModel) -> ChatOrder:
    """The order of a body. Raises ApiError or LapisError for what cannot be done."""
    new = body.max_completion_tokens or body.max_tokens
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    choice = body.tool_choice
    if not tools and choice not in (None, "none", "auto"):
        raise ApiError(400, "tool_choice: there are no tools to choose from", param="tool_choice")
    toolbox = None
    if tools and choice != "none":
        toolbox = make_toolbox(served.tokenizer, tools, body.parallel_tool_calls is False)
    grammar = format_grammar(body.response_format)
    if toolbox and choice not in (None, "auto"):
        if grammar:
            raise ApiError(400, "response_format: a reply that must be a call has no other form", param="tool_choice")
        grammar = _call_grammar(served, toolbox, choice)
    elif toolbox and toolbox.strict and not grammar:
        grammar = lark_grammar(toolbox.grammar(served.tokenizer, forced=False))
    if grammar:
        engine_of(request).grammars(served.name).check(grammar)
    messages = [message_of(message) for message in body.messages]
    given = toolbox.tools if toolbox else None
    written = write_calls(served.tokenizer, messages, given, body.chat_template_kwargs)
    ids = encode_prompt(served.tokenizer, written, tools=given, variables=body.chat_template_kwargs)
    if not ids:
        raise ApiError(400, "messages: the chat template writes nothing for them", param="messages")
    top = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    order = Order(
        served.name,
        checked_prompt(served, ids, "messages"),
        sampling_of(body, served, new),
        body.n or 1,
        shaping_of(body, served, grammar),
        top,
    )
    return ChatOrder(order, toolbox)


def message_of(message: ChatMessage) -> dict[str, Any]:
    """A message as templates read it. Raises ApiError for content that is no text."""
    fields = message.model_dump(exclude_none=True)
    if fields["role"] == "developer":
        fields["role"] = "system"
    if isinstance(message.content, list):
        for part in message.content:
            if part.type != "text" or part.text is None:
                raise ApiError(
                    400, f"a part of a message is of type {part.type[:40]!r}; it can be text", param="messages"
                )
        fields["content"] = [{"type": "text", "text": part.text} for part in message.content]
    if "content" not in fields:
        if not message.tool_calls:
            raise ApiError(400, f"a message of the {message.role} has no content", param="messages")
        fields["content"] = ""
    return fields


def _call_grammar(served: ServedModel, toolbox: Toolbox, choice: str | NamedTool | None) -> str:
    only = choice.function.name if isinstance(choice, NamedTool) else None
    if only is not None and only not in toolbox.names:
        raise ApiError(400, f"tool_choice: there is no tool {only[:60]!r}", param="tool_choice")
    return lark_grammar(toolbox.grammar(served.tokenizer, only))


def _whole(
    served: ServedModel, made: ChatOrder, stream: ReplyStream, replies: Sequence[Gathered], head: Mapping[str, Any]
) -> dict[str, Any]:
    """The object of replies that have ended."""
    choices = []
    for i, reply in enumerate(replies):
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
        finish = FINISH[reply.reason]
        if made.toolbox:
            reader = CallReader(made.toolbox)
            words = reader.read(reply.text, last=True)
            if reader.calls:
                message["content"] = words.strip() or None
                message["tool_calls"] = [call.to_json() for call in reader.calls]
                finish = "tool_calls"
        logprobs = None
        if made.order.top_logprobs is not None:
            logprobs = {"content": logprob_objects(served, reply.scores), "refusal": None}
        choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": finish})
    counts = counted([stream], sum(reply.tokens for reply in replies))
    return {**head, "object": "chat.completion", "choices": choices, "usage": counts}


async def _events(
    served: ServedModel, made: ChatOrder, stream: ReplyStream, head: Mapping[str, Any], with_usage: bool
) -> AsyncIterator[str]:
    """The events of replies as they come."""
    head = {**head, "object": "chat.completion.chunk"}
    tail = {"usage": None} if with_usage else {}

    def delta(reply: int, fields: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": reply, "delta": fields, "logprobs": logprobs, "finish_reason": finish}
        return event({**head, "choices": [choice], **tail})

    readers = [CallReader(made.toolbox) if made.toolbox else None for _ in range(made.order.replies)]
    sent = [0] * made.order.replies
    tokens = [0] * made.order.replies
    for i in range(made.order.replies):
        yield delta(i, {"role": "assistant", "content": ""})
    async for chunk in stream:
        if chunk.reason == "failed":
            yield failure(chunk)
            break
        i, words = chunk.reply, chunk.text
        tokens[i] = chunk.tokens
        reader, finish = readers[i], FINISH.get(chunk.reason)
        if reader:
            words = reader.read(words, last=finish is not None)
        logprobs = None
        if made.order.top_logprobs is not None and chunk.scores:
            logprobs = {"content": logprob_objects(served, chunk.scores), "refusal": None}
        if words or logprobs:
            yield delta(i, {"content": words}, None, logprobs)
        for number, call in enumerate(reader.calls[sent[i] :] if reader else (), sent[i]):
            yield delta(i, {"tool_calls": [{"index": number, **call.to_json()}]})
            sent[i] += 1
        if finish:
            yield delta(i, {}, "tool_calls" if sent[i] else finish)
    if with_usage:
        yield event({**head, "choices": [], "usage": counted([stream], sum(tokens))})
    yield DONE
