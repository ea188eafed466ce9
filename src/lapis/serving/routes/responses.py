"""POST /v1/responses: OpenAI's newer API, without its memory. A request is read as a chat; only its events differ.

Nothing is stored: a conversation is sent whole each time, and `previous_response_id` is refused.
"""

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from lapis.serving.engine.order import ReplyStream
from lapis.serving.engine.served import ServedModel
from lapis.serving.routes.bodies import CheckedRoute
from lapis.serving.routes.chat import ChatOrder, prepare
from lapis.serving.routes.orders import engine_of, writer_of
from lapis.serving.routes.replies import EventStream, event, gather, logprob_objects, while_connected
from lapis.serving.routes.response_schema import ChosenTool, ResponsesRequest, TextFormat, chat_of
from lapis.serving.tools import Call, CallReader

router = APIRouter(route_class=CheckedRoute, tags=["responses"])


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """A reply to a conversation, whole or as events."""
    served = writer_of(request, body.model)
    made = await run_in_threadpool(lambda: prepare(request, chat_of(body), served))
    (stream,) = engine_of(request).submit([made.order])
    draft = Draft(body, served, made, stream)
    if body.stream:
        return EventStream(draft.events(), served.hides, stream.cancel)
    (reply,) = await while_connected(request, [stream], gather([stream]))
    draft.words, draft.reason, draft.tokens = reply.text, reply.reason, reply.tokens
    draft.logprobs = logprob_objects(served, reply.scores)
    if made.toolbox:
        reader = CallReader(made.toolbox)
        draft.words = reader.read(reply.text, last=True)
        draft.calls = reader.calls
    return JSONResponse(draft.whole())


@dataclass
class Draft:
    """A response while it comes."""

    body: ResponsesRequest
    served: ServedModel
    made: ChatOrder
    stream: ReplyStream
    words: str = ""
    reason: str = ""
    tokens: int = 0
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    id: str = field(default_factory=lambda: f"resp_{uuid4().hex}")
    message_id: str = field(default_factory=lambda: f"msg_{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, status: str = "") -> dict[str, Any]:
        """The response object. status: where it is under way; else what its end says."""
        body, cut, choice = self.body, self.reason == "length", self.body.tool_choice
        format = (body.text.format if body.text else None) or TextFormat(type="text")
        usage = None
        if self.reason:
            prompt = len(self.made.order.prompt)
            usage = {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": self.stream.cached_tokens},
                "output_tokens": self.tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + self.tokens,
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status or ("incomplete" if cut else "completed"),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut and not status else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.served.name,
            "output": [] if status else self._output(),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.made.order.sampling.temperature,
            "top_p": self.made.order.sampling.top_p,
            "text": {"format": format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": choice.model_dump() if isinstance(choice, ChosenTool) else choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or []],
            "truncation": "disabled",
            "usage": usage,
            "metadata": body.metadata or {},
        }

    def _output(self) -> list[dict[str, Any]]:
        """What was replied: words, then calls."""
        items = [self._message()] if self.words.strip() or not self.calls else []
        return items + [self._call(call) for call in self.calls]

    def _message(self, status: str = "completed", words: str | None = None) -> dict[str, Any]:
        content = [self._part(self.words if words is None else words)] if status == "completed" else []
        return {"id": self.message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, words: str) -> dict[str, Any]:
        return {"type": "output_text", "text": words, "annotations": [], "logprobs": self.logprobs}

    def _call(self, call: Call, status: str = "completed") -> dict[str, Any]:
        arguments = call.arguments if status == "completed" else ""
        return {
            "id": f"fc_{call.id.removeprefix('call_')}", "type": "function_call", "call_id": call.id,
            "name": call.name, "arguments": arguments, "status": status,
        }  # fmt: skip

    async def events(self) -> AsyncIterator[str]:
        """The events of the response as it comes, numbered."""
        numbers = count()

        def numbered(kind: str, **fields: Any) -> str:
            return event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

        yield numbered("response.created", response=self.whole("in_progress"))
        yield numbered("response.in_progress", response=self.whole("in_progress"))
        reader = CallReader(self.made.toolbox) if self.made.toolbox else None
        place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        spoken = False
        async for chunk in self.stream:
            if chunk.reason == "failed":
                failed = {**self.whole("failed"), "error": {"code": "server_error", "message": chunk.text}}
                yield numbered("response.failed", response=failed)
                return
            words = chunk.text
            if reader:
                words = reader.read(words, last=bool(chunk.reason))
            logprobs = logprob_objects(self.served, chunk.scores)
            self.words, self.reason, self.tokens = self.words + words, chunk.reason, chunk.tokens
            self.logprobs += logprobs
            if words and not spoken:
                spoken = True
                for line in self._opening(numbered, place):
                    yield line
            if words:
                yield numbered("response.output_text.delta", **place, delta=words, logprobs=logprobs)
        self.calls = reader.calls if reader else []
        if not spoken and not self.calls:
            spoken = True
            for line in self._opening(numbered, place):
                yield line
        if spoken:
            yield numbered("response.output_text.done", **place, text=self.words, logprobs=self.logprobs)
            yield numbered("response.content_part.done", **place, part=self._part(self.words))
            yield numbered("response.output_item.done", output_index=0, item=self._message())
        for index, call in enumerate(self.calls, int(spoken)):
            for line in self._calling(numbered, call, index):
                yield line
        end = "response.incomplete" if self.reason == "length" else "response.completed"
        yield numbered(end, response=self.whole())

    def _opening(self, numbered: Any, place: Mapping[str, Any]) -> Iterator[str]:
        """The events before the first words."""
        yield numbered("response.output_item.added", output_index=0, item=self._message("in_progress"))
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield numbered("response.content_part.added", **place, part=part)

    def _calling(self, numbered: Any, call: Call, index: int) -> Iterator[str]:
        """The events of a call."""
        item = self._call(call)
        place = {"item_id": item["id"], "output_index": index}
        yield numbered("response.output_item.added", output_index=index, item=self._call(call, "in_progress"))
        yield numbered("response.function_call_arguments.delta", **place, delta=call.arguments)
        yield numbered("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
        yield numbered("response.output_item.done", output_index=index, item=item)
