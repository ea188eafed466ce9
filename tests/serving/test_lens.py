"""POST /lapis/lens: the numbers of lapis.lens, bounded as every route, and no harm to replies under way."""

import concurrent.futures

import httpx
import pytest

import lapis
from lapis.inside.lens.options import LensOptions
from lapis.inside.prompt import token_word
from lapis.text.chat.chat import encode_prompt

MESSAGES = [{"role": "user", "content": "the cat sat on the mat"}]
WHOLE = {"temperature": 0, "max_tokens": 24, "logprobs": True, "messages": MESSAGES}


def ask(server, **fields):
    body = {"model": "tiny", "messages": MESSAGES, "reply": [], "place": 0, **fields}
    return httpx.post(f"{server.url}/lapis/lens", json=body, timeout=60)


@pytest.fixture(scope="module")
def reply(server) -> list[int]:
    return [entry["id"] for entry in server.ask(**WHOLE).json()["choices"][0]["logprobs"]["content"]]


@pytest.fixture(scope="module")
def opened(folder):
    return lapis.load(folder)


@pytest.mark.parametrize("place", [0, 1, 7, 23, 3, 4])
def test_the_lens_of_a_token_is_that_of_lapis_lens(server, reply, opened, place):
    """Places one after another, so that what was read before is gone on from, cut, and gone on from again."""
    model, tokenizer = opened
    result = ask(server, reply=reply, place=place).json()
    ids = encode_prompt(tokenizer, MESSAGES) + reply[:place]
    trace = lapis.lens(model, tokenizer, ids, [token_word(reply[place], tokenizer)], LensOptions(top=5))
    word = trace.words[0].text
    assert result["token"] == {
        "token": tokenizer.decode([reply[place]]), "id": reply[place],
        "bytes": list(tokenizer.bytes_of(reply[place])), "rank": trace.readings[-1].ranks[word],
        "probability": pytest.approx(2.718281828459045 ** trace.readings[-1].logprobs[word], rel=1e-4),
    }  # fmt: skip
    assert result["decided"] == trace.decided and not result["at_end"]
    for row, reading in zip([result["embedding"], *result["layers"]], [trace.readings[0], *trace.layers], strict=True):
        assert row["layer"] == reading.layer and row["rank"] == reading.ranks[word]
        assert [entry["id"] for entry in row["top"]] == [index for _, index, _ in reading.top]
        shares = [share for _, _, share in reading.top]
        assert [entry["probability"] for entry in row["top"]] == pytest.approx(shares, rel=1e-4)
        assert row["entropy"] == pytest.approx(reading.entropy, rel=1e-4)
        assert row["kl_to_final"] == pytest.approx(reading.kl_to_final, rel=1e-3, abs=1e-6)
    best = sorted((c for c in trace.contributions if c.part != "rounding" and c.logit > 0), key=lambda c: -c.logit)
    assert [(p["part"], p["layer"], p["head"]) for p in result["parts"]] == [
        (c.part, c.layer, c.head) for c in best[:3]
    ]
    assert [p["logit"] for p in result["parts"]] == pytest.approx([c.logit for c in best[:3]], rel=1e-3)


def test_behind_the_last_token_stands_what_would_come_next(server, reply, opened):
    model, tokenizer = opened
    result = ask(server, reply=reply, place=len(reply)).json()
    trace = lapis.lens(model, tokenizer, encode_prompt(tokenizer, MESSAGES) + reply)
    assert result["at_end"] and result["token"]["id"] == trace.readings[-1].top[0][1] and result["token"]["rank"] == 1


def test_a_greedy_token_is_the_best_of_its_last_layer(server, reply):
    for place in (2, 11):
        result = ask(server, reply=reply, place=place).json()
        assert result["layers"][-1]["top"][0]["id"] == reply[place] == result["token"]["id"]


def test_the_text_of_a_reply_will_do(server, opened):
    ids = opened[1].encode("the dog sat")
    by_text, by_ids = ask(server, reply="the dog sat", place=1), ask(server, reply=ids, place=1)
    assert by_text.status_code == 200 and by_text.json() == by_ids.json()


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"place": 1}, 400, "place is 1 and the reply has 0 tokens"),
        ({"place": -1}, 400, "place"),
        ({"reply": [5000], "place": 1}, 400, "5000 is no token of tiny; ids go from 0 to 329"),
        ({"reply": [-1], "place": 1}, 400, "-1 is no token"),
        ({"reply": [1.5], "place": 1}, 400, "reply"),
        ({"reply": [5] * 300, "place": 300}, 400, "tokens before this place, and the context is 256"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "it can be text"),
        ({"model": "other"}, 404, "not served here; there is tiny"),
    ],
)
def test_what_cannot_be_looked_into_is_refused(server, fields, status, words):
    response = ask(server, **fields)
    assert response.status_code == status and words in response.json()["error"]["message"]
    assert "/tmp" not in response.text


def test_replies_under_way_are_not_changed(server, reply):
    """The same greedy replies while lenses of the same model are read."""
    alone = server.ask(temperature=0, max_tokens=80).json()["choices"][0]["message"]["content"]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(server.ask, temperature=0, max_tokens=80) for _ in range(3)]
        lenses = [pool.submit(ask, server, reply=reply, place=place) for place in range(12)]
        assert [r.result().json()["choices"][0]["message"]["content"] for r in replies] == [alone] * 3
        assert all(lens.result().status_code == 200 for lens in lenses)
