"""What a request and a folder say of sampling, and that it reaches the model."""

import pytest
import torch

import lapis
from lapis.generation.generate import generate_batch
from lapis.generation.options import Sampling
from lapis.serving.engine.served import ServedModel
from lapis.serving.routes.orders import sampling_of
from lapis.serving.schema import SamplingBody

USER = [{"role": "user", "content": "the cat"}]


def said(server, **fields) -> str:
    reply = server.ask(max_tokens=12, **fields)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"min_p": 1}, {"top_p": 0}, {"top_p": 1e-9}])
def test_filters_that_leave_one_token_are_greedy(server, fields):
    assert said(server, temperature=2, seed=1, **fields) == said(server, temperature=0)
    assert said(server, temperature=2, seed=1) != said(server, temperature=0)


def test_a_request_draws_as_generate_does(server, folder):
    """Every field that lapis generate has, by one seed."""
    fields = {"temperature": 1.1, "top_k": 40, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.2, "seed": 9}
    (expected,) = generate_batch(*lapis.load(folder, torch.float32), [USER], Sampling(**fields, max_tokens=12))
    assert said(server, **fields) == expected.text


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_penalties_of_a_request_count(server, name):
    """A bias makes one token the best by less than a penalty takes away again."""
    first = server.ask(max_tokens=1, temperature=0, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    best, other = first["content"][0]["top_logprobs"]
    bias = {str(other["id"]): best["logprob"] - other["logprob"] + 1}
    fields = {"temperature": 0, "logit_bias": bias}
    plain, lowered = said(server, **fields), said(server, **fields, **{name: 2})
    assert plain.startswith(other["token"]) and lowered.startswith(other["token"]) and plain != lowered


def test_a_folder_that_samples_gives_the_defaults(folder):
    """Where it samples; a value that is none is left out, and what the request says goes before."""
    model, tokenizer = lapis.load(folder, torch.float32)
    served = ServedModel("tiny", str(folder), model, tokenizer, 256)
    own = {"temperature": 0.6, "top_k": 20, "top_p": "high", "min_p": True, "repetition_penalty": -1}
    for sampled, expected in ((True, (0.6, 20)), (False, (1.0, 0)), ("yes", (1.0, 0))):
        model.generation = {"do_sample": sampled, **own}
        made = sampling_of(SamplingBody(model="tiny"), served, 5)
        assert (made.temperature, made.top_k) == expected
        assert (made.top_p, made.min_p, made.repetition_penalty, made.max_tokens) == (1.0, 0.0, 1.0, 5)
        asked = sampling_of(SamplingBody(model="tiny", temperature=0.0, top_k=0), served, None)
        assert (asked.temperature, asked.top_k, asked.max_tokens) == (0.0, 0, 256)
