"""The cache gives what no cache gives: in any chunks, cut back, chosen from, and with a window's memory only."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.families.config import ModelConfig
from lapis.model.cache import Cache
from lapis.model.transformer import Transformer

TINY = ModelConfig(dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, vocab=31, context=64)
torch.manual_seed(0)
MODELS = {
    "full": Transformer(TINY),
    "window": Transformer(dataclasses.replace(TINY, window=5)),
    "one-window": Transformer(dataclasses.replace(TINY, window=4, window_layers=(1,))),
}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(MODELS)), padding=st.sampled_from(["none", "left", "right"]))
def test_any_chunks_and_padding_give_the_uncached_logits(data: st.DataObject, kind: str, padding: str) -> None:
    model = MODELS[kind]
    cuts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    total = sum(cuts)
    ids = torch.randint(0, 31, (2, total), generator=torch.Generator().manual_seed(total))
    mask = torch.ones(2, total, dtype=torch.bool)
    if padding != "none":
        pads = data.draw(st.integers(0, cuts[0] - 1))
        mask[0, slice(0, pads) if padding == "left" else slice(cuts[0] - pads, cuts[0])] = False
    cache, parts, at = Cache(TINY if kind == "full" else model.config, 2, data.draw(st.integers(1, 30))), [], 0
    with torch.no_grad():
        for i, cut in enumerate(cuts):
            given_mask = mask[:, :cut] if i == 0 and padding != "none" else None
            parts.append(model(ids[:, at : at + cut], given_mask, cache=cache))
            at += cut
        whole = model(ids, mask)
    assert cache.length == total
    assert torch.allclose(torch.cat(parts, 1)[mask], whole[mask], atol=1e-5)


def test_a_window_keeps_only_what_it_sees() -> None:
    model = MODELS["window"]
    cache = Cache(model.config, 1)
    model(torch.zeros(1, 60, dtype=torch.long), cache=cache)
    for _ in range(2):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    full = Cache(TINY, 1, 62)
    assert cache.nbytes < full.nbytes / 2


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_cache_can_be_cut_back_and_go_on(kind: str) -> None:
    model = MODELS[kind]
    ids = torch.arange(20)[None] % 31
    cache = Cache(model.config, 1)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        model(ids[:, 10:16], cache=cache)  # a reply that is taken back
        cache.truncate(4)
        again = model(ids[:, 4:9], cache=cache)
        assert torch.allclose(again, model(ids[:, :9])[:, 4:], atol=1e-5)
        model(ids[:, :1], cache=cache)
    with pytest.raises(ValueError, match="holds 10 tokens; it cannot be cut to 99"):
        cache.truncate(99)


def test_what_a_window_has_dropped_cannot_come_back() -> None:
    model = MODELS["window"]
    cache = Cache(model.config, 1, 8)
    for _ in range(40):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="dropped"):
        cache.truncate(20)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_rows_can_be_chosen(kind: str) -> None:
    model = MODELS[kind]
    ids = torch.randint(0, 31, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :3] = False
    cache = Cache(model.config, 3)
    with torch.no_grad():
        model(ids, mask, cache=cache)
        cache.select(torch.tensor([2, 0]))
        following = model(torch.tensor([[5], [6]]), cache=cache)
        alone = model(torch.cat((ids[0, 3:], torch.tensor([6])))[None])[:, -1]
    assert torch.allclose(following[1], alone, atol=1e-5)
