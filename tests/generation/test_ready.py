"""A model that is ready to generate: the same logits as before, in every family, with compiled kernels and without."""

import copy

import pytest
import torch

from lapis.errors import ConfigError
from lapis.families.config import ModelConfig
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
    "apertus": {"family": "apertus", "qk_norm": True, "mlp": "xielu"},
    "gemma3": {"family": "gemma3_text", "qk_norm": True, "window": 7, "window_layers": (0,), "mlp": "geglu_tanh"},
    "odd sizes": {"dim": 48, "heads": 6, "kv_heads": 3, "head_dim": 8, "ffn_dim": 80},
    "wide heads": {"head_dim": 80},
}
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


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_is_the_same_bits_whatever_stands_beside_it(dtype):
    if compiled(dtype, dtype) is None:
        pytest.skip("no compiler makes kernels here")
    model = ready(make("qwen3", dtype))
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
@pytest.mark.parametrize("name", CASES)
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
