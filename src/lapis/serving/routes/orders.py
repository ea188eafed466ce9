"""From a body to an order: prompts as ids, sampling, and what shapes the reply. Everything is checked here, before the
engine sees it."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request

from lapis.config import build
from lapis.errors import ConfigError, LapisError
from lapis.generation.generate import encode
from lapis.generation.options import Sampling
from lapis.serving.engine.engine import Engine
from lapis.serving.engine.grammar import ANY_OBJECT, schema_grammar
from lapis.serving.engine.order import Shaping
from lapis.serving.engine.served import ServedModel
from lapis.serving.errors import ApiError
from lapis.serving.schema import ResponseFormat, SamplingBody

SHORT = 16  # new tokens of a completion where the request says nothing, as OpenAI has it


def engine_of(request: Request) -> Engine:
    """The engine of the app that was asked."""
    engine = request.app.state.engine
    assert isinstance(engine, Engine)
    return engine


def model_of(request: Request, name: str) -> ServedModel:
    """The model of that name. Raises ApiError 404 where it is not served here."""
    models = engine_of(request).models
    if name not in models:
        there = ", ".join(models)
        raise ApiError(
            404, f"the model {name[:100]!r} is not served here; there is {there}", param="model", code="model_not_found"
        )
    return models[name]


def writer_of(request: Request, name: str) -> ServedModel:
    """A model that continues text. Raises ApiError where there is none of that name."""
    served = model_of(request, name)
    if not served.replies:
        raise ApiError(400, f"{name} does not write; it has /v1/embeddings", param="model")
    return served


def checked_prompt(served: ServedModel, ids: list[int], param: str) -> list[int]:
    """The ids, where they leave room for a reply. Raises ApiError with the counts where they do not."""
    if len(ids) >= served.context:
        raise ApiError(
            400,
            f"the prompt has {len(ids):,} tokens and the context is {served.context:,}, for prompt and reply together; "
            f"shorten it to {served.context - 1:,} or fewer",
            param=param,
            code="context_length_exceeded",
        )
    return ids


def prompts_of(prompt: str | Sequence[Any]) -> list[str | list[int]]:
    """The prompts of a field that holds a text, texts, ids, or lists of ids."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)


def encoded(served: ServedModel, prompt: str | Sequence[int]) -> list[int]:
    """Ids of a text or of ids, checked."""
    if not isinstance(prompt, str):
        checked_prompt(served, list(prompt), "prompt")
    try:
        return checked_prompt(served, encode(served.model, served.tokenizer, prompt), "prompt")
    except LapisError as error:
        text = str(error).removeprefix("generate: ")
        long = "model's context" in text
        code = "context_length_exceeded" if long else None
        raise ApiError(400, served.hides(text), param="prompt", code=code) from None


def sampling_of(body: SamplingBody, served: ServedModel, new: int | None) -> Sampling:
    """How tokens are chosen: what the request says, else the folder's own settings, else OpenAI's defaults.

    Args:
        body: Of the request.
        served: The model.
        new: New tokens at most.
    """
    own = own_sampling(served.defaults())
    fields = {
        name: getattr(body, name) if getattr(body, name) is not None else own.get(name, default)
        for name, default in (
            ("temperature", 1.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0),
        )
    }  # fmt: skip
    if fields["top_p"] == 0:  # OpenAI takes it; the likeliest token is what is left
        fields["top_p"], fields["top_k"] = 1.0, 1
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    try:
        return Sampling(**fields, max_tokens=new or served.context, stop=stop, seed=body.seed)
    except ConfigError as error:
        raise ApiError(400, str(error).removeprefix("sampling: ")) from None


def own_sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says of sampling, where it samples; values that are none are left out."""
    if generation.get("do_sample") is not True:
        return {}
    fields: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = generation.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                build(Sampling, {name: value}, "generation_config.json")
            except ConfigError:
                continue
            fields[name] = value
    return fields


def shaping_of(body: SamplingBody, served: ServedModel, grammar: str) -> Shaping:
    """Penalties, biases and the grammar. Raises ApiError for a bias of a token that there is not."""
    vocab = served.model.config.vocab
    bias = {}
    for token, value in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab):
            raise ApiError(400, f"logit_bias: {token[:40]!r} is no token; ids go to {vocab - 1:,}", param="logit_bias")
        bias[int(token)] = value
    return Shaping(body.frequency_penalty or 0.0, body.presence_penalty or 0.0, bias, grammar)


def format_grammar(format: ResponseFormat | None) -> str:
    """The grammar of what a reply is to be; "" for text."""
    if format is None or format.type == "text":
        return ""
    if format.type == "json_object":
        return schema_grammar(ANY_OBJECT)
    schema = format.json_schema.schema_ if format.json_schema else None
    if schema is None:
        raise ApiError(400, "response_format: a json_schema needs its schema", param="response_format")
    return schema_grammar(schema)
