"""The core against a float64 re-computation, masks of every kind, and what one token may learn of another."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.errors import DataError
from lapis.families.config import ModelConfig
from lapis.model.blocks.attention import AttentionCore, additive, dense_attention
from lapis.model.cache import Cache
from lapis.model.transformer import Transformer
from tests.model.conftest import SHAPES

TINY = ModelConfig(dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, vocab=31, context=32)


def model_of(shape: ModelConfig = TINY, **fields: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(dataclasses.replace(shape, **fields)).eval()


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """softmax(q k^T / sqrt(E) + mask) v in float64, with every key head repeated."""
    q, k, v = (t.double() for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores + mask.double()
    return scores.softmax(-1) @ v.repeat_interleave(groups, 1)


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (5, 1), (3, 3)]),
    times=st.sampled_from([(1, 1), (1, 7), (5, 5), (3, 8)]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_core_equals_a_float64_computation(
    heads: tuple[int, int], times: tuple[int, int], masked: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    (H, K), (T, S) = heads, times
    q, k, v = torch.randn(2, H, T, 8), torch.randn(2, K, S, 8), torch.randn(2, K, S, 8)
    seen = torch.rand(2, 1, T, S) > 0.4
    seen[..., 0] = True
    mask = additive(seen, torch.float32) if masked else None
    causal = not masked and T == S
    core = AttentionCore(8**-0.5)
    got = core(q, k, v, mask, causal)
    assert torch.allclose(got.double(), reference(q, k, v, mask, causal), atol=1e-6)
    weights = core.weights(q, k, mask, causal)
    assert (
        torch.allclose(weights.sum(-1), torch.ones(2, H, T)) and (weights[~seen.expand(2, H, T, S)] == 0).all()
    ) or (mask is None)


@pytest.mark.parametrize("masked", [False, True])
def test_the_core_in_bfloat16_has_the_gradients_of_float64(masked: bool) -> None:
    torch.manual_seed(0)
    shapes = ((2, 6, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    tensors = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    seen = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    seen[1, :, :, 1:4] = False
    mask = additive(seen, torch.bfloat16) if masked else None
    out = dense_attention(*tensors, mask, not masked, 8**-0.5)  # type: ignore[call-arg]
    expected = reference(*exact, mask, not masked)  # type: ignore[call-arg]
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for got, true in zip([out, *(t.grad for t in tensors)], [expected, *(t.grad for t in exact)], strict=True):
        assert (got.double() - true).norm() <= 1e-2 * true.norm()


@pytest.mark.parametrize("view", ["causal", "mask", "row mask", "key mask", "all"])
@pytest.mark.parametrize(
    ("heads", "times", "batch"), [((6, 2), (150, 150), 2), ((4, 4), (9, 9), 40), ((3, 1), (70, 200), 3)]
)
def test_attention_in_blocks_is_that_of_float64(
    heads: tuple[int, int], times: tuple[int, int], batch: int, view: str
) -> None:
    """Over several blocks of queries and of rows, with every kind of mask; nearly as close as torch's own."""
    torch.manual_seed(0)
    (H, K), (T, S) = heads, times
    if view == "causal" and T != S:
        return
    q, k, v = (torch.randn(batch, n, t, 16).bfloat16() for n, t in ((H, T), (K, S), (K, S)))
    shape = {"mask": (batch, 1, T, S), "row mask": (1, 1, T, S), "key mask": (batch, 1, 1, S)}.get(view)
    seen = None if shape is None else torch.rand(shape) > 0.4
    if seen is not None:
        seen[..., 0] = True
    mask = None if seen is None else additive(seen, torch.bfloat16)
    got = AttentionCore(0.25)(q, k, v, mask, view == "causal").double()
    true = reference(q, k, v, mask, view == "causal")
    fused = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=view == "causal", scale=0.25, enable_gqa=True
    )
    assert (got - true).norm() <= 3 * (fused.double() - true).norm() <= 1e-2 * true.norm() * 3


def test_one_hook_sees_q_k_v_and_mask_in_every_family(shape: ModelConfig) -> None:
    model = model_of(shape)
    calls: list[tuple[Any, ...]] = []
    attending = [layer for layer in range(shape.layers) if not shape.mixes_by_state(layer)]
    for layer in attending:
        model.blocks[layer].attn.core.register_forward_hook(lambda core, args, out: calls.append((core, *args, out)))
    assert not list(AttentionCore(1.0).parameters())
    image = shape.image
    model(torch.randn(1, 3, image.size, image.size) if image else torch.arange(9)[None])
    assert len(calls) == len(attending)
    for layer, (core, q, k, v, mask, causal, out) in zip(attending, calls, strict=True):
        kv_heads = shape.at(layer).kv_heads
        assert q.shape[1] == shape.heads and k.shape == v.shape and k.shape[1] == kv_heads
        again = core.weights(q, k, mask, causal) @ v.repeat_interleave(shape.heads // kv_heads, 1)
        assert torch.allclose(again, out, atol=1e-5)


def test_the_core_does_cross_attention() -> None:
    """Keys and values may come from another sequence, of another length: nothing is causal then."""
    torch.manual_seed(0)
    decoder, encoder = torch.randn(1, 5, 16), torch.randn(1, 8, 16)
    attention = model_of().blocks[0].attn
    q = attention.q(decoder).view(1, 5, 4, 4).transpose(1, 2)
    k, v = (project(encoder).view(1, 8, 2, 4).transpose(1, 2) for project in (attention.k, attention.v))
    real = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    real[..., 6:] = False
    padded = attention.core(q, k, v, additive(real, torch.float32), False)
    assert torch.allclose(padded, attention.core(q, k[:, :, :6], v[:, :, :6], None, False), atol=1e-6)
    assert torch.allclose(padded.double(), reference(q, k[:, :, :6], v[:, :, :6], None, False), atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"window": 3}, {"window": 3, "window_layers": (1,)}])
def test_a_token_sees_no_later_one_and_none_beyond_the_window(fields: dict[str, Any]) -> None:
    model = model_of(layers=1 if "window_layers" not in fields else 2, **fields)
    ids = torch.randint(0, 31, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 31
    moved = (model(ids) - model(changed)).abs().amax(-1)[0] > 0
    assert not moved[:5].any() and moved[5]
    if fields == {"window": 3}:
        assert moved[:8].sum() == 3 and not moved[8:].any()


@pytest.mark.parametrize("kind", [kind for kind, shape in SHAPES.items() if shape.head in ("lm", "masked")])
def test_packed_documents_equal_documents_alone(kind: str) -> None:
    """Of every family: also where a layer keeps a state, or chooses experts."""
    model = model_of(SHAPES[kind])
    torch.manual_seed(1)
    documents = [torch.randint(0, 31, (n,)) for n in (4, 9, 1, 6)]
    ids = torch.cat(documents)[None]
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor([4, 9, 1, 6]))[None]
    packed = model(ids, segments_BT=segments)[0].split([4, 9, 1, 6])
    for document, logits in zip(documents, packed, strict=True):
        assert torch.allclose(model(document[None])[0], logits, atol=1e-5)
    given_positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    assert torch.allclose(
        model(ids, segments_BT=segments, positions_BT=given_positions)[0], torch.cat(packed), atol=1e-6
    )


def test_no_state_of_a_delta_net_leaks_between_documents() -> None:
    """Longer than a chunk, over two rows that end and begin with the same number; gradients stay at home, too."""
    model = model_of(SHAPES["qwen3_5"]).requires_grad_(True)
    torch.manual_seed(1)
    sizes = ((70, 3, 5), (66, 2, 10))
    rows = [[torch.randint(0, 31, (n,)) for n in row] for row in sizes]
    ids_BT = torch.stack([torch.cat(row) for row in rows])
    numbers = ((1, 2, 3), (3, 4, 5))
    segments_BT = torch.stack([
        torch.repeat_interleave(torch.tensor(n), torch.tensor(row)) for n, row in zip(numbers, sizes, strict=True)
    ])  # fmt: skip
    packed_BTV = model(ids_BT, segments_BT=segments_BT)
    for row, logits_TV, lengths in zip(rows, packed_BTV, sizes, strict=True):
        for document, part in zip(row, logits_TV.split(lengths), strict=True):
            assert torch.allclose(model(document[None])[0], part, atol=1e-5)
    seen: list[torch.Tensor] = []
    handle = model.embed.register_forward_hook(lambda _module, _args, out: (out.retain_grad(), seen.append(out))[1])
    model(ids_BT, segments_BT=segments_BT)[0, 70:73].square().sum().backward()
    handle.remove()
    moved_BT = seen[0].grad.abs().amax(-1) > 0
    expected_BT = torch.zeros_like(moved_BT)
    expected_BT[0, 70:73] = True
    assert torch.equal(moved_BT, expected_BT)


def test_a_row_of_nothing_but_padding_stays_finite() -> None:
    for shape in (TINY, dataclasses.replace(TINY, causal=False)):
        mask = torch.ones(2, 6, dtype=torch.bool)
        mask[0] = False
        assert model_of(shape)(torch.zeros(2, 6, dtype=torch.long), mask).isfinite().all()


def test_under_autocast_the_model_trains_as_in_float32() -> None:
    model = model_of(dim=32, heads=4, kv_heads=2, head_dim=8, layers=3)
    ids = torch.randint(0, 31, (2, 16), generator=torch.Generator().manual_seed(0))
    grads = []
    for lower in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for exact, lower in zip(*grads, strict=True):
        assert lower.dtype == torch.float32 and (exact - lower).norm() <= 0.03 * exact.norm() + 1e-4


def test_learned_positions_end(request: pytest.FixtureRequest) -> None:
    model = model_of(request.getfixturevalue("shapes")["gpt2"])
    with pytest.raises(DataError, match="33 tokens; the model has 32 learned positions"):
        model(torch.zeros(1, 33, dtype=torch.long))
    cache = Cache(model.config, 1)
    model(torch.zeros(1, 32, dtype=torch.long), cache=cache)
    with pytest.raises(DataError):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_hidden_then_head_is_the_model(shape: ModelConfig) -> None:
    if shape.image is None and shape.head not in ("classes", "scalar"):
        model = model_of(shape)
        ids = torch.arange(12).view(2, 6)
        assert torch.equal(model.head(model.hidden(ids)), model(ids))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_normed_queries_and_keys_have_plain_gradients(positions: str) -> None:
    """The norm's own backward pass against torch's, also where nothing rotates the heads and they come transposed."""
    model = model_of(dataclasses.replace(TINY, qk_norm=True, family="qwen3"), positions=positions).train()
    ids = torch.arange(24).view(2, 12)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(ids).float().square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lapis.model.blocks.norm._TrainedRMSNorm.apply",
            lambda x, weight, eps, dtype: torch.nn.functional.rms_norm(x.float(), weight.shape, weight, eps).to(dtype),
        )
        plain = gradients()
    assert ours.keys() == plain.keys() and "blocks.0.attn.q_norm.weight" in ours
    for name in ours:
        assert torch.nn.functional.cosine_similarity(ours[name].flatten(), plain[name].flatten(), dim=0) > 0.99, name
