"""What grows with the length of a text: weights, cache and work, counted and measured."""

# %% weights
from dataclasses import replace

from lapis.families import PRESETS, find
from lapis.model.size import measure


def config(name: str):
    return find(PRESETS[name]).read_config(PRESETS[name])


for name in ("gpt2", "qwen2.5-0.5b"):
    for context in (1024, 2048):
        print(f"{name:12} made for {context:,} tokens: {measure(replace(config(name), context=context)).total:,}")

# %% cache
qwen = config("qwen2.5-0.5b")
print(f"{qwen.layers} layers, {qwen.heads} heads of queries, {qwen.kv_heads} of keys and values, {qwen.head_dim} wide")
keys_and_values, bytes_of_a_number = 2, 2  # a number in bfloat16 is two bytes
per_token = qwen.layers * keys_and_values * qwen.kv_heads * qwen.head_dim * bytes_of_a_number
for length in (1_000, 10_000, 100_000):
    cache = per_token * length
    assert cache == measure(qwen, length).kv_cache_bytes  # as lapis counts
    print(f"{length:>7,} tokens: {cache / 1e6:>8,.1f} MB")
print(f"the weights: {2 * measure(qwen).total / 1e6:,.0f} MB")

# %% real-cache
import torch

import lapis
from lapis.model.cache import Cache

shape = lapis.ModelConfig(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=128, vocab=100, context=256)
model = lapis.Transformer(shape).eval()
for length in (10, 20, 40):
    cache = Cache(shape, batch=1, capacity=length)
    with torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64), cache=cache)
    print(f"{length} tokens: {cache.nbytes:,} bytes, measured")

# %% work
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops(length: int) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64))
    return counter.get_total_flops()


for length in (32, 64, 128, 256):
    in_all = flops(length)
    print(f"{length:>4} tokens: {in_all / 1e6:6.1f} MFLOPs, {in_all / length / 1e3:5.1f} thousand for each token")

# %% share
for length in (1_000, 10_000, 100_000):
    size = measure(qwen, length)
    print(f"{length:>7,} tokens: {size.attention_flops_per_token / size.flops_per_token:5.1%} of the work is attention")

# %% window
for name in ("gemma-3-1b", "qwen2.5-1.5b"):
    sizes = [measure(config(name), length).kv_cache_bytes for length in (4_000, 32_000)]
    print(f"{name:14} cache at 4,000 tokens {sizes[0] / 1e6:6.1f} MB, at 32,000 tokens {sizes[1] / 1e6:6.1f} MB")
