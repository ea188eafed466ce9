"""The scoring core: batches, rows, the evaluating mode, and the head in blocks."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lapis.families.config import ModelConfig
from lapis.model.scoring import (
    SHARED,
    ScoredSequence,
    batches_by_length,
    evaluating,
    hidden_states,
    lay_out,
    likelihoods,
    read_logits,
    scored_states,
    token_log_probabilities,
)
from lapis.model.transformer import Transformer

CONFIG = ModelConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=24, vocab=50, context=64, tied=True)


def sequences(lengths: list[int]) -> list[ScoredSequence]:
    torch.manual_seed(0)
    return [ScoredSequence(torch.randint(0, 50, (n,)).tolist(), (torch.rand(n) < 0.5).tolist()) for n in lengths]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault of the code
@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 200))
def test_batches_hold_all_and_no_more_places_than_allowed(lengths: list[int], most: int) -> None:
    batches = list(batches_by_length(lengths, most))
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= most
    ends = [max(lengths[i] for i in batch) for batch in batches]
    assert ends == sorted(ends)


def test_every_module_is_in_its_own_mode_again() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model.train()
    model[1].eval()  # one part is frozen
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and model[0].training and not model[1].training and not model[1][0].training


def test_rows_are_shared_where_that_saves_a_quarter() -> None:
    model, unequal = Transformer(CONFIG).eval(), sequences([30, 4, 5, 6, 3])
    shared, alone = lay_out(unequal, share=True), lay_out(unequal)
    assert len(shared.ids_BT) <= (1 - SHARED) * 5 and shared.segments_BT is not None
    assert len(alone.ids_BT) == 5 and alone.segments_BT is None
    assert lay_out(sequences([9, 9, 8]), share=True).segments_BT is None
    totals = []
    for batch in (shared, alone):
        logp_R = token_log_probabilities(model, scored_states(batch, hidden_states(model, batch)), batch.targets_R)
        totals.append(torch.zeros(5).index_add(0, batch.owner_R, logp_R))
        for owner, sequence in enumerate(unequal):
            row, place = batch.ends_S[:, owner]
            assert batch.ids_BT[row, place] == sequence.ids[-1]
    torch.testing.assert_close(*totals)


def test_the_first_id_is_never_scored() -> None:
    batch = lay_out([ScoredSequence([7, 8, 9], [True, False, True])])
    assert batch.targets_R.tolist() == [9] and batch.places_R.tolist() == [1]
    assert likelihoods(Transformer(CONFIG), [ScoredSequence([7], [True])]) == [(0.0, True)]


def test_blocks_of_logits_join_in_order_with_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hidden_RD = Transformer(CONFIG), torch.randn(70, 16, requires_grad=True)
    results = []
    for elements in (2**20, 1):  # all at once, and sixteen rows at a time
        monkeypatch.setattr("lapis.model.scoring.LOGITS", {"cpu": elements})
        top_R, mean_R = read_logits(model, lambda x_RV, n_R: (x_RV.amax(-1) * n_R, x_RV.mean(-1)), hidden_RD,
                                    torch.arange(70))  # fmt: skip
        (grad_RD,) = torch.autograd.grad(top_R.sum() + mean_R.sum(), hidden_RD)
        results.append((top_R, mean_R, grad_RD))
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, whole)
