"""The body of /v1/responses, and the chat that it stands for."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationError

from lapis.serving.errors import ApiError
from lapis.serving.schema import (
    MOST_MESSAGES,
    MOST_TOOLS,
    MOST_TOP_LOGPROBS,
    Body,
    ChatRequest,
    Checked,
    Count,
    Share,
    Temperature,
)

WORDS = ("input_text", "output_text", "text")  # kinds of parts that are text


class TextFormat(Checked):
    """What a reply is to be; a schema stands beside its name here."""

    model_config = ConfigDict(serialize_by_alias=True)
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Checked):
    """Options of the text of a reply."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseTool(Checked):
    """A tool that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenTool(Checked):
    """The one tool that is to be called."""

    type: Literal["function"]
    name: str


class ResponsesRequest(Body):
    """POST /v1/responses."""

    UNSUPPORTED: ClassVar[Mapping[str, str]] = {
        "previous_response_id": "nothing is stored; send the conversation whole",
        "conversation": "nothing is stored; send the conversation whole",
        "store": "nothing is stored; leave it out, or false",
        "background": "leave it out, and stream",
        "prompt": "send instructions and input",
        "reasoning": "leave it out; the chat template decides",
        "max_tool_calls": "leave it out",
        "context_management": "leave it out",
    }

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: str | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    max_output_tokens: Count | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] | None = None
    metadata: dict[str, str] | None = None


def chat_of(body: ResponsesRequest) -> ChatRequest:
    """The chat that a body stands for. Raises ApiError for an item that is no part of a chat."""
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    for i, item in enumerate(items):
        messages += _messages(item, f"input.{i}")
    format = body.text.format if body.text else None
    shape: dict[str, Any] | None = None
    if format is not None:
        shape = {"type": format.type}
        if format.type == "json_schema":
            shape["json_schema"] = {"name": format.name, "schema": format.schema_}
    choice: Any = body.tool_choice
    if isinstance(choice, ChosenTool):
        choice = {"type": "function", "function": {"name": choice.name}}
    logprobs = body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or [])
    fields = {
        "model": body.model,
        "messages": messages,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_tokens": body.max_output_tokens,
        "response_format": shape,
        "tools": [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools or []],
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "logprobs": logprobs,
        "top_logprobs": body.top_logprobs if logprobs else None,
    }
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ApiError(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", param="input") from None


def _messages(item: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages of one item of the input."""
    kind = item.get("type", "message")
    if kind == "reasoning":
        return []
    if kind == "function_call":
        call = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        return [{"role": "assistant", "tool_calls": [{"id": item.get("call_id"), "function": call}]}]
    if kind == "function_call_output":
        output: Any = item.get("output", "")
        text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
        return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": text}]
    if kind != "message":
        raise ApiError(400, f"{where}: an item of type {str(kind)[:40]!r} is not supported here", param="input")
    content: Any = item.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in WORDS or not isinstance(part.get("text"), str):
                named = part.get("type") if isinstance(part, dict) else part
                raise ApiError(400, f"{where}: a part is {str(named)[:40]!r}; it can be text", param="input")
            parts.append({"type": "text", "text": part["text"]})
        content = parts
    return [{"role": item.get("role", "user"), "content": content}]
