"""The official client against a real server process."""

import openai
import pytest


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(client, **fields):
    fields = {"messages": [{"role": "user", "content": "the cat"}], "temperature": 0, "max_tokens": 12, **fields}
    return client.chat.completions.create(model="tiny", **fields)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lapis"


def test_streamed_reply_is_the_whole_one(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError, match="not served here; there is tiny"):
        client.chat.completions.create(model="../tiny", messages=[{"role": "user", "content": "a"}])
