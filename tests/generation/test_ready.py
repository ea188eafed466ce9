"""Packed weights: the same logits as before, for every family's kind of layer, and only where packing applies."""

import copy

import pytest
import torch

from lapis.families.config import ModelConfig
from lapis.generation.ready import PackedLinear, ready
from lapis.model.transformer import Transformer

CASES = {
    "llama": {},
    "tied": {"tied": True},
    "biases": {"bias": "all"},
    "gpt2": {"tied": True, "bias": "all", "norm": "layer", "mlp": "gelu_tanh", "positions": "learned"},
    "qwen3": {"qk_norm": True, "head_dim": 16},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_packed_model_gives_the_same_logits(name, dtype):
    torch.manual_seed(0)
    shape = {"dim": 48, "layers": 2, "heads": 6, "kv_heads": 3, "ffn_dim": 80, "vocab": 97, "context": 32}
    model = Transformer(ModelConfig(**{**shape, **CASES[name]})).to(dtype).eval()
    packed = ready(copy.deepcopy(model))
    for rows, tokens in ((1, 1), (3, 1), (2, 9)):
        ids_BT = torch.randint(0, 97, (rows, tokens))
        with torch.inference_mode():
            expected, actual = model(ids_BT).float(), packed(ids_BT).float()
        assert torch.allclose(expected, actual, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_packing_drops_the_weights_it_packed():
    model = Transformer(ModelConfig(dim=32, layers=1, heads=2, ffn_dim=48, vocab=97, context=32)).eval()
    packed = ready(model)
    if any(isinstance(module, PackedLinear) for module in packed.modules()):
        names = {name for name, _ in packed.named_parameters()}
        assert names == {"embed.weight", "blocks.0.norm.attn.weight", "blocks.0.norm.mlp.weight", "norm.final.weight"}


def test_other_precisions_are_left_as_they_are():
    model = Transformer(ModelConfig(dim=32, layers=1, heads=2, ffn_dim=48, vocab=97, context=32)).double()
    before = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in ready(model).named_parameters()] == before
