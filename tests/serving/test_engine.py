"""The engine alone: replies equal those of generate_batch whoever else is in the batch, and places are freed."""

import asyncio

import pytest
import torch

from lapis.errors import DataError, LapisError
from lapis.families.config import ModelConfig, Rope
from lapis.generation.generate import generate_batch
from lapis.generation.options import Sampling
from lapis.model.transformer import Transformer
from lapis.serving.engine.engine import Engine, QueueFull
from lapis.serving.engine.grammar import schema_grammar
from lapis.serving.engine.order import Order, Shaping
from lapis.serving.engine.served import ServedModel, name_models
from lapis.text.tokenizer.tokenizer import train_tokenizer

from .conftest import SHAPE, TEXT

PROMPTS = [[5, 6, 7], list(range(40, 90)), [9] * 30, [5, 6, 7, 8, 9, 10], list(range(200)), [11], [40, 41, 42, 43, 99]]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 4], 320)


def served_model(tokenizer, name="tiny", **options) -> ServedModel:
    torch.manual_seed(3)
    model = Transformer(ModelConfig(**{**SHAPE, **options})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return ServedModel(name, "/secret/place", model, tokenizer, model.config.context)


async def collect(stream) -> list[tuple[str, int, str]]:
    """Text, tokens and reason of each reply."""
    replies = [["", 0, ""] for _ in range(stream.order.replies)]
    async for chunk in stream:
        reply = replies[chunk.reply]
        reply[0] += chunk.text
        reply[1:] = [chunk.tokens, chunk.reason]
    return [tuple(reply) for reply in replies]


def run(served, work, rows=3, queue=64):
    """What a coroutine makes of a started engine."""

    async def inside():
        engine = Engine([served], rows=rows, queue=queue)
        engine.start(asyncio.get_running_loop())
        try:
            return await work(engine)
        finally:
            await asyncio.to_thread(engine.stop)

    return asyncio.run(inside())


def expected(served, prompts, sampling):
    replies = generate_batch(served.model, served.tokenizer, prompts, sampling, batch_size=1)
    return [(reply.text, len(reply.ids), reply.stop_reason) for reply in replies]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 9},
        {"positions": "learned", "norm": "layer", "mlp": "gelu"},
        {"rope": Rope(kind="dynamic", factor=2.0), "context": 96},
    ],
)
def test_replies_depend_on_nobody_in_the_batch(options, tokenizer):
    """Requests of many lengths join and leave at different steps; each gives the tokens that it gives alone."""
    served = served_model(tokenizer, **options)
    prompts = [prompt for prompt in PROMPTS if len(prompt) < served.context - 30]
    sampling = Sampling(max_tokens=20)

    async def work(engine):
        streams = []
        for i, prompt in enumerate(prompts * 2):
            streams += engine.submit([Order("tiny", prompt, sampling)])
            await asyncio.sleep(0.003 * (i % 3))
        return [reply for stream in streams for reply in await collect(stream)]

    assert run(served, work) == expected(served, prompts, sampling) * 2


def test_seeded_replies_are_those_of_generate_batch(tokenizer):
    """Reply i of a request draws from the seed plus i, as row i of a batch does; a neighbor takes no draw away."""
    served = served_model(tokenizer)
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, max_tokens=15, seed=7)

    async def work(engine):
        free = Sampling(temperature=2.0, max_tokens=40)
        streams = engine.submit([Order("tiny", [8, 9], free), Order("tiny", PROMPTS[1], sampling, replies=3)])
        replies = await collect(streams[1])
        streams[0].cancel()
        return replies

    replies = generate_batch(served.model, tokenizer, [PROMPTS[1]] * 3, sampling)
    assert run(served, work) == [(reply.text, len(reply.ids), reply.stop_reason) for reply in replies]


def test_prefix_of_an_earlier_prompt_is_not_read_again(tokenizer):
    """The same tokens come out, and usage says how many were shared; also while the first one still runs."""
    served, sampling = served_model(tokenizer), Sampling(max_tokens=8)
    longer = [PROMPTS[1], [*PROMPTS[1], 7, 8, 9], [*PROMPTS[1][:30], 5, 5]]

    async def work(engine):
        results = []
        for prompt in longer:
            (stream,) = engine.submit([Order("tiny", prompt, sampling)])
            results.append((*(await collect(stream)), stream.cached_tokens))
        pair = engine.submit([Order("tiny", PROMPTS[4], sampling, replies=2)])
        results.append(await collect(pair[0]))
        assert pair[0].cached_tokens == 0  # of the first reply; the second one shares all but a token with it
        return results, engine.figures()["tiny"]["shared_tokens"]

    results, shared = run(served, work)
    assert [reply for reply, _ in results[:3]] == expected(served, longer, sampling)
    assert results[3] == expected(served, [PROMPTS[4]], sampling) * 2
    assert [count for _, count in results[:3]] == [0, 50, 30]
    assert shared == 0 + 50 + 30 + len(PROMPTS[4]) - 1


def test_cancelled_reply_frees_its_place(tokenizer):
    served = served_model(tokenizer)

    async def work(engine):
        long = engine.submit([Order("tiny", [5], Sampling(max_tokens=250)) for _ in range(3)])
        await anext(long[0])
        for stream in long:
            stream.cancel()
        (other,) = engine.submit([Order("tiny", PROMPTS[0], Sampling(max_tokens=5))])
        reply = await collect(other)
        return reply, engine.figures()["tiny"], engine.waiting

    reply, figures, waiting = run(served, work, rows=2)
    assert reply == expected(served, [PROMPTS[0]], Sampling(max_tokens=5))
    assert (figures["running"], figures["waiting"], waiting) == (0, 0, 0)
    assert figures["written_tokens"] < 700


def test_fault_99_more_than_may_wait_is_refused_at_once(tokenizer):
    served = served_model(tokenizer)

    async def work(engine):
        orders = [Order("tiny", [5], Sampling(max_tokens=100)) for _ in range(6)]
        streams = engine.submit(orders)
        with pytest.raises(QueueFull, match="waiting already; try again in") as refused:
            for _ in range(20):
                streams += engine.submit(orders[:1])
        assert 1 <= refused.value.seconds <= 60
        return [await collect(stream) for stream in streams]

    replies = run(served, work, rows=2, queue=4)
    assert all(reply == expected(served, [[5]], Sampling(max_tokens=100)) for reply in replies)


def test_damaged_row_fails_alone(tokenizer):
    """NaN in the embedding of one token: whoever has that token is told, the others get their replies."""
    served = served_model(tokenizer)
    with torch.no_grad():
        served.model.embed.weight[300] = torch.nan
        served.model.head.weight = torch.nn.Parameter(torch.nan_to_num(served.model.head.matrix.detach().clone()))

    async def work(engine):
        orders = [Order("tiny", prompt, Sampling(max_tokens=8)) for prompt in (PROMPTS[0], [300, 5], PROMPTS[3])]
        first = [await collect(stream) for stream in engine.submit(orders)]
        return first, [await collect(stream) for stream in engine.submit([orders[2]] * 3)]

    first, again = run(served, work)
    assert first[1][0][2] == "failed" and "NaN" in first[1][0][0]
    assert [reply[2] for (reply,) in (first[0], first[2])] == ["length", "length"]
    assert again == [first[2]] * 3


def test_penalties_and_biases_change_the_logits(tokenizer):
    served = served_model(tokenizer)
    plain = Order("tiny", [5, 6], Sampling(max_tokens=40))
    (text,) = [reply.ids for reply in generate_batch(served.model, tokenizer, [[5, 6]], plain.sampling)]
    most = max(set(text), key=text.count)

    def written(shaping):
        async def work(engine):
            (stream,) = engine.submit([Order("tiny", [5, 6], plain.sampling, shaping=shaping, top_logprobs=1)])
            return [score.id async for chunk in stream for score in chunk.scores]

        return run(served, work)

    assert written(Shaping()) == list(text)
    assert most not in written(Shaping(logit_bias={most: -100.0}))
    assert set(written(Shaping(logit_bias={17: 100.0}))) == {17}
    assert len(set(written(Shaping(frequency_penalty=2.0, presence_penalty=2.0)))) > len(set(text))


def test_logprobs_are_those_of_the_model(tokenizer):
    served = served_model(tokenizer)

    async def work(engine):
        (stream,) = engine.submit([Order("tiny", PROMPTS[0], Sampling(max_tokens=6), top_logprobs=3)])
        return [score async for chunk in stream for score in chunk.scores]

    scores = run(served, work)
    row = list(PROMPTS[0])
    for score in scores:
        with torch.inference_mode():
            logp_V = served.model(torch.tensor([row]))[0, -1].log_softmax(-1)
        assert score.logprob == pytest.approx(float(logp_V[score.id]), abs=1e-4)
        assert [token for token, _ in score.top] == logp_V.topk(3).indices.tolist()
        row.append(score.id)
    assert len(scores) == 6


def test_grammar_is_kept_to(tokenizer):
    """Whatever the weights say, what comes is JSON that fits the schema, and ends."""
    import json

    served = served_model(tokenizer)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["cat", "dog"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    shaping = Shaping(grammar=schema_grammar(schema))

    async def work(engine):
        sampling = Sampling(temperature=1.0, seed=1, max_tokens=120)
        return await collect(engine.submit([Order("tiny", [5, 6], sampling, 4, shaping)])[0])

    for text, _, reason in run(served, work):
        value = json.loads(text)
        assert reason == "end" and 0 <= value["a"] <= 99 and value["b"] in ("cat", "dog") and len(value) == 2


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"type": "nonsense"},
        {"enum": ["x" * 200_000]},
        {"type": "string", "pattern": "(((("},
        {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {}}} for i in range(30)]} for j in range(30)
            ]
        },
    ],
)
def test_fault_105_grammar_bombs_are_refused(schema, tokenizer):
    engine = Engine([served_model(tokenizer)], rows=1, queue=1)
    with pytest.raises(DataError, match="schema"):
        engine.grammars("tiny").check(schema_grammar(schema))


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|aa)+$", "((a{1,300}){1,300}){1,300}", "(x+x+)+y", ".*" * 200])
def test_fault_105_regex_bombs_are_bounded(pattern, tokenizer):
    """Each either is refused or runs: a reply comes, or says that the grammar was stopped, and the engine lives."""
    served = served_model(tokenizer)

    async def work(engine):
        try:
            grammar = schema_grammar({"type": "string", "pattern": pattern})
            engine.grammars("tiny").check(grammar)
            (stream,) = engine.submit([Order("tiny", [5], Sampling(max_tokens=20), shaping=Shaping(grammar=grammar))])
            await collect(stream)
        except LapisError:
            pass
        return await collect(engine.submit([Order("tiny", [5], Sampling(max_tokens=3))])[0])

    assert run(served, work) == expected(served, [[5]], Sampling(max_tokens=3))


def test_work_that_fails_harms_nobody(tokenizer):
    served = served_model(tokenizer)

    async def work(engine):
        with pytest.raises(ZeroDivisionError):
            await engine.compute("tiny", lambda each: 1 / 0)
        return await engine.compute("tiny", lambda each: each.name)

    assert run(served, work) == "tiny"


def test_models_have_names_without_places(tmp_path):
    for place in ("a/model", "b/model"):
        (tmp_path / place).mkdir(parents=True)
    names = name_models([str(tmp_path / "a/model"), str(tmp_path / "b/model"), "owner/name"])
    assert names == ["model", "model-2", "owner/name"]
    with pytest.raises(LapisError, match="is named twice"):
        name_models([str(tmp_path / "a/model"), str(tmp_path / "a/../a/model/")])
