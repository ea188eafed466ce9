"""POST /lapis/lens: what every layer would have said at a place of a reply."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from lapis.serving.engine.lens import LensReader
from lapis.serving.errors import ApiError
from lapis.serving.routes.bodies import CheckedRoute
from lapis.serving.routes.chat import message_of
from lapis.serving.routes.orders import encoded, writer_of
from lapis.serving.routes.replies import while_connected
from lapis.serving.schema import LensRequest
from lapis.text.chat.chat import encode_prompt, write_calls

router = APIRouter(route_class=CheckedRoute, tags=["lapis"])


@router.post("/lapis/lens")
async def lens(body: LensRequest, request: Request) -> dict[str, Any]:
    """The lens at a place of a reply to a chat, or of how a text goes on."""
    if (body.messages is None) == (body.prompt is None):
        raise ApiError(400, "give one of messages, a chat, and prompt, a text that goes on", param="messages")
    served = writer_of(request, body.model)
    reader = request.app.state.lens
    assert isinstance(reader, LensReader)

    def encode() -> tuple[list[int], list[int]]:
        reply = served.tokenizer.encode(body.reply) if isinstance(body.reply, str) else body.reply
        if body.prompt is not None:
            return encoded(served, body.prompt), reply
        messages = write_calls(served.tokenizer, [message_of(message) for message in body.messages or []], None)
        return encode_prompt(served.tokenizer, messages, variables=body.chat_template_kwargs), reply

    prompt, reply = await run_in_threadpool(encode)
    return await while_connected(request, [], reader.read(served, prompt, reply, body.place))
