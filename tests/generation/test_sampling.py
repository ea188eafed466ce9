"""Sampling: the draw follows the distribution, rows do not depend on one another, settings are checked."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.errors import ConfigError, LapisError
from lapis.generation.options import Sampling
from lapis.generation.sampling import choose, filtered, generators, top_p


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"max_tokens": 0},
        {"stop": ("",)},
    ],
)
def test_setting_out_of_range_is_named(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"sampling: {name} is .*; expected"):
        Sampling(**wrong)


def test_one_stop_text_may_be_given_as_text():
    assert Sampling(stop="end").stop == ("end",)
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")


def test_draws_follow_the_filtered_distribution():
    logits_V = torch.tensor([2.0, 1.0, 0.5, -1.0, -math.inf, 0.0])
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=7)
    expected = filtered(logits_V[None], sampling).softmax(-1)[0]
    n = 20_000
    ids = choose(logits_V.expand(n, -1), sampling, generators(sampling, range(n)))
    share = torch.bincount(ids, minlength=6) / n
    assert (share - expected).abs().max() < 0.015
    assert share[expected == 0].sum() == 0


@given(st.integers(0, 1000), st.integers(1, 6), st.floats(0.1, 3), st.integers(0, 12), st.floats(0.05, 1))
@settings(deadline=None, max_examples=60)
def test_row_is_drawn_alone_as_among_neighbors(seed, rows, temperature, k, p):
    logits_BV = torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed)) * 3
    sampling = Sampling(temperature=temperature, top_k=k, top_p=p, seed=seed)
    together = choose(logits_BV, sampling, generators(sampling, range(rows)))
    alone = [choose(logits_BV[i : i + 1], sampling, generators(sampling, [i]))[0] for i in range(rows)]
    assert together.tolist() == [int(i) for i in alone]


def test_nucleus_wider_than_the_first_look():
    logits_BV = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0)) * 0.01  # nearly flat
    kept_BV = top_p(logits_BV, 0.9).isfinite()
    for logits_V, kept_V in zip(logits_BV, kept_BV, strict=True):
        probabilities = logits_V.double().softmax(-1)
        mass, least = float(probabilities[kept_V].sum()), float(probabilities[kept_V].min())
        assert 0.9 <= mass + 1e-5 and mass - least < 0.9 + 1e-5


def test_same_seed_same_tokens_and_no_seed_differs():
    logits_BV = torch.zeros(8, 1000)
    seeded = Sampling(temperature=1.0, seed=3)
    first, again = (choose(logits_BV, seeded, generators(seeded, range(8))) for _ in range(2))
    assert torch.equal(first, again)
    free = Sampling(temperature=1.0)
    first, again = (choose(logits_BV, free, generators(free, range(8))) for _ in range(2))
    assert not torch.equal(first, again)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_damaged_logits_are_refused(temperature, wrong):
    logits_BV = torch.zeros(2, 10)
    logits_BV[1, 4] = wrong
    sampling = Sampling(temperature=temperature, seed=0)
    with pytest.raises(LapisError, match="NaN or infinite"):
        choose(logits_BV, sampling, generators(sampling, range(2)))
