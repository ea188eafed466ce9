"""Attention maps: recomputed weights are the model's own, in both readings."""

import pytest
import torch

from lapis.errors import ConfigError
from lapis.inside.attention_map import attention_maps

PROMPT = "the capital of Malaysia is Kuala Lumpur"


def test_the_weighted_sum_of_values_is_what_the_core_gives(model, words):
    """In every family, with grouped keys and with a window."""
    captured = {}
    handle = model.blocks[1].attn.core.register_forward_hook(
        lambda core, args, out: captured.update(v=args[2], out=out)
    )
    maps = attention_maps(model, words, PROMPT, [(1, head) for head in range(4)])
    handle.remove()
    for head, result in enumerate(maps):
        v_SE = captured["v"][0, head * captured["v"].shape[1] // 4]
        assert torch.allclose(result.weights_TS @ v_SE, captured["out"][0, head], atol=1e-5)
        sinks = model.blocks[1].attn.core.sinks
        left = 0.0 if sinks is None else float((sinks[head] - result.scores_TS[-1].logsumexp(0)).sigmoid())
        assert torch.allclose(result.scores_TS[-1].softmax(0) * (1 - left), result.weights_TS[-1], atol=1e-6)
        E = v_SE.shape[1]
        added = result.weights_TS[-1][:, None] * (v_SE @ model.blocks[1].attn.o.weight[:, head * E : (head + 1) * E].T)
        assert torch.allclose(result.moved_TS[-1], added.norm(dim=1), atol=1e-5)
        window = model.config.window
        rows = result.lookup()
        assert len(rows) == (window or len(result.tokens)) and sum(row["weight"] for row in rows) == pytest.approx(
            1 - left
        )
        shares = result.rows("values")["weights"]
        assert all(sum(x for x in line if x is not None) == pytest.approx(1, abs=1e-5) for line in shares)
        assert shares[0][1] is None


def test_it_draws_itself_and_refuses_heads_that_are_not_there(model, words):
    (result,) = attention_maps(model, words, PROMPT, [(0, 3)])
    assert result.label == "0.3" and result.plot("values").data
    pytest.importorskip("pandas")
    assert set(result.to_pandas()) == {"query", "token", "position", "score", "weight", "moves"}
    with pytest.raises(ConfigError, match=r"no head 3\.0; 3 layers have 4 each"):
        attention_maps(model, words, PROMPT, [(3, 0)])
