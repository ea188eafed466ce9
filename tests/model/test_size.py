"""Counts: the published numbers, the model's own parameters, and what autograd and the cache really keep."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lapis.checkpoint import open_checkpoint
from lapis.families import PRESETS, find, parameter_shapes, part_of
from lapis.families.config import Delta, Experts, ModelConfig
from lapis.model.cache import Cache
from lapis.model.size import Mixer, activation_bytes, measure, measure_headers, mixers
from lapis.model.transformer import Transformer

from .conftest import SHAPES

PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "bert-base-uncased": 109_482_240, "bert-large-uncased": 335_141_888, "vit-base-patch16-224": 86_567_656,
    "vit-large-patch16-224": 304_326_632, "vit-huge-patch14-224": 632_045_800, "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920, "mistral-7b": 7_241_732_096, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400, "qwen2.5-1.5b": 1_543_714_304,
    "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952,
    "ministral-8b": 8_019_808_256, "smollm3-3b": 3_075_098_624, "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344, "olmo-3-7b": 7_298_011_136, "granite-3.3-2b": 2_533_539_840,
    "exaone-4.0-1.2b": 1_279_391_488, "starcoder2-3b": 3_030_371_328, "phi-3-mini-4k": 3_821_079_552,
    "apertus-8b": 8_053_338_240,  # with beta and eps, which transformers calls buffers
    "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "gemma-2-27b": 27_227_128_320,
    "glm-4-9b-0414": 9_400_279_040, "glm-4-32b-0414": 32_566_081_536, "command-r7b": 8_028_033_024,
    "stablelm-2-1.6b": 1_644_515_328, "stablelm-3b-4e1t": 2_795_443_200, "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960, "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320, "roberta-base": 124_645_632, "roberta-large": 355_359_744,
    "xlm-roberta-base": 278_043_648, "xlm-roberta-large": 559_890_432, "distilbert-base-uncased": 66_362_880,
    "distilbert-base-multilingual-cased": 134_734_080,
    "modernbert-base": 149_014_272, "modernbert-large": 394_781_696,
    "qwen3-30b-a3b": 30_532_122_624, "qwen3-235b-a22b": 235_093_634_560, "qwen1.5-moe-a2.7b": 14_315_784_192,
    "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112, "olmoe-1b-7b": 6_919_161_856,
    "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672,
    "qwen3.5-9b": 8_953_803_264, "qwen3.5-27b": 26_895_998_464,  # of which the language model
    "gemma-4-e2b": 4_628_569_379, "gemma-4-e4b": 7_463_013_418, "gemma-4-31b": 30_697_345_340,
    "gemma-4-26b-a4b": 25_233_141_790,  # each with a scalar of each layer, which transformers calls a buffer
    "qwen3.5-35b-a3b": 34_660_610_688, "qwen3-next-80b-a3b": 79_674_391_296,
    "ministral-3-3b": 3_429_006_336, "ministral-3-8b": 8_489_553_920,  # of which the language model
    "afm-4.5b": 4_619_189_760, "afm-4.5b-base": 4_619_184_640,
    "qwen2.5-7b": 7_615_616_512, "qwen3-1.7b": 1_720_574_976,
}  # fmt: skip


DELTA = {"family": "qwen3_5_text", "qk_norm": True, "delta": Delta((0, 1, 2), 4, 8, 16, 16)}
EXPERTS = {"family": "mixtral", "experts": Experts(4, 2), "ffn_dim": 200}


def preset(name: str) -> ModelConfig:
    family = find(PRESETS[name])
    assert family is not None
    return family.read_config(PRESETS[name])


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_are_counted_exactly(name: str) -> None:
    size = measure(preset(name)).to_json()
    parameters = size["parameters"]
    assert parameters["total"] == PUBLISHED[name]
    outside = sum(parameters[part] for part in ("embedding", "position", "norm", "head"))
    assert PUBLISHED[name] == outside + sum(layer["parameters"] for layer in size["layers"])
    assert parameters["block"] == max(layer["parameters"] for layer in size["layers"])


def test_what_is_told_of_gpt2_and_bert() -> None:
    gpt2 = measure(preset("gpt2")).to_json()
    assert gpt2["parameters"]["block"] == 7_087_872
    assert gpt2["parameters"]["position"] == 1024 * 768 and gpt2["parameters"]["embedding"] == 50257 * 768
    assert measure(preset("bert-base-uncased")).to_json()["parameters"]["with_head"] == {"masked": 109_514_298}


def test_only_learned_positions_grow_with_the_context() -> None:
    for name in ("gpt2", "llama-3-8b", "bert-base-uncased"):
        shape = preset(name)
        longer = dataclasses.replace(shape, context=shape.context + 1000)
        learned = 1000 * shape.dim if shape.positions == "learned" else 0
        assert measure(longer).total - measure(shape).total == learned


def test_shapes_are_those_of_the_model(shape: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(shape)
    real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    firsts = {None, *shape.kinds}
    assert parameter_shapes(shape) == {name: size for name, size in real.items() if part_of(name).layer in firsts}
    for layer, first in enumerate(shape.kinds):
        own, like = (
            {name.split(".", 2)[2]: size for name, size in real.items() if name.startswith(f"blocks.{number}.")}
            for number in (layer, first)
        )
        assert own == like
    assert measure(shape).total == sum(p.numel() for p in Transformer(shape).parameters())


@pytest.mark.parametrize("kind", [name for name, shape in SHAPES.items() if shape.head in ("lm", "masked")])
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    shape = SHAPES[kind]
    if shape.uneven is None and shape.causal:
        shape = dataclasses.replace(shape, window=None, window_layers=None)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it counts the whole square
        Transformer(shape)(torch.zeros(1, 12, dtype=torch.long))
    size = measure(shape, 12)
    products = size.flops_per_token - size.attention_flops_per_token
    whole_square = sum(4 * shape.heads * shape.at(layer).head_dim * 12 for layer in range(shape.layers))
    counted = counter.get_total_flops()
    if shape.delta is not None:  # the state is counted as token by token, and computed a chunk at a time
        counted, whole_square = counted - counter.get_flop_counts()["Global"][torch.ops.aten.bmm], 0
    assert counted == 12 * (products + whole_square)


def test_a_causal_token_sees_half_and_a_window_less() -> None:
    shape = preset("mistral-7b")
    whole = dataclasses.replace(shape, causal=False, window=None)
    assert measure(shape, 1).attention_flops_per_token == measure(whole, 1).attention_flops_per_token
    assert measure(shape, 4095).attention_flops_per_token == measure(whole, 4096 // 2).attention_flops_per_token
    assert measure(shape, 10**6).attention_flops_per_token < measure(whole, 4096).attention_flops_per_token


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_the_kv_cache_takes_the_bytes_that_are_told(kind: str, shapes: dict[str, ModelConfig]) -> None:
    cache = Cache(shapes[kind], 1, 20, dtype=torch.bfloat16)
    assert cache.nbytes == measure(shapes[kind], 20).kv_cache_bytes
    windowed = dataclasses.replace(shapes[kind], window=7)
    assert measure(windowed, 20).kv_cache_bytes == measure(shapes[kind], 7).kv_cache_bytes


@pytest.mark.parametrize("kind", ["gemma4", "gemma4-experts"])
def test_of_layers_with_sizes_of_their_own_the_cache_has_them(kind: str, shapes: dict[str, ModelConfig]) -> None:
    shape = dataclasses.replace(shapes[kind], window=20)
    assert Cache(shape, 1, 20, dtype=torch.bfloat16).nbytes == measure(shape, 20).kv_cache_bytes
    assert measure(shapes[kind], 20).kv_cache_bytes < measure(shape, 20).kv_cache_bytes


@pytest.mark.parametrize("fields", [{}, {"ffn_dim": 700}, {"kv_heads": 2}, {"layers": 2}, EXPERTS, DELTA])
def test_activations_are_about_what_autograd_keeps(fields: dict[str, Any]) -> None:
    shape = ModelConfig(dim=128, layers=4, heads=8, ffn_dim=344, vocab=512, context=64, tied=True)
    shape = dataclasses.replace(shape, **fields)
    model = Transformer(shape)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(ids)
        loss = torch.nn.functional.cross_entropy(logits[0], ids[0])
    assert loss.isfinite()
    assert sum(saved.values()) == pytest.approx(activation_bytes(shape, 64, width=4), rel=0.05)


def test_mixers_cost_what_such_layers_cost() -> None:
    tokens, features = 6, 4
    dense, per_token, attention = mixers(tokens, features)
    layers = {dense: torch.nn.Linear(24, 24), per_token: torch.nn.Conv1d(4, 4, 1),
              attention: torch.nn.MultiheadAttention(4, 1)}  # fmt: skip
    for mixer, layer in layers.items():
        assert mixer.parameters == sum(p.numel() for p in layer.parameters())
    with FlopCounterMode(display=False) as counter:
        layers[dense](torch.zeros(1, 24))
    assert counter.get_total_flops() == dense.flops
    with FlopCounterMode(display=False) as counter:
        layers[per_token](torch.zeros(1, 4, 6))
    assert counter.get_total_flops() == per_token.flops
    assert attention.flops == 4 * per_token.flops + 2 * 2 * tokens * tokens * features
    assert mixers(512, 768)[0] == Mixer("fully connected", 154_619_215_872, 309_237_645_312, "everything")


def test_an_unknown_family_is_counted_from_headers(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("llama")
    folder.set(model_type="someone-elses")
    checkpoint = open_checkpoint(folder.path)
    counted = measure_headers(checkpoint.index, checkpoint.part)
    known = measure(folder.model.config).to_json()
    assert counted["parameters"]["total"] == known["parameters"]["total"]
    assert counted["parameters"]["block"] == known["parameters"]["block"] and len(counted["layers"]) == 2
    assert counted["memory"]["weights_bytes"] == sum(prod(t.shape) * 4 for t in folder.tensors.values())


def test_counting_imports_no_torch() -> None:
    code = "import sys; from lapis.cli.inspect import inspect as i; i('gpt2', json=True); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
