"""Sampling filters equal transformers' processors, and greedy text equals its `generate`, token for token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lapis.generate.sampling import Sampling, filtered, penalize


@given(
    st.integers(0, 10_000),
    st.sampled_from([5, 60, 3000]),
    st.floats(0.2, 3),
    st.integers(0, 80),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
)
@settings(deadline=None, max_examples=80)
def test_filters_equal_transformers(seed, vocab, temperature, k, p, m):
    logits_BV = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * 4
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if k:
        theirs.append(TopKLogitsWarper(k))
    if p < 1:
        theirs.append(TopPLogitsWarper(p))
    if m:
        theirs.append(MinPLogitsWarper(m))
    ours = filtered(logits_BV, Sampling(temperature=temperature, top_k=k, top_p=p, min_p=m))
    assert torch.equal(ours, theirs(None, logits_BV))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(4, 50, generator=generator)
    ids_BT = torch.randint(0, 50, (4, 20), generator=generator)
    seen_BV = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, ids_BT, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids_BT, logits_BV)
    assert torch.equal(penalize(logits_BV, seen_BV, penalty), theirs)
