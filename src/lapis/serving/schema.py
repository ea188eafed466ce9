"""The bodies that clients send, as OpenAI's API has them, and which of their fields cannot be honored.

An unknown field is ignored, as OpenAI does. A known one that would change the reply and cannot be honored is refused:
`UNSUPPORTED` names them with what to do instead. Leaves out what is done with a body: routes/.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_REPLIES = 32
MOST_STOPS = 16
MOST_MESSAGES = 10_000
MOST_INPUTS = 2048  # texts in one request for embeddings
MOST_TOOLS = 128
MOST_TOP_LOGPROBS = 20
SEEDS = 2**53

Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Checked(BaseModel):
    """An object of a request: no value is converted, and an unknown field is ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Body(Checked):
    """What all bodies have: a model, and fields that are refused where they are set."""

    model_config = ConfigDict(protected_namespaces=())
    UNSUPPORTED: ClassVar[Mapping[str, str]] = {}

    model: Annotated[str, Field(max_length=500)]

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, remedy in cls.UNSUPPORTED.items():
                if values.get(name) not in (None, False, [], {}, "none", "auto"):
                    raise ValueError(f"{name} is not supported here; {remedy}")
        return values


class SamplingBody(Body):
    """How tokens are chosen; top_k, min_p and repetition_penalty are beyond OpenAI's."""

    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, le=SEEDS)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_REPLIES)] | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    user: str | None = None


class StreamOptions(Checked):
    """include_usage: one more chunk at the end, with the counts of tokens."""

    include_usage: bool | None = None


class MessagePart(Checked):
    """A part of a message."""

    type: str
    text: str | None = None


class CalledFunction(Checked):
    """The function of a call; arguments: JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(Checked):
    """A call that the assistant made earlier."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Checked):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[MessagePart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionTool(Checked):
    """What a tool's function is called and takes."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Checked):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Checked):
    """The name of a function."""

    name: str


class NamedTool(Checked):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Checked):
    """A schema with a name, as OpenAI wraps it."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Checked):
    """What a reply is to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(SamplingBody):
    """POST /v1/chat/completions."""

    UNSUPPORTED = {
        "functions": "give them as tools",
        "function_call": "give tool_choice",
        "audio": "replies are text",
        "web_search_options": "the server reaches no other machine",
        "store": "nothing is stored; leave it out",
        "prediction": "leave it out",
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolBody], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the template (enable_thinking, ...), beyond OpenAI's."""


class LensRequest(Body):
    """POST /lapis/lens. reply: its token ids, or its text, which may be cut into other tokens than those it had.

    What stands before it is a chat, in `messages`, or a text that goes on, in `prompt`.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    prompt: str | Annotated[list[int], Field(min_length=1)] | None = None
    reply: str | list[int]
    place: Annotated[int, Field(ge=0, le=2**31)]
    """Of a token in the reply, from 0; the number of tokens is the place behind the last."""
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    UNSUPPORTED = {"suffix": "a reply goes at the end", "best_of": "give n, and choose"}

    prompt: (
        str
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[str | list[int]], Field(min_length=1, max_length=MOST_INPUTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    echo: bool | None = None


class EmbeddingsRequest(Body):
    """POST /v1/embeddings."""

    input: (
        str
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[str | list[int]], Field(min_length=1, max_length=MOST_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
