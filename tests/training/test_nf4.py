"""Four-bit bases under LoRA: the table against float64, products and gradients, who is refused."""

import copy

import pytest
import torch

from lapis.errors import ConfigError
from lapis.families.config import ModelConfig
from lapis.model.blocks.nf4 import Nf4Linear, pack
from lapis.model.lora import LoraConfig, LoraLinear, LoraNf4, adapters, off, wrap
from lapis.model.transformer import Transformer
from lapis.training.setup.lora import hold

CPU = torch.device("cpu")
# Dettmers et al. 2023, appendix E
TABLE = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_without_a_gpu_nf4_is_refused() -> None:
    model = Transformer(ModelConfig(dim=16, layers=1, heads=2, ffn_dim=24, vocab=31, context=8))
    with pytest.raises(ConfigError, match="nf4 needs a CUDA GPU"):
        hold(model, LoraConfig(base="nf4"), CPU)
    with pytest.raises(ConfigError, match='base is "int3"'):
        LoraConfig(base="int3")


def test_a_packed_weight_is_the_nearest_of_the_table() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 32)
    packed = Nf4Linear(linear, bitsandbytes)
    blocks = linear.weight.detach().double().view(-1, 64)
    scale, table = blocks.abs().amax(1, keepdim=True), torch.tensor(TABLE, dtype=torch.float64)
    nearest = ((blocks / scale)[..., None] - table).abs().argmin(-1)
    # the scales are kept in eight bits themselves (double quantization), which moves them by a little
    torch.testing.assert_close(packed.weight.double(), (table[nearest] * scale).view(32, 256), rtol=0.02, atol=1e-4)
    assert packed.packed.numel() == 32 * 256 // 2


@pytest.mark.parametrize("dora", [False, True])
def test_lora_over_four_bits_is_lora_over_those_weights(dora: bool) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    config = ModelConfig(dim=64, layers=1, heads=2, ffn_dim=128, vocab=31, context=8, bias="all")
    model = Transformer(config)
    pack(model.blocks, CPU)
    plain = Transformer(config)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("packed")}, strict=False)
    for name, module in model.named_modules():
        if isinstance(module, Nf4Linear):
            plain.get_submodule(name).weight.data = module.weight.clone()
    ids = torch.randint(31, (2, 8))
    made = []
    for each in (model, plain):
        torch.manual_seed(2)
        wrap(each, LoraConfig(rank=4, dora=dora, targets=("attn", "mlp.up")))
        for lora in adapters(each).values():
            torch.nn.init.normal_(lora.lora_B, std=0.1)
        each(ids).square().sum().backward()
        made.append(each)
    assert {type(m) for m in adapters(model).values()} == {LoraNf4}
    assert {type(m) for m in adapters(plain).values()} == {LoraLinear}
    torch.testing.assert_close(model(ids), plain(ids), rtol=1e-4, atol=1e-5)
    for name, lora in adapters(model).items():
        other = adapters(plain)[name]
        torch.testing.assert_close(lora.lora_A.grad, other.lora_A.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(lora.lora_B.grad, other.lora_B.grad, rtol=1e-3, atol=1e-4)
    before = copy.deepcopy(model.state_dict())
    with off(model), off(plain):
        torch.testing.assert_close(model(ids), plain(ids), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
