"""The official client against a real server process: every route, whole and streamed."""

import json

import openai
import pytest
import torch

import lapis
from lapis.generation.generate import generate_batch
from lapis.generation.options import Sampling

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "look at a thing",
        "parameters": {
            "type": "object",
            "properties": {"at": {"enum": ["cat", "dog"]}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
USER = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def loaded(folder):
    return lapis.load(folder, torch.float32)


def chat(client, **fields):
    fields = {"model": "tiny", "messages": USER, "temperature": 0, "max_tokens": 12, **fields}
    return client.chat.completions.create(**fields)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "long", "tools"]
    assert client.models.retrieve("tiny").owned_by == "lapis"


def test_reply_is_that_of_generate(client, loaded):
    whole = chat(client)
    (expected,) = generate_batch(*loaded, [USER], Sampling(max_tokens=12))
    assert whole.choices[0].message.content == expected.text
    assert whole.usage.completion_tokens == len(expected.ids) == 12
    assert whole.usage.prompt_tokens == expected.prompt_tokens
    assert whole.choices[0].finish_reason == "length"


def test_streamed_reply_is_the_whole_one(client):
    whole = chat(client, n=2, seed=5, temperature=1)
    chunks = list(chat(client, n=2, seed=5, temperature=1, stream=True, stream_options={"include_usage": True}))
    for i in range(2):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == i]
        assert "".join(choice.delta.content or "" for choice in mine) == whole.choices[i].message.content
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == whole.choices[i].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_seeds_make_replies_repeat(client, loaded):
    first, again, other = (chat(client, temperature=1.2, seed=seed).choices[0].message.content for seed in (1, 1, 2))
    (expected,) = generate_batch(*loaded, [USER], Sampling(temperature=1.2, seed=1, max_tokens=12))
    assert first == again == expected.text != other


def test_stop_text_is_left_out(client):
    text = chat(client, max_tokens=30).choices[0].message.content
    cut = chat(client, max_tokens=30, stop=[text[6:9]]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[: text.index(text[6:9])], "stop")


def test_logprobs(client):
    choice = chat(client, logprobs=True, top_logprobs=2).choices[0]
    tokens = choice.logprobs.content
    assert len(tokens) == 12 and all(len(token.top_logprobs) == 2 for token in tokens)
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in tokens)  # greedy
    assert bytes(b for token in tokens for b in token.bytes).decode(errors="replace") == choice.message.content
    chunks = chat(client, logprobs=True, top_logprobs=2, stream=True)
    streamed = [token for chunk in chunks if (part := chunk.choices[0].logprobs) for token in part.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_json_schema(client):
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    value = json.loads(chat(client, response_format=shape, max_tokens=100).choices[0].message.content)
    assert list(value) == ["n"] and 1 <= value["n"] <= 9
    (choice,) = chat(client, response_format={"type": "json_object"}, max_tokens=100).choices
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_tool_that_must_be_called_is_called(client):
    choices = ("required", {"type": "function", "function": {"name": "look"}})
    for choice in choices:
        reply = chat(client, model="tools", tools=[TOOL], tool_choice=choice, max_tokens=150).choices[0]
        assert reply.finish_reason == "tool_calls" and reply.message.content is None
        (call,) = reply.message.tool_calls
        assert call.function.name == "look" and json.loads(call.function.arguments)["at"] in ("cat", "dog")
    chunks = chat(client, model="tools", tools=[TOOL], tool_choice="required", max_tokens=150, stream=True)
    deltas = [chunk.choices[0] for chunk in chunks]
    (streamed,) = [c for delta in deltas for c in delta.delta.tool_calls or []]
    assert streamed.function.model_dump() == call.function.model_dump() and deltas[-1].finish_reason == "tool_calls"
    assert not any(delta.delta.content for delta in deltas)


def test_tools_are_told_and_answered(client):
    """The template sees the tool, the call with its arguments as an object, and the answer."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "cat"}'}}
    messages = [
        *USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "a"},
    ]
    told = chat(client, model="tools", messages=messages, tools=[TOOL], tool_choice="auto").usage.prompt_tokens
    assert told > chat(client, model="tools", messages=messages).usage.prompt_tokens + 50


def test_tools_without_a_place_for_them_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="template has no place for tools"):
        chat(client, tools=[TOOL])
    assert chat(client, tools=[TOOL], tool_choice="none").choices[0].message.content


def test_completions(client, loaded):
    reply = client.completions.create(model="tiny", prompt=["the cat", [5, 6, 7]], temperature=0, n=2, logprobs=1)
    expected = generate_batch(*loaded, ["the cat", [5, 6, 7]], Sampling(max_tokens=16))
    assert [c.text for c in reply.choices] == [expected[0].text] * 2 + [expected[1].text] * 2
    assert [c.index for c in reply.choices] == [0, 1, 2, 3] and reply.usage.completion_tokens == 64
    assert len(reply.choices[0].logprobs.tokens) == 16
    parts = client.completions.create(model="tiny", prompt=["the cat", [5, 6, 7]], temperature=0, stream=True)
    texts = ["", ""]
    for part in parts:
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == [reply.text for reply in expected]
    echoed = client.completions.create(model="tiny", prompt="the cat", temperature=0, echo=True)
    assert echoed.choices[0].text == "the cat" + expected[0].text


def test_responses(client, loaded):
    reply = client.responses.create(model="tiny", input="the cat", temperature=0, max_output_tokens=12)
    (expected,) = generate_batch(*loaded, [USER], Sampling(max_tokens=12))
    assert reply.output_text == expected.text and reply.status == "incomplete"
    assert reply.usage.output_tokens == 12 and reply.incomplete_details.reason == "max_output_tokens"
    with client.responses.stream(model="tiny", input=USER, temperature=0, max_output_tokens=12) as events:
        kinds = [event.type for event in events]
        assert kinds[0] == "response.created" and "response.output_text.delta" in kinds
    fields = {"model": "tiny", "input": USER, "temperature": 0, "max_output_tokens": 12}
    last = list(client.responses.create(**fields, stream=True))[-1]
    assert last.type == "response.incomplete" and last.response.output_text == expected.text
    shape = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}
    value = json.loads(client.responses.create(model="tiny", input=USER, text=shape).output_text)
    assert list(value) == ["n"]
    with pytest.raises(openai.BadRequestError, match="nothing is stored"):
        client.responses.create(model="tiny", input="a", previous_response_id="resp_1")


def test_responses_call_tools(client):
    tool = {"type": "function", **TOOL["function"], "strict": True}
    fields = {
        "model": "tools",
        "input": "the cat",
        "tools": [tool],
        "tool_choice": "required",
        "max_output_tokens": 150,
    }
    (item,) = client.responses.create(**fields).output
    assert item.type == "function_call" and json.loads(item.arguments)["at"] in ("cat", "dog")
    with client.responses.stream(**fields) as events:
        for _ in events:
            pass
    assert events.get_final_response().output[0].name == "look"
    answered = [{"role": "user", "content": "the cat"}, item.model_dump(), {"type": "function_call_output",
                "call_id": item.call_id, "output": "a cat"}]  # fmt: skip
    assert client.responses.create(
        **{**fields, "input": answered, "tool_choice": "auto", "max_output_tokens": 5}
    ).output


def test_embeddings_are_the_mean_of_the_last_layer(client, loaded):
    model, tokenizer = loaded
    texts = ["the cat", "a bird sang while the dog"]
    reply = client.embeddings.create(model="tiny", input=texts)
    for text, item in zip(texts, reply.data, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=True)
        with torch.inference_mode():
            expected = model.hidden(torch.tensor([ids]))[0].mean(0)
        assert torch.tensor(item.embedding).allclose(expected, atol=1e-5)
    floats = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [item.embedding for item in floats.data] == [item.embedding for item in reply.data]
    assert reply.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in texts)
    with pytest.raises(openai.BadRequestError, match="vectors of 32 numbers"):
        client.embeddings.create(model="tiny", input="a", dimensions=8)


@pytest.mark.parametrize("name", ["../tiny", "/etc/passwd", "tiny/../tiny", ""])
def test_fault_101_unknown_model_is_404_and_no_path(client, name):
    with pytest.raises(openai.NotFoundError, match="not served here; there is tiny, long, tools") as refused:
        client.chat.completions.create(model=name, messages=USER)
    assert refused.value.code == "model_not_found"


def test_langchain_talks_streams_and_calls_tools(server):
    from langchain_openai import ChatOpenAI

    def model(name="tiny", **options):
        return ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model=name, temperature=0, **options)

    whole = model(max_completion_tokens=10).invoke([("system", "be a cat"), ("user", "the cat")])
    pieces = model(max_completion_tokens=10).stream([("system", "be a cat"), ("user", "the cat")])
    assert whole.content and "".join(piece.content for piece in pieces) == whole.content
    assert whole.usage_metadata["output_tokens"] == 10
    bound = model("tools", max_completion_tokens=150).bind_tools([TOOL], tool_choice="look")
    (call,) = bound.invoke("the cat").tool_calls
    assert call["name"] == "look" and call["args"]["at"] in ("cat", "dog")
    structured = model(max_completion_tokens=100).with_structured_output({"title": "n", **SCHEMA})
    assert 1 <= structured.invoke("the cat")["n"] <= 9
