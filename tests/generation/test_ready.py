"""A model that is ready to generate: the same logits as before, in every family, with compiled kernels and without."""

import copy

import pytest
import torch

from lapis.errors import ConfigError
from lapis.families.config import Delta, Experts, ModelConfig
from lapis.generation.kernels import build, linear
from lapis.generation.kernels.build import compiled
from lapis.generation.kernels.layers import ReadyAttention, ReadyNorm
from lapis.generation.kernels.linear import Int8Linear, PackedLinear, ReadyLinear
from lapis.generation.ready import check_int8, ready
from lapis.model.blocks.standard import Mlp
from lapis.model.cache import Cache
from lapis.model.transformer import Transformer

SHAPE = {"dim": 128, "layers": 2, "heads": 8, "kv_heads": 2, "ffn_dim": 192, "vocab": 97, "context": 64, "head_dim": 16}
CASES = {
    "llama": {},
    "tied": {"tied": True},
    "biases": {"bias": "all"},
    "qwen2": {"bias": "qkv", "family": "qwen2"},
    "gpt2": {"tied": True, "bias": "all", "norm": "layer", "mlp": "gelu_tanh", "positions": "learned"},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "mistral": {"window": 7, "family": "mistral"},
    "olmo2": {"family": "olmo2", "qk_norm": True, "qk_norm_over": "all"},
    "without turns": {"nope_layers": (1,)},
    "granite": {"family": "granite", "residual_scale": 0.5, "logit_divisor": 4.0, "embed_scale": 3.0},
    "arcee": {"family": "arcee", "mlp": "relu2"},
    "apertus": {"family": "apertus", "qk_norm": True, "mlp": "xielu"},
    # all of them are active, so that rounding chooses none
    "experts": {"family": "qwen2_moe", "bias": "qkv", "experts": Experts(3, 3, True, 64), "ffn_dim": 96},
    "gpt_oss": {"family": "gpt_oss", "bias": "all", "experts": Experts(3, 3), "window": 7, "window_layers": (0,)},
    "qwen3_5": {"family": "qwen3_5_text", "qk_norm": True, "delta": Delta((0,), 2, 4, 8, 16)},
    "gemma3": {"family": "gemma3_text", "qk_norm": True, "window": 7, "window_layers": (0,), "mlp": "geglu_tanh"},
    "odd sizes": {"dim": 48, "heads": 6, "kv_heads": 3, "head_dim": 8, "ffn_dim": 80},
    "wide heads": {"head_dim": 80},
}
MECHANISMS = ("gpt_oss", "qwen3_5")  # whose own matrices no kernel lays out
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make(name, dtype):
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{**SHAPE, **CASES[name]})).to(dtype).eval()


@torch.inference_mode()
def decode(model, ids_BT, mask_BT, prompt):
    """Logits of the last token of the prompt and of each one after it, given one by one."""
    weight = model.embed.weight
    cache = Cache(model.config, len(ids_BT), 16, dtype=weight.dtype)
    logits = [model(ids_BT[:, :prompt], mask_BT, cache=cache)[:, -1:]]
    logits += [model(ids_BT[:, t : t + 1], cache=cache) for t in range(prompt, ids_BT.shape[1])]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_ready_model_gives_the_same_logits(name, dtype, compile):
    model = make(name, dtype)
    fast = ready(copy.deepcopy(model), compile=compile)
    for rows, tokens in ((1, 1), (3, 1), (2, 9), (20, 1)):
        ids_BT = torch.randint(0, 97, (rows, tokens))
        with torch.inference_mode():
            expected, actual = model(ids_BT).float(), fast(ids_BT).float()
        assert torch.allclose(expected, actual, atol=TOLERANCE[dtype])
    for rows in (1, 3, 20):
        ids_BT, mask_BT = torch.randint(0, 97, (rows, 24)), torch.ones(rows, 12, dtype=torch.bool)
        mask_BT[1:2, :5] = False
        expected, actual = (decode(each, ids_BT, mask_BT, 12).float() for each in (model, fast))
        assert torch.allclose(expected, actual, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("stored", TOLERANCE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_is_the_same_bits_whatever_stands_beside_it(dtype, stored):
    if compiled(dtype, dtype) is None:
        pytest.skip("no compiler makes kernels here")
    model = ready(make("qwen3", torch.bfloat16).to(dtype), stored=stored)
    ids_BT = torch.randint(0, 97, (7, 20))
    mask_BT = torch.ones(7, 1, dtype=torch.bool)
    together = decode(model, ids_BT, mask_BT, 1)
    for row in range(7):
        assert torch.equal(decode(model, ids_BT[row : row + 1], mask_BT[:1], 1)[0], together[row])


def test_padding_changes_no_bit():
    if compiled(torch.float32, torch.float32) is None:
        pytest.skip("no compiler makes kernels here")
    model = ready(make("mistral", torch.float32))
    ids_BT = torch.randint(0, 97, (1, 20))
    padded_BT, mask_BT = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids_BT), 1), torch.ones(1, 6, dtype=torch.bool)
    mask_BT[:, :5] = False
    alone, padded = decode(model, ids_BT, None, 1), decode(model, padded_BT, mask_BT, 6)
    assert torch.equal(alone[:, 1:], padded[:, 1:])


def test_a_key_that_is_no_number_shows_in_the_logits():
    model = ready(make("llama", torch.float32))
    cache = Cache(model.config, 1, 16)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), cache=cache)
        cache.place(0).keys[:] = torch.nan
        assert model(torch.tensor([[4]]), cache=cache).isnan().all()


def test_the_compiled_kernels_are_used_where_there_is_a_compiler():
    kernels = compiled(torch.float32, torch.float32)
    model = ready(make("llama", torch.float32))
    expected = (PackedLinear, torch.nn.Linear) if kernels is None else ReadyLinear
    block = model.blocks[0]
    assert isinstance(block.mlp, Mlp) or all(isinstance(part, expected) for part in (block.mlp.down, block.attn.o))
    assert isinstance(model.norm.final, ReadyNorm) == (kernels is not None)


def held(model):
    return {part._held.dtype for part in model.modules() if isinstance(part, ReadyLinear)}


@pytest.mark.parametrize("name", CASES)
def test_exact_bfloat16_is_held_so_and_computed_in_float32(name):
    model = make(name, torch.bfloat16).float()
    narrow = ready(copy.deepcopy(model), stored=torch.bfloat16)
    if compiled(torch.float32, torch.float32) is not None and name not in ("odd sizes", *MECHANISMS):
        assert held(narrow) == {torch.bfloat16}
    for rows, tokens in ((1, 1), (3, 1), (2, 9), (20, 5), (2, 48)):
        ids_BT = torch.randint(0, 97, (rows, tokens))
        with torch.inference_mode():
            expected, actual = model(ids_BT), narrow(ids_BT)
        assert actual.dtype == torch.float32 and torch.allclose(expected, actual, atol=1e-5)


def test_a_weight_that_bfloat16_would_round_stays_as_it_is():
    model = make("llama", torch.bfloat16).float()
    with torch.no_grad():
        model.blocks[1].attn.o.weight[-1, -1] = 1 / 3
    before = copy.deepcopy(model)
    narrow, ids_BT = ready(model, stored=torch.bfloat16), torch.randint(0, 97, (3, 5))
    if compiled(torch.float32, torch.float32) is not None:
        assert held(narrow) == {torch.bfloat16, torch.float32}
        assert torch.equal(narrow.blocks[1].attn.o.matrix, before.blocks[1].attn.o.weight)
    with torch.inference_mode():
        assert torch.allclose(before(ids_BT), narrow(ids_BT), atol=1e-5)


@pytest.mark.parametrize("without", ["", "-mno-avx512f", "-mno-avx"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.int8])
def test_registers_of_every_width_give_the_same(weights, without, monkeypatch):
    if compiled(torch.float32, torch.float32) is None:
        pytest.skip("no compiler makes kernels here")
    if without and not {"avx", "sse2"} & build.processor_flags():
        pytest.skip("the processor is another one")
    monkeypatch.setenv("CC", f"cc {without}")
    kernels = compiled.__wrapped__(weights, torch.float32)
    weight = torch.randint(-9, 9, (37, 192)).to(weights)
    for rows in (1, 2, 3, 5, 8, 11):
        x, y = torch.randn(rows, 192), torch.empty(rows, 37)
        assert not kernels.product(weight.data_ptr(), None, None, x.data_ptr(), y.data_ptr(), 37, 192, rows, 1)
        assert torch.allclose(y.double(), x.double() @ weight.double().T, atol=1e-3)
    x, gain, y = torch.randn(3, 48), torch.randn(48), torch.empty(3, 48)
    assert not kernels.rms_norm(x.data_ptr(), gain.data_ptr(), 1e-6, y.data_ptr(), 3, 48)
    assert torch.allclose(y, torch.nn.functional.rms_norm(x, (48,), gain, 1e-6), atol=1e-5)


@pytest.mark.parametrize("others, most", [(torch.float32, 64), (torch.bfloat16, float("inf"))])
def test_torch_never_imitates_products_in_bfloat16(others, most, monkeypatch):
    monkeypatch.setattr(linear, "has_bfloat16", lambda: False)
    assert linear.few(torch.bfloat16, others) == most
    model = make("llama", torch.bfloat16)
    fast, ids_BT = ready(copy.deepcopy(model)), torch.randint(0, 97, (2, 50))
    with torch.inference_mode():
        assert torch.allclose(model(ids_BT).float(), fast(ids_BT).float(), atol=2e-2)


def test_without_a_compiler_the_kernels_are_none(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert compiled.__wrapped__(torch.float32, torch.float32) is None
    monkeypatch.setenv("CC", "false")
    assert compiled.__wrapped__(torch.float32, torch.float32) is None


def test_the_weights_are_kept_once():
    model = ready(make("tied", torch.float32))
    if isinstance(model.blocks[0].attn, ReadyAttention):
        names = {name for name, _ in model.named_parameters()}
        norms = {f"blocks.{layer}.norm.{part}.weight" for layer in (0, 1) for part in ("attn", "mlp")}
        assert names == {"embed.weight", "norm.final.weight", *norms}
    if isinstance(model.head, ReadyLinear):
        assert model.head.matrix.data_ptr() == model.embed.weight.data_ptr()


def test_other_precisions_are_left_as_they_are():
    model = make("llama", torch.float64)
    before = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in ready(model).named_parameters()] == before


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["llama", "tied", "biases", "gpt2", "odd sizes"])
def test_int8_is_the_model_of_the_rounded_weights(name, dtype, compile):
    model = make(name, dtype)
    fast = ready(copy.deepcopy(model), weights="int8", compile=compile)
    assert any("int8" in note for note in fast.notes)
    rounded = copy.deepcopy(model).double()
    with torch.no_grad():
        for part in rounded.modules():
            if type(part) is torch.nn.Linear:
                steps = part.weight.abs().amax(1, keepdim=True) / 127
                part.weight.copy_((part.weight / steps).round() * steps)
        if rounded.config.tied:  # the embedding's rows are looked up as they are
            rounded.head.weight = torch.nn.Parameter(rounded.embed.weight.clone())
        steps = rounded.head.matrix.abs().amax(1, keepdim=True) / 127
        rounded.head.weight.copy_((rounded.head.matrix / steps).round() * steps)
    for rows in (1, 3, 20):
        ids_BT = torch.randint(0, 97, (rows, 16))
        expected, actual = (decode(each, ids_BT, None, 9).double() for each in (rounded, fast))
        # bfloat16 keeps the steps' own rounding of other numbers; a scale that is off would be far outside
        assert torch.allclose(expected, actual, atol=2e-5 if dtype == torch.float32 else 3e-2)


def test_int8_rounds_to_the_nearest_of_255_steps():
    weight = torch.randn(5, 64)
    weight[2] = 0
    layer = Int8Linear(weight, None, None)
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.matrix - weight).abs() <= steps / 2 + 1e-6).all()
    assert not layer.matrix[2].any()


def test_int8_is_refused_where_it_is_not_computed_with():
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        ready(make("llama", torch.float64), weights="int8")
    with pytest.raises(ConfigError, match="for a CPU"):
        check_int8(torch.float32, torch.device("cuda"))
